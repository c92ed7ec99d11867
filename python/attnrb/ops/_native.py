"""Importing this module loads the native library, so that ``torch.ops.attnrb`` can be used."""

from __future__ import annotations

import sys
from pathlib import Path

from attnrb.decisions import tell

_OLDEST_TORCH = (2, 10)
_REMEDY = "run `pip install 'torch>=2.10'`."


def _load() -> None:
    """Registers the native ops with torch.

    Raises:
        ImportError: torch is missing or older than 2.10, or the native library is missing or does not load. The message
            says what to do.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(f"attnrb needs torch, which is not installed: {_REMEDY}") from error
    from attnrb.ops.torch_version import TORCH_VERSION

    if TORCH_VERSION < _OLDEST_TORCH:
        raise ImportError(
            f"attnrb needs torch 2.10 or newer, this is torch {torch.__version__}: run `pip install 'torch>=2.10'`."
        )

    if not library().is_file():
        raise ImportError(
            f"attnrb's native library is missing, there is no {library()}: this is perhaps a source tree that was "
            "never installed. Run `pip install .` in it, or leave the tree to import an installed attnrb."
        )
    _load_into_torch(library())
    # Beside a torch without CUDA it would be of no use: no tensor would reach it.
    if torch.version.cuda is None:
        return
    if cuda_library().is_file():
        _load_into_torch(cuda_library())
        _warn_of_driver(cuda_library())
    else:
        tell("no_cuda_ops", "torch has CUDA, but attnrb was built without the CUDA ops")


def _load_into_torch(path: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"attnrb's native library {path} does not load into torch {torch.__version__}: {error}. Build it again "
            "here: run `pip install --force-reinstall --no-deps .` in attnrb's source tree."
        ) from error


def _warn_of_driver(path: Path) -> None:
    """Says at once what a driver older than the library's CUDA runtime would otherwise say at the first op."""
    import ctypes
    import warnings

    problem = ctypes.CDLL(str(path)).attnrb_driver_problem
    problem.restype = ctypes.c_char_p
    text = problem()
    if text is not None:
        warnings.warn(text.decode(), RuntimeWarning, stacklevel=2)


def library() -> Path:
    """Where the native library is. In an editable install it is not beside this file."""
    return _place("libattnrb.so")


def cuda_library() -> Path:
    """Where the CUDA ops are, if this attnrb was built with them."""
    return _place("libattnrb_cuda.so")


def has_cuda_ops() -> bool:
    """Whether CUDA tensors have native ops here."""
    import torch

    return torch.version.cuda is not None and cuda_library().is_file()


def library_kernels() -> list[str]:
    """Whose kernels of PyTorch may compute the dense part of long prompts on CUDA; none where all are turned off."""
    import torch

    switches = {
        "flash": "flash_sdp_enabled",
        "cuDNN": "cudnn_sdp_enabled",
        "memory-efficient": "mem_efficient_sdp_enabled",
    }
    return [name for name, switch in switches.items() if getattr(torch.backends.cuda, switch)()]


def _place(name: str) -> Path:
    # Of the folders that the package is spread over: its sources, and in an editable install what was built.
    places = [Path(folder, name) for folder in sys.modules["attnrb"].__path__]
    return next((place for place in places if place.is_file()), places[0])


_load()
