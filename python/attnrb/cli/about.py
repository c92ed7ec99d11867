"""What this installation of attnrb is and what it runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from attnrb import __version__
from attnrb.models import ModelError, cache_folder, default_model_path
from attnrb.ops import _native, library


def about() -> dict[str, Any]:
    """Versions, instruction set found and chosen, threads and build options, JSON-ready. What is absent is None."""
    try:
        embedded: str | None = str(default_model_path())
    except ModelError:
        embedded = None
    cache = cache_folder()
    return {
        "attnrb": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": package_version("transformers"),
        "machine": f"{platform.system()} {platform.machine()}",
        "instruction_set": library.instruction_set(),
        "instruction_sets_found": library.instruction_sets(),
        "ATTNRB_CPU": os.environ.get("ATTNRB_CPU", "not set"),
        "cuda": _cuda(),
        "cuda_prefill": _cuda_prefill(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "build": library.build_options(),
        "default_model": embedded,
        "cache": "off" if cache is None else str(cache),
    }


def _cuda() -> str:
    if not _native.cuda_library().is_file():
        return "off: attnrb was built without the CUDA ops"
    if torch.version.cuda is None:
        return "off: this torch has no CUDA"
    if not torch.cuda.is_available():
        return "loaded, but torch finds no device"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return "on: " + ", ".join(f"{device.name} ({device.major}.{device.minor})" for device in devices)


def _cuda_prefill() -> str | None:
    """Whose kernels compute a long prompt's dense part (docs/cuda.md); None without a device."""
    if not _cuda().startswith("on"):
        return None
    kernels = _native.library_kernels()
    if not kernels:
        return "attnrb's own kernels: those of PyTorch are turned off"
    gradients = ", its gradients by flash" if {"flash", "cuDNN"} & {*kernels} else ""
    return (
        f"PyTorch's {' or '.join(kernels)} kernel for 16-bit plain or causal attention{gradients}; else attnrb's own, "
        "and so wherever there is a key bias or rule rest"
    )


def package_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
