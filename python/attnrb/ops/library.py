"""What the native library says of itself: how it was built, what it runs on, and the memory that it keeps.

Each function here calls a C function of the library (`csrc/about.cpp`) by `ctypes`. The library therefore needs nothing
of Python's, and one wheel serves every version of it.
"""

from __future__ import annotations

import ctypes
from functools import cache

from attnrb.ops._native import library

__all__ = [
    "build_options",
    "instruction_set",
    "instruction_sets",
    "outlier_capacity",
    "release_scratch",
    "scratch_bytes",
    "version",
]

_LISTS = ("instruction_sets", "cuda_targets")

_library = ctypes.CDLL(str(library()))
for _name, _result, *_arguments in (
    ("build_options", ctypes.c_char_p),
    ("instruction_set", ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)),
    ("instruction_sets", ctypes.POINTER(ctypes.c_char_p)),
    ("outlier_capacity", ctypes.c_int64, ctypes.c_double),
    ("scratch_bytes", ctypes.c_size_t),
    ("release_scratch", None),
):
    _function = getattr(_library, f"attnrb_{_name}")
    _function.restype, _function.argtypes = _result, _arguments


def build_options() -> dict[str, str | list[str]]:
    """Version, compiler, build type, instruction sets, nvcc and its targets, torch's headers, oldest torch served.

    ``cuda`` is the version of nvcc and ``cuda_targets`` the architectures; both are empty without the CUDA ops.
    """
    lines = (line.partition(" ") for line in _library.attnrb_build_options().decode().split("\n"))
    return {name: value.split() if name in _LISTS else value for name, _, value in lines}


@cache
def version() -> str:
    """The version of attnrb that the library was built as."""
    return str(build_options()["version"])


def instruction_set() -> str:
    """The instruction set in use: the best one, or the one that the environment variable ``ATTNRB_CPU`` names.

    Raises:
        ValueError: ``ATTNRB_CPU`` names one that this build or this processor does not have.
    """
    error = ctypes.c_char_p()
    name = _library.attnrb_instruction_set(ctypes.byref(error))
    if name is None:
        raise ValueError((error.value or b"").decode())
    return str(name.decode())


def instruction_sets() -> list[str]:
    """The instruction sets that this build and this processor both have, lowest first."""
    found: list[str] = []
    names = _library.attnrb_instruction_sets()
    while names[len(found)] is not None:
        found.append(names[len(found)].decode())
    return found


def outlier_capacity(threshold: float) -> int:
    """The most outliers a row can have: ``ceil(1 / threshold) - 1``.

    Raises:
        ValueError: `threshold` is not in (0, 1).
    """
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold: expected a number in (0, 1), got {threshold}")
    return int(_library.attnrb_outlier_capacity(threshold))


def scratch_bytes() -> int:
    """Bytes of working memory that the library keeps for the next call."""
    return int(_library.attnrb_scratch_bytes())


def release_scratch() -> None:
    """Free the working memory that the library keeps for the next call."""
    _library.attnrb_release_scratch()
