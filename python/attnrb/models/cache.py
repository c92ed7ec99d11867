"""The converted copies of GGUF files that attnrb keeps: what there is, and taking it away."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrb.models.gguf import MANIFEST, SCRATCH, cache_folder

__all__ = ["Copy", "clear", "copies"]


@dataclass(frozen=True)
class Copy:
    """One converted model in the cache folder."""

    name: str
    """Of its folder: that of the GGUF file, and a fingerprint."""
    folder: Path
    bytes: int
    """On disk, all files together."""
    transformers: str | None
    """The version that made it; None where the copy does not say."""

    @property
    def in_use(self) -> bool:
        """Whether the installed transformers reads it: another version makes a copy of its own.

        A copy that does not say what made it counts as in use.
        """
        return self.transformers in (None, importlib.metadata.version("transformers"))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        made_by = {"transformers": self.transformers, "in_use": self.in_use}
        return {"name": self.name, "folder": str(self.folder), "bytes": self.bytes, **made_by}


def copies() -> list[Copy]:
    """What the cache folder holds, by name, unfinished copies included."""
    cache = cache_folder()
    folder = None if cache is None else cache / "models"
    if folder is None or not folder.is_dir():
        return []
    return [_copy(each) for each in sorted(folder.iterdir()) if each.is_dir()]


def _copy(folder: Path) -> Copy:
    try:
        made_by = json.loads((folder / MANIFEST).read_text("utf-8")).get("transformers")
    except (OSError, ValueError, AttributeError):
        made_by = "unfinished" if folder.name.startswith(SCRATCH) else None
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file() and not each.is_symlink())
    return Copy(folder.name, folder, size, made_by if isinstance(made_by, str) else None)


def clear(name: str | None = None, *, unused: bool = False) -> list[Copy]:
    """Take copies away; the next load of such a model makes one again.

    Args:
        name: those whose names begin so. Default: all.
        unused: only those that the installed transformers does not read.

    Returns:
        What is gone.

    Raises:
        ValueError: nothing has this name.
        OSError: one cannot be removed.
    """
    found = [each for each in copies() if name is None or each.name.lower().startswith(name.lower())]
    if name is not None and not found:
        raise ValueError(f"name: the cache holds nothing whose name begins with {name!r}; `attnrb cache list` shows it")
    gone = [each for each in found if not (unused and each.in_use)]
    for each in gone:
        shutil.rmtree(each.folder)
    return gone
