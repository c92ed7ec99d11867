"""Patched models together with what else is done to models: adapters, quantised weights, offloading, pipelines."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from saved_tiny_model import VOCABULARY, tiny_tokenizer
from test_patch_models import CONFIG, assert_close, oracle, run
from tiny_models import tiny, tokens


def expected_of(model: Any, inner: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), oracle().attached(inner):
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_low_rank_adapters(name: str, first: str) -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny(name), tokens(2, 16)
    before = run(model, ids)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if first == "patch":
        patched = attnrb.patch(model, CONFIG)
        adapted = peft.get_peft_model(model, lora).eval()
    else:
        adapted = peft.get_peft_model(model, lora).eval()
        patched = attnrb.patch(adapted, CONFIG)
    with patched, torch.no_grad():
        logits = adapted(input_ids=ids).logits
        text = adapted.generate(input_ids=ids[:, :6], max_new_tokens=5, do_sample=False)
        with adapted.disable_adapter():
            assert_close(adapted(input_ids=ids).logits, before)
    expected = expected_of(adapted, model, ids)
    assert_close(logits, expected)
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()
    with oracle().attached(model):
        assert text.tolist() == adapted.generate(input_ids=ids[:, :6], max_new_tokens=5, do_sample=False).tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_quantised_weights(name: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    tiny(name, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.float32
    ).eval()
    assert "bnb" in f"{type(model.model.layers[0].self_attn.q_proj).__module__} bnb" and model.is_quantized
    ids = tokens(2, 16)
    assert_close(run(model, ids), expected_of(model, model, ids))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_weights_quantised_by_torchao(name: str, bits: int) -> None:
    """Where torchao is installed, which the tests do not see to: it warns at every import."""
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = tiny(name), tokens(2, 16)
    plain = run(model, ids)
    way = quantization.Int8WeightOnlyConfig()
    if bits == 4:
        way = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    quantization.quantize_(model, way)
    logits = run(model, ids)
    assert_close(logits, expected_of(model, model, ids))
    assert not torch.equal(logits, plain)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_weights_offloaded_to_disk(name: str, tmp_path: Path) -> None:
    """Hooks bring each layer's weights from the disk, and move what a layer is given; outliers follow."""
    from accelerate import disk_offload

    model, ids = tiny(name), tokens(2, 16)
    expected = run(model, ids)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert_close(run(model, ids), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_layers_on_several_devices(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny(name), tokens(2, 16)
    model.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(5)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    got, expected = run(spread, ids, attention_mask=mask), run(model, ids, attention_mask=mask)
    assert_close(got[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4_text"])
def test_masks_that_are_copied_on_the_way_say_the_same(name: str) -> None:
    """As hooks do that move what a layer is given to its device."""
    model, ids = tiny(name), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def run_all() -> list[torch.Tensor]:
        with torch.no_grad(), attnrb.patch(model, CONFIG):
            first = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
            return [first.logits, model(ids[:, 12:], attention_mask=mask, past_key_values=first.past_key_values).logits]

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    expected = run_all()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (
                tuple(copied(each) for each in args),
                {key: copied(value) for key, value in kwargs.items()},
            ),
            with_kwargs=True,
        )
    for got, logits in zip(run_all(), expected, strict=True):
        assert torch.equal(got, logits)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_a_pipeline(name: str) -> None:
    from transformers import pipeline

    generator = pipeline("text-generation", model=tiny(name, vocab_size=VOCABULARY), tokenizer=tiny_tokenizer())
    prompts = ["one two three", "four"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with oracle().attached(generator.model):
        expected = generator(prompts, **options)
    with attnrb.patch(generator.model, CONFIG) as patched:
        assert generator(prompts, **options) == expected
    assert patched.stats.layers > 0


def test_threads_with_a_patched_model_each() -> None:
    models = [tiny("llama"), tiny("gemma3_text")]
    ids = tokens(2, 24)
    configs = [CONFIG, attnrb.RebalanceConfig(alpha=-0.3, threshold=0.1, normalize=True)]
    with attnrb.patch(models[0], configs[0]), attnrb.patch(models[1], configs[1]), torch.no_grad():
        expected = [model(ids).logits for model in models]
        wrong: list[int] = []

        def work(which: int) -> None:
            with torch.no_grad():
                for _ in range(15):
                    if not torch.equal(models[which](ids).logits, expected[which]):
                        wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
