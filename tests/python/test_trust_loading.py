"""What a checkpoint lacks is refused with its names; copies of GGUF files are whole, made again, or done without."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from attnrb import models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from saved_tiny_model import TEXT, save_tiny_gguf, save_tiny_model, tiny_model, tiny_tokenizer  # noqa: E402

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the package peft is not installed")

PROJECTION = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNRB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights of a saved model by name (dots as they are), or drop those that are None."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in changes.items():
        del weights[name]
        if value is not None:
            weights[name] = value
    save_file(weights, file, metadata={"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])).logits
    return found


# ------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("name", ["lm_head.weight", PROJECTION, "model.embed_tokens.weight"])
def test_a_missing_weight_is_refused_by_name(folder: Path, name: str) -> None:
    edit_weights(folder, **{name: None})
    with pytest.raises(models.ModelError, match="which would be random") as error:
        models.load(folder)
    assert name in str(error.value)
    assert "--allow-missing" in str(error.value)
    assert torch.isfinite(logits(models.load(folder, allow_missing=True).model)).all()


def test_a_folder_saved_without_its_output_layer(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match=r"lacks the weights lm_head\.weight"):
        models.load(tmp_path)


def test_many_missing_weights_are_counted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(models.ModelError, match=r"model\.layers\.3\..* and \d+ more"):
        models.load(folder)


def test_a_weight_of_another_shape_is_refused_with_both_shapes(folder: Path) -> None:
    edit_weights(folder, **{PROJECTION: torch.zeros(16, 32)})
    with pytest.raises(models.ModelError, match=r"q_proj\.weight \(\[16, 32\] where the model has \[32, 32\]\)"):
        models.load(folder)
    models.load(folder, allow_missing=True)


@pytest.mark.parametrize(
    ("field", "value", "stray"),
    [
        ("num_hidden_layers", 2, "model.layers.2.input_layernorm.weight"),
        ("architectures", None, "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_weights_without_a_place_are_named(folder: Path, field: str, value: Any, stray: str) -> None:
    """A configuration that knows of fewer layers, or of no biases, gives another model than was trained."""
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, field: value}))
    if stray.endswith("bias"):
        file = folder / "model.safetensors"
        save_file({**load_file(file), stray: torch.ones(32)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="has weights that its configuration has no place for") as warned:
        models.load(folder)
    assert any(stray in str(each.message) for each in warned)


@pytest.mark.parametrize("content", [b"{", b"", b'\xef\xbb\xbf{"eos_token_id": 5}', b'{"eos_token_id": \xff}'])
def test_generation_settings_that_cannot_be_read(folder: Path, content: bytes) -> None:
    """Without them transformers goes on, and its texts have no end."""
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(models.ModelError, match=r"generation_config\.json of 'tiny' is not JSON: "):
        models.load(folder)


def test_nothing_is_said_of_a_whole_checkpoint(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        models.load(folder)


def test_a_tied_output_layer_is_not_missing(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(models.load(tmp_path).model), logits(model))


def test_a_shard_that_lacks(folder: Path) -> None:
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert torch.equal(logits(models.load(folder).model), logits(tiny_model()))
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(models.ModelError, match="could not be loaded"):
        models.load(folder)


# ------------------------------------------------------------------------------------------------ where it lies


def test_subfolder(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "above" / "below")
    assert torch.equal(logits(models.load(tmp_path / "above", subfolder="below").model), logits(tiny_model()))
    with pytest.raises(models.ModelError, match=r"there is no .*beyond"):
        models.load(tmp_path / "above", subfolder="beyond")


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer("{{ messages }}")
    other.save_pretrained(tmp_path / "other")
    assert models.load(folder).tokenizer.chat_template is None
    assert models.load(folder, tokenizer=str(tmp_path / "other")).tokenizer.chat_template == "{{ messages }}"
    assert models.load(folder, tokenizer=other).tokenizer is other


@needs_peft
class TestAdapters:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        adapted = get_peft_model(
            tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / "adapter")
        self.expected = logits(adapted.eval())
        return tmp_path / "adapter"

    def test_counts(self, folder: Path, adapter: Path) -> None:
        found = logits(models.load(folder, adapter=adapter).model)
        assert torch.equal(found, self.expected)
        assert not torch.equal(found, logits(tiny_model()))

    def test_missing_weights_are_refused_by_name(self, folder: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        weights = load_file(file)
        lost = sorted(weights)[0]
        save_file({name: value for name, value in weights.items() if name != lost}, file)
        with pytest.raises(models.ModelError, match="lacks the weights") as error:
            models.load(folder, adapter=adapter)
        assert lost in str(error.value)

    def test_one_of_another_model(self, tmp_path: Path, folder: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        weights = load_file(file)
        more = {name.replace("layers.0", "layers.7"): value.clone() for name, value in weights.items()}
        save_file({**weights, **more}, file)
        with pytest.raises(models.ModelError, match=r"is of another model, which has .*layers\.7"):
            models.load(folder, adapter=adapter)

    def test_pickled_ones_are_never_read(self, folder: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(models.ModelError, match="pickled adapters are never loaded"):
            models.load(folder, adapter=adapter)


def test_delta_is_added(folder: Path, tmp_path: Path) -> None:
    delta = tiny_model()
    with torch.no_grad():
        for weight in delta.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) / 10)
    delta.save_pretrained(tmp_path / "delta")
    expected = tiny_model()
    with torch.no_grad():
        for weight, more in zip(expected.parameters(), delta.parameters(), strict=True):
            weight += more
    found = models.load(folder, delta=tmp_path / "delta").model
    assert torch.equal(logits(found), logits(expected))


# ------------------------------------------------------------------------------------------------ copies of GGUF files


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNRB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert models.cache_folder() is None


@needs_gguf
class TestCopies:
    @pytest.fixture
    def path(self, tmp_path: Path, cache: Path) -> Path:
        return save_tiny_gguf(tmp_path / "tiny.gguf")

    def load(self, path: Path) -> list[str]:
        steps: list[str] = []
        model, tokenizer = models.load(path, progress=steps.append)
        assert torch.equal(logits(model), logits(tiny_model()))
        assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
        return steps

    def copy(self, cache: Path) -> Path:
        (copy,) = cache.glob("models/*")
        return copy

    @pytest.mark.parametrize(
        "damage",
        [
            lambda copy: os.truncate(copy / "model.safetensors", 1000),
            lambda copy: os.truncate(copy / "model.safetensors", 0),
            lambda copy: (copy / "model.safetensors").unlink(),
            lambda copy: (copy / "tokenizer.json").write_text("{"),
            lambda copy: (copy / "config.json").write_text(""),
            lambda copy: (copy / "attnrb.json").unlink(),
            lambda copy: (copy / "attnrb.json").write_text("[]"),
        ],
        ids=["half", "empty", "no weights", "tokenizer", "config", "no sums", "other sums"],
    )
    def test_a_damaged_copy_is_made_again(self, path: Path, cache: Path, damage: Any) -> None:
        self.load(path)
        damage(self.copy(cache))
        assert "De-quantising" in self.load(path)[0]
        assert self.load(path) == ["Loading tiny.gguf"]

    @pytest.mark.parametrize("where", [0.02, 0.5, 0.999])
    def test_a_bit_that_fell_over(self, path: Path, cache: Path, where: float) -> None:
        self.load(path)
        file = self.copy(cache) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[int(len(data) * where)] ^= 4
        file.write_bytes(data)
        assert "De-quantising" in self.load(path)[0]

    @pytest.mark.parametrize("kind", [OSError(122, "Disk quota exceeded"), RuntimeError("I/O error: File too large")])
    def test_a_copy_that_cannot_be_written(
        self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: Exception
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise kind

        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.warns(UserWarning, match=r"could not be kept in .* later starts are as slow"):
            self.load(path)
        assert not list(cache.glob("models/*"))

    def test_a_damaged_copy_that_cannot_be_removed(
        self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.load(path)
        (self.copy(cache) / "config.json").write_text("")
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        self.load(path)

    def test_what_a_kill_left_is_cleared_in_time(self, path: Path, cache: Path) -> None:
        (cache / "models").mkdir(parents=True)
        for name, age in (("old", 2 * 86400), ("new", 0)):
            scratch = cache / "models" / f".writing-{name}"
            scratch.mkdir()
            past = scratch.stat().st_mtime - age
            os.utime(scratch, (past, past))
        self.load(path)
        assert [each.name for each in cache.glob("models/.writing-*")] == [".writing-new"]

    def test_options_of_one_load_are_not_kept_for_others(self, path: Path, cache: Path) -> None:
        other = models.load(path, options={"max_position_embeddings": 99}).model
        assert other.config.max_position_embeddings == 99
        self.load(path)

    def test_nothing_random_is_kept(self, path: Path, cache: Path) -> None:
        models.load(path, allow_missing=True)
        assert not list(cache.glob("models/*"))


@needs_gguf
class TestParts:
    def part(self, path: Path, number: int, count: int) -> Path:
        import gguf

        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    @pytest.mark.parametrize("name", ["model-00001-of-00003.gguf", "renamed.gguf"])
    def test_one_part_is_refused(self, tmp_path: Path, cache: Path, name: str) -> None:
        with pytest.raises(models.ModelError, match=r"one part of a model in 3 files: join them"):
            models.load(self.part(tmp_path / name, 0, 3))

    def test_a_model_in_one_part_is_read(self, tmp_path: Path, cache: Path) -> None:
        whole = save_tiny_gguf(tmp_path / "model-00001-of-00001.gguf")
        assert torch.equal(logits(models.load(whole).model), logits(tiny_model()))


@pytest.mark.usefixtures("smollm2_folder")
def test_the_embedded_model_lacks_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        models.load()


@pytest.mark.parametrize("silenced", [False, True])
def test_a_bar_of_gguf_tensors_ends_with_a_failure(silenced: bool, capsys: pytest.CaptureFixture[str]) -> None:
    from attnrb.models.checkpoint import bars_of_gguf
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    before, shown = gguf.tqdm, set(tqdm._instances)
    # A command that ran in this process may have turned bars off.
    (logging.disable_progress_bar if silenced else logging.enable_progress_bar)()

    def read() -> None:
        for _ in gguf.tqdm([1, 2, 3], desc="tensors"):
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError), bars_of_gguf():
            read()
    finally:
        logging.enable_progress_bar()
    assert gguf.tqdm is before
    assert set(tqdm._instances) == shown
    assert ("tensors" in capsys.readouterr().err) is not silenced
