"""The peak of this process's resident set (Linux), so that what one call needs can be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that the resident set grew by at most while ``call`` ran, and what it returned."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    kept = call()
    return _resident("VmHWM") - before, kept


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status says nothing of {field}")
