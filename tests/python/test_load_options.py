"""How people say which model to load, as what and where: names, dtypes, devices, and a hub that does not answer."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from attnrb import models
from attnrb.models import hub
from attnrb.models.options import LoadOptions, read_device_map, read_model_name, resolve_device
from saved_tiny_model import save_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("fp32", torch.float32),
        ("float", torch.float32),
        ("bf16", torch.bfloat16),
        ("BF16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
    ],
)
def test_dtypes_as_people_abbreviate_them(text: str, dtype: torch.dtype) -> None:
    assert models.resolve_dtype(text) == dtype


def test_a_wrong_dtype_is_told_what_the_caller_takes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"float16, auto, got 'int8'"):
        models.load(folder, "int8")
    with pytest.raises(ValueError, match=r"float16, got 'auto'"):
        models.resolve_dtype("auto")


@pytest.mark.parametrize(
    ("written", "model", "revision"),
    [
        (None, None, None),
        ("smollm2", None, None),
        ("SmolLM2-135M-Instruct", None, None),
        ("org/model", "org/model", None),
        ("https://huggingface.co/org/model", "org/model", None),
        ("https://huggingface.co/org/model/", "org/model", None),
        ("https://huggingface.co/org/model/tree/v2?x=1", "org/model", "v2"),
        ("hf.co/org/model", "org/model", None),
        (" org/model ", "org/model", None),
    ],
)
def test_names_as_people_write_them(written: str | None, model: str | None, revision: str | None) -> None:
    assert read_model_name(written) == (model, revision)


def test_a_folder_is_itself_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert read_model_name("smollm2").model == "smollm2"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_model_name("~/x").model == str(tmp_path / "x")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:x", ""):
        with pytest.raises(ValueError, match=r"device: expected auto, cpu, cuda"):
            resolve_device(wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device: got 'cuda:1', but this torch .*; expected cpu, or auto"):
            resolve_device("cuda:1")


def test_a_missing_device_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda'"):
        models.load("./nowhere", device="cuda")


def test_a_device_map_takes_the_place_of_a_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models.load(folder, device_map={"": "cpu"})
    assert model.device == torch.device("cpu")
    read, seen = models.read_model, []

    def note(checkpoint: Any, *arguments: Any) -> Any:
        seen.append(checkpoint.options)
        model = read(checkpoint, *arguments)
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("moved, though the map says where it goes"))
        return model

    monkeypatch.setattr(models, "read_model", note)
    models.load(folder, device_map={"": "cpu"})
    assert seen == [{"device_map": {"": "cpu"}}]
    with pytest.raises(ValueError, match="device_map: expected it once"):
        models.load(folder, device_map="auto", options={"device_map": "auto"})
    assert read_device_map('{"": "cpu"}') == {"": "cpu"}
    assert read_device_map("balanced") == "balanced"
    with pytest.raises(ValueError, match="device_map: expected a name or a JSON object"):
        read_device_map("{cpu")
    with pytest.raises(ValueError, match="expected it or device_map, got both"):
        LoadOptions(device="cpu", device_map="auto").check()


class TestHub:
    """A name that is not here, where the hub does not answer."""

    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """No network, nothing kept; and nothing else may be tried."""

        def tried(*_: object, **__: object) -> None:
            raise AssertionError("the hub was asked, which takes half a minute without a network")

        monkeypatch.setattr(hub, "reachable", lambda endpoint: False)
        monkeypatch.setattr(models, "read_config", tried)
        monkeypatch.chdir(tmp_path)

    def test_a_wrong_name_is_said_at_once_with_what_is_near(self, folder: Path) -> None:
        Path("my-model").mkdir()
        with pytest.raises(
            models.ModelError, match=r"'my-modl' is neither a file .*did you mean \./my-model.*cannot be reach"
        ):
            models.load("my-modl")
        with pytest.raises(models.ModelError, match=r"did you mean smollm2"):
            models.load("smolm2")

    def test_offline_says_what_turned_the_hub_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(models.ModelError, match="HF_HUB_OFFLINE or local_files_only"):
            models.load("org/model")

    def test_what_is_kept_is_read_without_asking(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "kept/config.json")
        seen: list[Any] = []

        def note(checkpoint: Any) -> None:
            seen.append(checkpoint.arguments())
            raise models.ModelError("model: enough")

        monkeypatch.setattr(models, "read_config", note)
        with pytest.raises(models.ModelError, match="enough"):
            models.load("https://huggingface.co/org/model/tree/v2")
        assert seen[0]["local_files_only"] is True
        assert seen[0]["revision"] == "v2"
        assert seen[0]["pretrained_model_name_or_path"] == "org/model"


def test_reachable_means_that_something_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub.reachable(f"http://127.0.0.1:{port}")
    assert not hub.reachable(f"http://127.0.0.1:{port}")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert hub.reachable(f"http://127.0.0.1:{port}")
