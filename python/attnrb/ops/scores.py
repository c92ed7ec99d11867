"""How a product of query and key becomes a score."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrb.ops.visibility import describe

__all__ = ["DEFAULT_SCORES", "OLDER_OPTIONS", "Scores", "promoted", "score_arguments"]

# What the ops of the first release take by position, after arguments of their own.
OLDER_OPTIONS = (
    *("causal", "query_offset", "key_offset", "window", "key_start", "key_end", "mask"),
    *("scale", "softcap", "sinks"),
)


class Scores(NamedTuple):
    """As the ops take it, under the names of their arguments: ``softcap · tanh(scale · query · key / softcap)``."""

    scale: float | None = None
    """None: ``1 / sqrt(D)``."""
    softcap: float = 0.0
    """0: none."""
    sinks: Tensor | None = None
    """``[H]``: one more score of each row, in the softmax denominator only."""

    def for_older_ops(self, width: int) -> tuple[Any, ...]:
        """In the order of the ops of the first release, for queries of this width."""
        return width**-0.5 if self.scale is None else self.scale, self.softcap, self.sinks


DEFAULT_SCORES = Scores()


def score_arguments(scale: float | None, softcap: float | None, sinks: Tensor | None) -> Scores:
    """What an op is told; `DEFAULT_SCORES` where nothing is given.

    Raises:
        TypeError: ``sinks`` is no floating-point tensor.
    """
    if sinks is None:
        return DEFAULT_SCORES if scale is None and not softcap else Scores(scale, softcap or 0.0)
    if not (isinstance(sinks, Tensor) and sinks.is_floating_point()):
        raise TypeError(f"sinks: expected a floating-point tensor [H], got {describe(sinks)}")
    return Scores(scale, softcap or 0.0, sinks)


def promoted(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for operands of this dtype: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
