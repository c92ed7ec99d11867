"""What a patch leaves behind: nothing, in the model, in its siblings and in what they share."""

from __future__ import annotations

import copy
import threading
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import tiny, tokens

pytestmark = pytest.mark.oldest


def snapshot(model: Any) -> list[Any]:
    """Every attribute of every module, by identity, and the content of hooks and configurations."""
    taken: list[Any] = []
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            taken.append((name, attribute, id(value)))
            if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                taken.append(list(value))
        config = getattr(module, "config", None)
        if config is not None:
            taken.append((name, copy.deepcopy(vars(config))))
    return taken


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_the_model_is_what_it_was(name: str) -> None:
    model, ids = tiny(name), tokens(2, 10)
    with torch.no_grad():
        before, logits = snapshot(model), model(ids).logits
        patched = attnrb.patch(model)
        assert patched.active
        model.generate(ids, max_new_tokens=3)
        patched.remove()
        assert not patched.active
        assert snapshot(model) == before
        assert torch.equal(model(ids).logits, logits)


def test_the_patch_of_a_model_is_found_while_it_is_there() -> None:
    model = tiny("llama")
    assert attnrb.patched(model) is None
    handle = attnrb.patch(model)
    assert attnrb.patched(model) is handle
    assert attnrb.patched(model.model) is handle
    handle.remove()
    assert attnrb.patched(model) is None


def test_an_exception_leaves_the_model_clean() -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), attnrb.patch(model):
        1 / 0  # noqa: B018
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="layers"):
        attnrb.patch(model, attnrb.RebalanceConfig(layers=[99]))
    assert snapshot(model) == before

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), torch.no_grad(), attnrb.patch(model, observer=fail):
        model(tokens(1, 4))
    assert snapshot(model) == before


def test_models_that_share_a_configuration_do_not_notice() -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    sibling = AutoModelForCausalLM.from_config(model.config).eval()
    sibling.load_state_dict(model.state_dict())
    for module in sibling.modules():
        if "config" in vars(module):
            module.config = model.config
    ids = tokens(2, 10)
    with torch.no_grad():
        before, logits = snapshot(sibling), sibling(ids).logits
        with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.5)):
            assert snapshot(sibling) == before
            assert torch.equal(sibling(ids).logits, logits)
            assert not torch.equal(model(ids).logits, logits)
            with attnrb.patch(sibling, attnrb.RebalanceConfig(alpha=0.5)):
                assert torch.equal(sibling(ids).logits, model(ids).logits)
            assert torch.equal(sibling(ids).logits, logits)


def test_what_is_set_meanwhile_stays() -> None:
    model = tiny("llama")
    config = model.config
    with attnrb.patch(model):
        model.config.use_cache = False
        model.config.a_note = "kept"
        model.resize_token_embeddings(120)
    assert model.config is config
    assert (config.use_cache, config.a_note, config.vocab_size) == (False, "kept", 120)
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_oss", "qwen3_next"])
def test_a_saved_model_is_clean(name: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny(name), tokens(1, 8)
    with torch.no_grad():
        logits = model(ids).logits
        with attnrb.patch(model):
            model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config._attn_implementation == model.config._attn_implementation != "attnrb"
        assert torch.equal(loaded(ids).logits, logits)


def test_threads_do_not_share_outliers() -> None:
    """Two threads in one patched model, on prompts of different shapes."""
    model = tiny("llama")
    prompts = [tokens(2, 30), tokens(3, 17, seed=1)]
    with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.5, threshold=0.05)):
        with torch.no_grad():
            expected = [model(ids).logits for ids in prompts]
        wrong: list[int] = []

        def work(which: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.equal(model(prompts[which]).logits, expected[which]):
                        wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
