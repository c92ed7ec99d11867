"""How a product of query and key becomes a score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnrb.ops.visibility import describe

__all__ = ["Scores", "score_arguments"]


class Scores(NamedTuple):
    """As the ops take it, under the names of their arguments: ``softcap · tanh(scale · query · key / softcap)``."""

    scale: float
    softcap: float = 0.0
    """0: none."""
    sinks: Tensor | None = None
    """``[H]``: one more score of each row, in the softmax denominator only."""


def score_arguments(query: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None) -> Scores:
    """The scores of ``query [B, H, M, D]``; a ``scale`` of None is ``1 / sqrt(D)``.

    Raises:
        TypeError: ``sinks`` is no floating-point tensor.
    """
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_floating_point()):
        raise TypeError(f"sinks: expected a floating-point tensor [H], got {describe(sinks)}")
    if scale is None:
        width = query.size(-1)
        scale = width**-0.5 if width > 0 else 1.0  # the op refuses a width of 0 by name
    return Scores(scale, softcap or 0.0, sinks)


def promoted(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for operands of this dtype: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
