"""GGUF files, and the copies of them in safetensors that later loads read.

Reading a GGUF file means de-quantising it and rebuilding its tokenizer: 20 s for the 135M-parameter default model,
against 0.4 s for the same model in safetensors. So the first load of a GGUF file writes its float32 weights to the
user's cache folder.

Note: [Copies that can be trusted]
A copy is written in a folder of its own and renamed when it is whole, with the length and the CRC-32 of each file in
``attnrb.json``. A copy that does not agree with them, as after a crash of the machine or a bad disk, is made again. One
that cannot be written costs a warning: only later starts are slower for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import re
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnrb.decisions import tell
from attnrb.models.checkpoint import Checkpoint, ModelError, read_model, read_tokenizer

_CACHED_FILE_LIMIT = 1 << 30  # bytes of a GGUF file; the copy of a larger one would fill a disk unasked
_GROWTH = 16  # float32 weights against those of two bits, the smallest there are
MANIFEST = "attnrb.json"
"""File of a copy that has the sums of the others, and says which transformers made it."""
SCRATCH = ".writing-"
_ABANDONED = 24 * 3600.0  # seconds after which a half-written copy belongs to nobody
_SPLIT_KEY = b"split.count\x02\x00\x00\x00"  # the key and its type, a 16-bit number
_HEADER = 64 << 20  # bytes at the beginning that hold the keys, a vocabulary among them
_PART_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

Progress = Callable[[str], None]
"""A function that is called with a short line before each step that may take seconds."""


def cache_folder() -> Path | None:
    """Folder of converted GGUF weights; None where there is none.

    The folder is ``$ATTNRB_CACHE``, else ``$XDG_CACHE_HOME/attnrb``, else ``~/.cache/attnrb``. There is none when
    ``ATTNRB_CACHE`` is set but empty, which turns it off, and when the user has no home.
    """
    own = os.environ.get("ATTNRB_CACHE")
    if own == "":
        return None
    try:
        if own is not None:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attnrb"
    except RuntimeError:  # no home: a user of a container without an entry in passwd
        return None


def require_gguf() -> None:
    """Raise `ModelError` where the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the package gguf is needed to load a model: run `pip install gguf`")


@contextlib.contextmanager
def converted(path: Path, checkpoint: Checkpoint, say: Progress) -> Iterator[Checkpoint]:
    """The checkpoint to read for a GGUF file: its converted copy where there is one or can be one.

    Args:
        path: the file.
        checkpoint: how it is to be read.
        say: called with a short line before a step that takes seconds.

    Raises:
        ModelError: it is one part of several, cannot be read, or the package gguf is missing.
    """
    _refuse_part(path)
    direct = replace(checkpoint, place=str(path.parent), gguf_file=path.name)
    cache = cache_folder()
    # What is random in one load must not be kept for all.
    if cache is not None and not checkpoint.allow_missing and path.stat().st_size <= _CACHED_FILE_LIMIT:
        folder = cache / "models" / f"{path.stem}-{_fingerprint(path)}"
        if _is_whole(folder) or _make_copy(path, direct, folder, say):
            yield replace(checkpoint, place=str(folder), gguf_file=None)
            return
    require_gguf()
    say(f"De-quantising {path.name}")
    tell("conversion", f"no copy of {path.name} can be kept: there is no cache folder, no room, or random weights")
    yield direct


def _refuse_part(path: Path) -> None:
    """Raise `ModelError` for one file of a model that was split into several: transformers reads one alone."""
    part = _PART_NAME.search(path.name)
    count = int(part[2]) if part else _split_count(path)
    if count > 1:
        raise ModelError(
            f"model: {path.name} is one part of a model in {count} files: join them first, as with "
            "`llama-gguf-split --merge FIRST_PART OUT`"
        )


def _split_count(path: Path) -> int:
    if path.stat().st_size == 0:  # which cannot be mapped
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = data.find(_SPLIT_KEY, 0, _HEADER)
        start = place + len(_SPLIT_KEY)
        return int.from_bytes(data[start : start + 2], "little") if place >= 0 else 0


def _make_copy(path: Path, direct: Checkpoint, folder: Path, say: Progress) -> bool:
    """Write the converted copy of `path` to `folder`; False where it cannot be written."""
    require_gguf()
    if not _has_room(folder.parent, path):
        return False
    _clear(folder)
    say(f"De-quantising {path.name} (once: later starts read the copy in {folder.parent.parent})")
    tell("conversion", f"{path.name} has no copy in the cache yet; later starts read it")
    tokenizer = read_tokenizer(direct)
    model = read_model(replace(direct, options={}), torch.float32)
    try:
        _write(model, tokenizer, folder)
    except Exception as error:  # OSError, or the like of it from safetensors: a quota, a full disk
        reason = " ".join(str(error).split()).rstrip(".")
        warnings.warn(
            f"the copy of {path.name} could not be kept in {str(folder.parent)!r} ({reason}): later starts are as slow "
            "as this one; ATTNRB_CACHE names another folder",
            stacklevel=1,
        )
        return False
    return _is_whole(folder)  # one that is damaged and may not be removed still stands there


def _has_room(folder: Path, path: Path) -> bool:
    """Whether a converted copy of the GGUF file `path` can be written. Without one only later starts are slower."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > _GROWTH * path.stat().st_size
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Remove a damaged copy, and what a kill left of others."""
    shutil.rmtree(folder, ignore_errors=True)
    for scratch in folder.parent.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > _ABANDONED:
                shutil.rmtree(scratch, ignore_errors=True)


def _fingerprint(path: Path) -> str:
    """Names a GGUF file by its content and by what converts it, so that neither can change under a cached copy."""
    digest = hashlib.sha256(importlib.metadata.version("transformers").encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer to `folder` as float32 safetensors, wholly or not at all."""
    # The weights are de-quantised by now, but transformers still marks the model as GGUF and refuses to save it.
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        sums = {file.name: _sum(file) for file in sorted(scratch.iterdir())}
        made_by = importlib.metadata.version("transformers")
        (scratch / MANIFEST).write_text(json.dumps({"files": sums, "transformers": made_by}), "utf-8")
        for file in scratch.iterdir():
            _to_disk(file)
        with contextlib.suppress(OSError):  # another process was first: its copy is as good
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_whole(folder: Path) -> bool:
    """Whether a copy is there and as it was written: see Note: [Copies that can be trusted]."""
    try:
        sums = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        return bool(sums) and all(_sum(folder / name) == list(expected) for name, expected in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sum(path: Path) -> list[int]:
    """Length and CRC-32 of a file."""
    total = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total, crc = total + len(block), zlib.crc32(block, crc)
    return [total, crc]
