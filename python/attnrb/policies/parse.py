"""Options of policies as people write them: on a command line, in one line of text."""

from __future__ import annotations

import re

__all__ = ["parse_layers"]


def parse_layers(text: str) -> list[int]:
    """Layer numbers of a list like ``1-12,15``, ascending. Raises ValueError for anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None:
            raise ValueError(f"layers: expected numbers and ranges like 1-12,15, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"layers: the range {part.strip()} runs backwards")
        layers.update(range(first, last + 1))
    return sorted(layers)
