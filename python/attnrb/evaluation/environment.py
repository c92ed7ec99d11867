"""What a run depends on and cannot be seen in its options: versions, the state of the sources, the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "peak_memory"]

_PACKAGES = (
    "transformers",
    "tokenizers",
    "lm_eval",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
    "statsmodels",
    "optuna",
)


def environment() -> dict[str, Any]:
    """Versions, git state, machine, threads; JSON-ready. What is absent is None."""
    from attnrb import __version__
    from attnrb.ops import library

    return {
        "attnrb": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instruction_set": library.instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": [*_program(), *sys.argv[1:]],
    }


def peak_memory() -> dict[str, int]:
    """Bytes that this process held at most: ``resident``, and ``cuda`` where there is a device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def _program() -> list[str]:
    program = Path(sys.argv[0])
    return ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]


def _git() -> str | None:
    """The commit of the checkout that this package is used from, with ``-dirty`` where files differ from it."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie within someone else's checkout
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        return platform.processor() or None
    return names[0] if names else platform.processor() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
