"""Read one checkpoint with transformers: no pickle, no code of a model, and no weight that is random unasked."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_MODEL_OPTIONS = (
    "attn_implementation",
    "device_map",
    "key_mapping",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "quantization_config",
    "use_kernels",
    "variant",
)
"""What ``from_pretrained`` takes of a model beside the fields of its configuration."""
_SETTINGS = "generation_config.json"
_NAMED = 6  # weights that an error names before it counts the rest


class ModelError(RuntimeError):
    """A model or its tokenizer could not be loaded. The message is one sentence that says what to do."""


class UnknownOptionError(ModelError):
    """An option of loading that neither transformers nor the model's configuration has."""

    def __init__(self, option: str, known: Iterable[str]) -> None:
        self.option = option
        self.known = tuple(known)
        """What would have been taken."""
        super().__init__(f"options: neither from_pretrained nor the model's configuration has {option!r}")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies, and how it is to be read."""

    place: str
    """A folder, or an id of the Hugging Face hub."""
    name: str
    """What people call it."""
    gguf_file: str | None = None
    """Of the folder, where the weights are in one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    subfolder: str = ""
    """Of the repository on the hub."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """More arguments of ``from_pretrained``."""
    allow_missing: bool = False
    """Whether weights that the checkpoint lacks may be random."""

    def arguments(self) -> dict[str, Any]:
        """Of every ``from_pretrained``."""
        named = {"gguf_file": self.gguf_file, "revision": self.revision, "subfolder": self.subfolder}
        given = {name: value for name, value in named.items() if value}
        given |= {name: value for name, value in self.options.items() if name in _HUB_OPTIONS}
        return {"pretrained_model_name_or_path": self.place, "trust_remote_code": False, **given}


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration, the smallest of a checkpoint's files."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(**checkpoint.arguments())


def read_tokenizer(checkpoint: Checkpoint, options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer. Raises `ModelError` where there is none."""
    from transformers import AutoTokenizer

    with failures(f"model: no tokenizer could be loaded for {checkpoint.name!r}"):
        return AutoTokenizer.from_pretrained(**checkpoint.arguments(), **(options or {}))


def read_model(checkpoint: Checkpoint, dtype: torch.dtype | str) -> Any:
    """The model, every weight of it from the checkpoint.

    Raises:
        ModelError: it cannot be read, or lacks weights and `Checkpoint.allow_missing` is off.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint.gguf_file is not None and dtype == "auto":
        dtype = torch.float32
    # GGUF is no pickle, but transformers counts it out when use_safetensors is set.
    weights: dict[str, Any] = {} if checkpoint.gguf_file is not None else {"use_safetensors": True}
    own = {name: value for name, value in checkpoint.options.items() if name not in _HUB_OPTIONS}
    _check_options(checkpoint, own)
    _check_settings(checkpoint)
    with failures(f"model: {checkpoint.name!r} could not be loaded"), bars_of_gguf():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **checkpoint.arguments(),
            **weights,
            **own,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, with their names
        )
        model, report = loaded
        if not checkpoint.allow_missing:
            _check_report(report, checkpoint.name)
    # Towers for images and layers for drafts are left out rightly; a bias that the configuration denies is not.
    if stray := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{checkpoint.name!r} has weights that its configuration has no place for, {listed(stray)}: they are not "
            "used",
            stacklevel=2,
        )
    return model


@contextlib.contextmanager
def bars_of_gguf() -> Iterator[None]:
    """Have transformers draw its bar of GGUF tensors as it draws its others, and end it where reading them fails.

    The bar ignores `transformers.utils.logging.disable_progress_bar`, and a failure left it on the terminal, under the
    message.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    drawn: list[Any] = []

    def draw(*arguments: Any, **options: Any) -> Any:
        drawn.append(logging.tqdm(*arguments, **options))
        return drawn[-1]

    before = vars(gguf).get("tqdm")
    if before is not None:
        vars(gguf)["tqdm"] = draw
    try:
        yield
    finally:
        if before is not None:
            vars(gguf)["tqdm"] = before
        for bar in drawn:
            bar.close()


def _check_options(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Raise `UnknownOptionError` for one that would be dropped, or end in the words of some constructor."""
    if all(name in _MODEL_OPTIONS for name in options):
        return
    with failures(f"model: the configuration of {checkpoint.name!r} could not be read"):
        config = read_config(checkpoint)
    known = (*_MODEL_OPTIONS, *_HUB_OPTIONS, *config.to_dict(), *getattr(config, "attribute_map", {}))
    for name in options:
        if name not in known:
            raise UnknownOptionError(name, known)


def _check_settings(checkpoint: Checkpoint) -> None:
    """Refuse a folder whose generation settings cannot be read: transformers goes on without them, and their ends."""
    file = Path(checkpoint.place, checkpoint.subfolder, _SETTINGS)
    if checkpoint.gguf_file is None and file.is_file():
        try:
            json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"model: {_SETTINGS} of {checkpoint.name!r} is not JSON: {error}") from None


def _check_report(report: Mapping[str, Any], name: str) -> None:
    """Refuse what transformers initialises at random, which it only logs."""
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model: {name!r} lacks the weights {listed(missing)}, which would be random; "
            "pass allow_missing=True (--allow-missing) if that is meant"
        )
    if mismatched := sorted(report["mismatched_keys"], key=str):
        shapes = [f"{key} ({list(saved)} where the model has {list(wanted)})" for key, saved, wanted in mismatched]
        raise ModelError(
            f"model: {name!r} has weights of other shapes than its configuration says, {listed(shapes)}, which would "
            "be random; pass allow_missing=True (--allow-missing) if that is meant"
        )


def listed(names: list[str]) -> str:
    """Names for a sentence: the first few, then how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a bad checkpoint, in many types and lines, into one `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ModelError(f"{what}: {reason or type(error).__name__}") from error
