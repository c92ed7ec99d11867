"""A fault that mutate.py plants."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str  # under cuda/
    old: str  # occurs there once
    new: str
    unit: str = "float32.cu"  # the source in which it shows
