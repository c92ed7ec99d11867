"""The PEP 517 hooks of attnrb: those of scikit-build-core, pointed at the torch that is already there.

The library is built against the headers of the torch in the environment that attnrb is being installed into, so that
installing attnrb never downloads another one. Where there is no torch, it becomes a build requirement.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from find_torch import REQUIREMENT, find_torch, require_torch
from scikit_build_core import build as backend
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist
from scikit_build_core.errors import CMakeNotFoundError, NinjaNotFoundError

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

if TYPE_CHECKING:
    from typing import TypeAlias  # of Python 3.10: an older one must come as far as the sentence that says so

Settings: TypeAlias = "dict[str, str | list[str]] | None"


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    with _plain_sentences():
        return backend.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    with _plain_sentences():
        return backend.get_requires_for_build_editable(config_settings) + _torch_requirement()


def prepare_metadata_for_build_wheel(folder: str, config_settings: Settings = None) -> str:
    with _plain_sentences():
        return backend.prepare_metadata_for_build_wheel(folder, config_settings)


def prepare_metadata_for_build_editable(folder: str, config_settings: Settings = None) -> str:
    with _plain_sentences():
        return backend.prepare_metadata_for_build_editable(folder, config_settings)


def build_wheel(folder: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _plain_sentences():
        return backend.build_wheel(folder, _with_torch(config_settings), metadata_directory)


def build_editable(folder: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    with _plain_sentences():
        return backend.build_editable(folder, _with_torch(config_settings), metadata_directory)


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [REQUIREMENT]


def _with_torch(config_settings: Settings) -> Settings:
    torch = require_torch()
    print(f"attnrb: building against torch {torch.version_text} at {torch.folder}", file=sys.stderr)
    return {**(config_settings or {}), "cmake.define.ATTNRB_TORCH": str(torch.folder)}


@contextmanager
def _plain_sentences() -> Iterator[None]:
    """Says in one sentence what the machine lacks, at the first hook and before anything is fetched for it."""
    _check_python(sys.version_info[:2])
    _check_compiler()
    try:
        yield
    except CMakeNotFoundError:
        raise SystemExit("attnrb needs CMake 3.24 or newer to build: run `pip install 'cmake>=3.24'`.") from None
    except NinjaNotFoundError:
        raise SystemExit("attnrb needs ninja or make to build: run `pip install ninja`.") from None


def _check_python(version: tuple[int, int]) -> None:
    # pip asks this backend before it reads requires-python.
    if version < (3, 10):
        raise SystemExit(f"attnrb needs Python 3.10 or newer, this is {version[0]}.{version[1]}.")


def _check_compiler() -> None:
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]) is None:
        raise SystemExit(f"attnrb: the environment variable CXX names {named[0]!r}, and there is no such program.")
    if not named and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit(
            "attnrb needs a C++17 compiler to build: install GCC 11 or Clang 13 or newer (Debian and Ubuntu: "
            "`apt install g++`; Fedora: `dnf install gcc-c++`; macOS: `xcode-select --install`), or name one in the "
            "environment variable CXX."
        )
