"""The outlier set: which keys each query really attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Outliers(NamedTuple):
    """The outliers of every attention row, as `attnrb.functional.source_attention` finds them.

    A softmax row sums to 1, so fewer than ``1 / threshold`` entries can exceed the threshold. A row therefore has a
    fixed capacity ``C = min(ceil(1 / threshold) - 1, N)``: static shapes, linear memory and nothing ever cut off.

    Attributes:
        indices: int32 ``[B, H, M, C]``: in each row first the slots of its outliers, ascending, then -1. Slots are
            cache positions, not tensor positions: a layer that caches fewer keys skips those it does not hold.
        counts: int32 ``[B, H, M]``: how many of a row's C entries are outliers.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    def __repr__(self) -> str:
        return f"Outliers(indices {list(self.indices.shape)}, counts {list(self.counts.shape)})"
