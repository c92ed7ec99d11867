"""That tests of memory measure the process which they start."""

from __future__ import annotations

from process_memory import printed

_PARENT = """
import process_memory

held = bytearray(512 << 20)
held[::4096] = b"x" * len(held[::4096])
print(process_memory.growth("print(peak())"))
"""


def test_a_large_parent_counts_for_nothing() -> None:
    assert int(printed(_PARENT)) < 256 << 20
