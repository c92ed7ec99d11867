"""How much the memory of a process grows, measured in a process of its own: a peak never falls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The programs below begin with this.
_PEAK = """
import pathlib, resource, sys

def peak():
    # On Linux ru_maxrss begins with that of the process that started this one, which may be larger.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""


def printed(program: str, *arguments: object) -> str:
    """What a program prints, which has `peak()` in bytes, `sys.argv` and the modules beside this one."""
    ran = subprocess.run(
        [sys.executable, "-c", _PEAK + program, *map(str, arguments)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def growth(program: str, *arguments: object) -> int:
    """The bytes that a program prints."""
    return int(printed(program, *arguments))
