"""A control for re-balancing: as many entries are strengthened as there are outliers, but drawn by chance.

Note: [Sets drawn by chance]
Where a row has c outliers, the control strengthens c other keys that the row sees, its own excepted, the same in every
layer, as outliers are. Which ones is decided by a hash of head, row and key, counted from the text's first token. So a
text gets the same sets alone and in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.policies.base import LayerView, ModelShape, Request
from attnrb.policies.rebalance import Rebalance, RebalancePlan, RebalanceSession

__all__ = ["ShuffledRebalance"]

_MASK = (1 << 31) - 1


@dataclass(frozen=True)
class ShuffledRebalance(Rebalance):
    """`attnrb.Rebalance` with sets of the same sizes, drawn by chance: see Note: [Sets drawn by chance]."""

    name: ClassVar[str] = "shuffled_rebalance"

    def __hash__(self) -> int:
        return hash((type(self), self.label()))

    def label(self) -> str:
        """That of re-balancing, and that sets are shuffled."""
        return f"{super().label()},shuffled sets"

    def resolve(self, shape: ModelShape) -> RebalancePlan:
        """See `attnrb.policies.Policy.resolve`."""
        plan = super().resolve(shape)
        return _ShuffledPlan(self, shape, plan.gains)


class _ShuffledPlan(RebalancePlan):
    def begin(self, request: Request | None = None) -> RebalanceSession:
        return _ShuffledSession(self)


class _ShuffledSession(RebalanceSession):
    __slots__ = ("drawn",)

    def __init__(self, plan: RebalancePlan) -> None:
        super().__init__(plan)
        self.drawn = False

    def emitted(self, layer: int, outliers: Outliers) -> None:
        """See `attnrb.policies.base.Session.emitted`."""
        super().emitted(layer, outliers)
        self.ready, self.drawn = {}, False

    def edit(self, view: LayerView) -> Edit | None:
        """See `attnrb.policies.base.Session.edit`."""
        if self.outliers is not None and not self.drawn:
            self.outliers, self.drawn = drawn_sets(self.outliers, view), True
        return super().edit(view)


def drawn_sets(outliers: Outliers, view: LayerView) -> Outliers:
    """Sets of the same sizes: see Note: [Sets drawn by chance]."""
    visibility, slots = view.scores["visibility"], view.query_slots()
    keys = visibility.key_offset + torch.arange(view.key.shape[2], device=view.device)
    first = _first_slots(view, keys)
    rows, places = slots - first[:, None], keys - first[:, None]  # [B or 1, M] and [B, N], from the first token
    heads = torch.arange(outliers.counts.shape[1], device=view.device)
    noise = _hash(heads[None, :, None, None], rows[:, None, :, None], places[:, None, None, :])
    allowed = (places >= 0)[:, None, None] & (keys < slots[:, None, :, None])
    noise = torch.where(allowed, noise, -1).expand(*outliers.counts.shape, -1)
    most = min(outliers.indices.shape[-1], noise.shape[-1])
    best, order = noise.topk(most, -1)
    taken = (torch.arange(most, device=view.device) < outliers.counts[..., None]) & (best >= 0)
    counts = taken.sum(-1, dtype=torch.int32)
    beyond = int(keys[-1]) + 1
    chosen = torch.where(taken, keys[order], beyond).sort(-1).values
    chosen = torch.where(chosen == beyond, -1, chosen).to(torch.int32)
    return Outliers(chosen.contiguous(), counts)


def _first_slots(view: LayerView, keys: torch.Tensor) -> torch.Tensor:
    """The slot of each text's first token: int64 ``[B]``."""
    visibility = view.scores["visibility"]
    seen = torch.ones(view.rows, len(keys), dtype=torch.bool, device=view.device)
    if visibility.mask is not None:
        mask = visibility.mask.reshape((1,) * (4 - visibility.mask.dim()) + tuple(visibility.mask.shape))
        seen = seen & mask.any(2).any(1)
    if visibility.key_start is not None:
        seen = seen & (keys >= visibility.key_start[:, None])
    return keys[seen.int().argmax(1)]


def _hash(*numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 2³¹ - 1 that look drawn by chance; int64, broadcast."""
    found = torch.zeros((), dtype=torch.int64, device=numbers[0].device)
    for each in numbers:
        found = ((found ^ (each & _MASK)) * 1_103_515_245 + 12_345) & _MASK
        found = ((found ^ (found >> 15)) * 739_982_445) & _MASK
    return found ^ (found >> 12)
