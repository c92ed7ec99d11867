"""Finds the torch to build against: the one of the environment that attnrb is being installed into.

Run as a program it prints the folder of that torch, or one sentence that says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OLDEST = (2, 10)
REQUIREMENT = "torch>=2.10"
VARIABLE = "ATTNRB_TORCH"


class Torch(NamedTuple):
    """A torch package: its folder, and the version that its headers state."""

    folder: Path
    version: tuple[int, int, int]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def require_torch() -> Torch:
    """The torch to build against.

    Raises:
        SystemExit: there is none, or not the right one. The message says what to do.
    """
    torch = find_torch()
    if torch is None:
        raise SystemExit(f"attnrb builds against torch, which is not here: run `pip install '{REQUIREMENT}'` first.")
    return torch


def find_torch() -> Torch | None:
    """The torch to build against, or None where there is none.

    Raises:
        SystemExit: the torch found is too old, or the environment variable ATTNRB_TORCH names no torch package. The
            message says what to do.
    """
    named = os.environ.get(VARIABLE)
    if named:
        torch = read_torch(Path(named))
        if torch is None:
            raise SystemExit(
                f"attnrb: the environment variable {VARIABLE} should name the folder of a torch package, the one that "
                f"`python -c 'import torch; print(torch.__path__[0])'` prints, but {named} is none."
            )
    else:
        torch = next(filter(None, map(read_torch, _places())), None)
    if torch is not None and torch.version < OLDEST:
        raise SystemExit(
            f"attnrb needs torch 2.10 or newer, and {torch.folder} is torch {torch.version_text}: "
            f"run `pip install '{REQUIREMENT}'` first."
        )
    return torch


def read_torch(folder: Path) -> Torch | None:
    """Reads the version of the torch package in `folder` from its headers, without running any of its code."""
    include = folder / "include" / "torch"
    for header in (include / "headeronly" / "version.h", include / "csrc" / "api" / "include" / "torch" / "version.h"):
        if not header.is_file():
            continue
        numbers = dict(
            re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header.read_text(encoding="utf-8"))
        )
        if len(numbers) == 3:
            return Torch(folder, (int(numbers["MAJOR"]), int(numbers["MINOR"]), int(numbers["PATCH"])))
    return None


def _places() -> Iterator[Path]:
    # Importable: torch came in as a build requirement, or the build is not isolated.
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # pip's isolation hides the target environment from sys.path, but sysconfig still names it.
    for scheme in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(scheme), "torch")
    # What the target environment itself sees beyond its own folder.
    if sys.prefix == sys.base_prefix or _sees_system_packages(Path(sys.prefix)):
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        yield Path(sysconfig.get_path("platlib", vars=base), "torch")
        yield Path(site.getusersitepackages(), "torch")


def _sees_system_packages(environment: Path) -> bool:
    settings = environment / "pyvenv.cfg"
    if not settings.is_file():
        return False
    text = settings.read_text(encoding="utf-8").lower()
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.MULTILINE) is not None


if __name__ == "__main__":
    print(require_torch().folder)
