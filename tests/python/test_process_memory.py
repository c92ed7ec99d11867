"""That tests of memory measure the process which they start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PARENT = """
import process_memory

held = bytearray(512 << 20)
held[::4096] = b"x" * len(held[::4096])
print(process_memory.growth("print(peak())"))
"""


def test_a_large_parent_counts_for_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _PARENT], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 256 << 20
