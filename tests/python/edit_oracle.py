"""Edited attention for whole models, the slow and obvious way: an oracle that shares no code with attnrb.

It puts an attention function of its own into transformers that builds every n×n matrix in float64 and hands the scores
to a function of the test, which says what the weights are. Masks are those of transformers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from dense_oracle import slot_mask
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

_NAME = "edit_oracle"


@dataclass
class Scores:
    """One layer's scores, as a test's function sees them."""

    layer: int
    table: Tensor
    """float64 ``[B, H, M, N]``; -inf where a query does not see a key."""
    sink: Tensor | None
    """float64 ``[1, H, 1, 1]``."""
    query_slots: Tensor
    key_slots: Tensor

    def softmax(self, bias: Tensor | float = 0.0) -> Tensor:
        """The weights with something added to the scores; rows that see no key have none."""
        return self._with_sink(bias)[..., : self.table.shape[3]]

    def sink_share(self, bias: Tensor | float = 0.0) -> Tensor:
        """The share ``[B, H, M, 1]`` of each row that goes to the sink."""
        return self._with_sink(bias)[..., self.table.shape[3] :].sum(3, keepdim=True)

    def _with_sink(self, bias: Tensor | float) -> Tensor:
        table = self.table + bias
        if self.sink is not None:
            table = torch.cat([table, self.sink.expand(*table.shape[:3], 1)], dim=3)
        # A row that sees nothing would be NaN, and so would every gradient.
        sees = (table > -torch.inf).any(3, keepdim=True)
        return torch.where(sees, torch.softmax(torch.where(sees, table, 0.0), dim=3), 0.0)

    def at_keys(self, by_slot: Tensor) -> Tensor:
        """What ``[rows, heads or 1, slots]`` says of this layer's keys: ``[B, heads or 1, 1, N]``, 0 behind its slots.

        A batch of several times as many rows takes each as often.
        """
        rows = by_slot.repeat_interleave(self.table.shape[0] // by_slot.shape[0], dim=0)
        held = self.key_slots < rows.shape[2]
        found = torch.zeros(*rows.shape[:2], len(self.key_slots), dtype=rows.dtype)
        found[..., held] = rows[..., self.key_slots[held]]
        return found[:, :, None]

    def rows_from(self, first: Tensor | None) -> Tensor:
        """Bool ``[B, 1, M, 1]``: the queries at slots from ``first`` ``[rows]`` on; None: all."""
        if first is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool)
        first = first.repeat_interleave(self.table.shape[0] // first.shape[0])
        return (self.query_slots >= first[:, None])[:, None, :, None]


Rewrite = Callable[[Scores], Tensor]


@contextmanager
def attached(model: Any, rewrite: Rewrite) -> Iterator[dict[int, Tensor]]:
    """Run ``model`` inside the block with the weights ``[B, H, M, N]`` that ``rewrite`` returns.

    Yields:
        The weights of each layer in the last forward.
    """
    applied: dict[int, Tensor] = {}

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        keys = key.shape[2]
        first_query, first_key = attention_mask._slots
        groups = query.shape[1] // key.shape[1]
        k, v = (each.double().repeat_interleave(groups, dim=1) for each in (key, value))
        table = query.double() @ k.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            table = softcap * torch.tanh(table / softcap)
        table = table.masked_fill(~attention_mask[..., :keys], -torch.inf)
        sink = None if s_aux is None else s_aux.double().reshape(1, -1, 1, 1)
        query_slots, key_slots = first_query + torch.arange(query.shape[2]), first_key + torch.arange(keys)
        weights = rewrite(Scores(module.layer_idx, table, sink, query_slots, key_slots))
        applied[module.layer_idx] = weights.detach()
        return (weights @ v).transpose(1, 2).to(query.dtype).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, slot_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield applied
    finally:
        model.set_attn_implementation(before)


def biased(bias: Tensor, first: Tensor | None = None, heads: Mapping[int, tuple[int, ...]] | None = None) -> Rewrite:
    """Weights with a bias on keys.

    Args:
        bias: ``[rows, 1, slots]``, added to the scores.
        first: ``[rows]``: slot of the first query that has it; None: all.
        heads: of each layer those that have it; None: all.
    """

    def rewrite(scores: Scores) -> Tensor:
        heed = torch.ones(scores.table.shape[1], dtype=torch.bool)
        if heads is not None:
            heed[:] = False
            heed[list(heads.get(scores.layer, ()))] = True
        where = scores.rows_from(first) & heed[None, :, None, None]
        return scores.softmax(torch.where(where, scores.at_keys(bias.double()), 0.0))

    return rewrite
