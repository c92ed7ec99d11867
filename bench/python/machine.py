"""What a stored result has to say about where it came from."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

# What decides which kernels run, here and in PyTorch.
_TELLING_FLAGS = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)


def processor() -> tuple[str, list[str]]:
    """The model name of the processor and its vector extensions, as Linux tells them."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            label, _, text = line.partition(":")
            if label.strip() == "model name":
                name = text.strip()
            elif label.strip() in ("flags", "Features"):
                flags = set(text.split())
    return name, [flag for flag in _TELLING_FLAGS if flag in flags]


def describe() -> dict[str, Any]:
    """Machine, versions and command, for the head of a JSON file. Call it once torch's threads are set."""
    import torch
    from attnrb import __version__
    from attnrb.ops import library

    name, flags = processor()
    return {
        "machine": {
            "processor": name,
            "extensions": flags,
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"attnrb": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "instruction_set": {"attnrb": library.instruction_set(), "torch": torch.backends.cpu.get_cpu_capability()},
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def headline(description: dict[str, Any]) -> str:
    machine, versions, sets = description["machine"], description["versions"], description["instruction_set"]
    return (
        f"{machine['processor']}, {description['threads']} of {machine['cores']} cores; attnrb {versions['attnrb']} "
        f"({sets['attnrb']}), torch {versions['torch']} ({sets['torch']})"
    )
