"""The one dense implementation in PyTorch: every option of the ops, any dtype, any device, differentiable.

It serves what the native ops do not: float64 operands (so that `torch.autograd.gradcheck` runs through modules that use
attnrb), weights that someone asks to see, and measures of them. Options come as the structures that the native ops take
(`attnrb.ops.edit`, `attnrb.ops.visibility`, `attnrb.ops.scores`); `attnrb.ops.reference` has the formulas.

Note: [Dense blocks]
A block of queries at a time stands in memory as ``[B, H, rows, N]``, some 4 million weights, so that memory is linear
in N. Where autograd records a call of several blocks, each is computed again in the backward pass, as gradient
checkpointing does. Under the transforms of `torch.func` and in a traced graph all blocks are kept. Operands of 16 bits
are computed with in float32.

Note: [What is not finite]
A NaN in a key must spoil the rows that see it and no other, forward and backward, but products of whole matrices carry
it everywhere as 0 · NaN. So rows of query and key that are not finite are multiplied as zeros, and their scores made
NaN afterwards; values likewise, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnrb.decisions import tell
from attnrb.ops.edit import RULES, EditArguments
from attnrb.ops.library import outlier_capacity
from attnrb.ops.operands import records_gradient, transformed
from attnrb.ops.outliers import Outliers
from attnrb.ops.scores import Scores, promoted
from attnrb.ops.visibility import VisibilityArguments

__all__ = ["Block", "Layer", "attention", "attention_weights", "outlier_mask", "rebalance", "received_attention"]

_BLOCK = 1 << 22  # weights in memory at a time


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scores: Scores,
) -> tuple[Tensor, Tensor, Outliers | None]:
    """Output ``[B, H, M, Dv]``, log-sum-exp ``[B, H, M]``, and the outliers above ``emit`` where it is given."""
    recorded = records_gradient(query, key, value, edit.gain, edit.key_bias, scores.sinks)
    layer = Layer(query, key, edit, visibility, scores)

    def attend(rows: slice) -> tuple[Tensor, ...]:
        block = layer.block(rows)
        weights, lse = layer.edited(block)
        output = layer.weigh(weights, value, block.seen).transpose(1, 2)
        return (output, lse) if emit is None else (output, lse, *layer.outliers(block, emit))

    outputs, lses, *found = zip(*_each_block(layer, attend, recorded), strict=True)
    output = torch.cat(outputs, 1).to(query.dtype).transpose(1, 2)
    outliers = Outliers(torch.cat(found[0], 2), torch.cat(found[1], 2)) if found else None
    return output, torch.cat(lses, 2), outliers


def _each_block(
    layer: Layer, function: Callable[[slice], tuple[Tensor, ...]], recorded: bool
) -> list[tuple[Tensor, ...]]:
    """The function's results for all rows of a layer; where autograd records them, see Note: [Dense blocks]."""
    rows = layer.row_blocks()
    if not recorded or len(rows) == 1:
        return [function(each) for each in rows]
    if transformed() or torch.compiler.is_compiling():
        tell("dense_gradient", "autograd records a transformed or traced call, which keeps them")
        return [function(each) for each in rows]
    tell("dense_gradient", "autograd records a call of several blocks, which computes them again")
    return [checkpoint(function, each, use_reentrant=False, preserve_rng_state=False) for each in rows]


def attention_weights(
    query: Tensor, key: Tensor, edit: EditArguments, visibility: VisibilityArguments, scores: Scores
) -> Tensor:
    """The weights as the layer applies them, ``[B, H, M, N]`` in the dtype of ``query``; 0 for what is not seen."""
    layer = Layer(query, key, edit, visibility, scores)
    return torch.cat([layer.edited(block)[0].to(query.dtype) for block in layer.blocks()], 2)


def received_attention(
    query: Tensor, key: Tensor, edit: EditArguments, visibility: VisibilityArguments, scores: Scores
) -> Tensor:
    """``[B, H, N]``: the mean weight, as applied, that each key receives from the queries that see it; 0 for none."""
    layer = Layer(query, key, edit, visibility, scores)
    recorded = records_gradient(query, key, edit.key_bias, scores.sinks)

    def receive(rows: slice) -> tuple[Tensor]:
        return (layer.edited(layer.block(rows))[0].sum(2),)

    sums = torch.stack([each[0] for each in _each_block(layer, receive, recorded)])
    return sums.sum(0) / layer.onlookers().clamp(min=1)


class Block(NamedTuple):
    """Some rows of a layer: softmax weights before the edit's rule, and what they come from."""

    rows: slice
    seen: Tensor  # bool [B|1, H|1, rows, N]: keys removed by the bias are not seen
    scores: Tensor  # [B, H, rows, N], bias included; -inf for what is not seen, 0 throughout in rows that see nothing
    lse: Tensor  # [B, H, rows, 1], finite in rows that see nothing
    weights: Tensor  # [B, H, rows, N]
    sink: Tensor | None  # [B, H, rows, 1]: the weight of the sink


class Layer:
    """The attention of one layer, block by block: see Note: [Dense blocks]."""

    def __init__(
        self, query: Tensor, key: Tensor, edit: EditArguments, visibility: VisibilityArguments, scores: Scores
    ) -> None:
        self.batch, self.heads, self.queries, _ = query.shape
        self.key_heads, self.keys = key.shape[1], key.shape[2]
        self.dtype, device = promoted(query.dtype), query.device
        self.edit, self.visibility, self.scores = edit, visibility, scores
        self._rule = RULES[edit.rule]
        self._scale = query.shape[3] ** -0.5 if scores.scale is None else scores.scale
        self.query, self._bad_query = _finite_rows(query.to(self.dtype))
        key, bad_key = _finite_rows(key.to(self.dtype))
        self._key = key.transpose(2, 3)
        self._bad_key = bad_key.repeat_interleave(self.heads // self.key_heads, 1)
        first: Tensor | int | None = visibility.query_offset
        if visibility.query_offsets is not None:
            first = visibility.query_offsets.view(-1, 1, 1, 1)
        elif first is None:
            first = visibility.key_offset + self.keys - self.queries
        self._query_slots = torch.arange(self.queries, device=device).view(1, 1, -1, 1) + first
        self.key_slots = torch.arange(self.keys, device=device) + visibility.key_offset
        self._bias = None if edit.key_bias is None else self._bias_of_keys(edit.key_bias)
        self._gain = None if edit.gain is None else edit.gain.to(self.dtype).view(1, -1, 1, 1)

    def blocks(self) -> Iterator[Block]:
        """All rows in turn; one empty block where there are no queries."""
        return map(self.block, self.row_blocks())

    def onlookers(self) -> Tensor:
        """How many queries see each key: int64 ``[B|1, H|1, N]``."""
        return torch.stack([self._visible(rows)[0].sum(2) for rows in self.row_blocks()]).sum(0)

    def edited(self, block: Block) -> tuple[Tensor, Tensor]:
        """The block's weights as applied, ``[B, H, rows, N]``, and their log-sum-exp ``[B, H, rows]``."""
        weights, lse = block.weights, block.lse[..., 0]
        if self._gain is not None:
            weights, grown = self._strengthened(block)
            if grown is not None:
                removed = grown == 0  # every visible key was an outlier, and a gain of -1 took them all
                lse = torch.where(removed, -torch.inf, lse + torch.log(torch.where(removed, 1.0, grown)))
        return weights, torch.where(block.seen.any(-1), lse, -torch.inf)

    def weigh(self, weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """``weights @ value`` ``[B, H, rows, Dv]``: what a row does not see cannot reach it, not even as 0 · NaN."""
        value = value.to(self.dtype)
        finite = torch.isfinite(value)
        output = self._product(weights, torch.where(finite, value, 0.0))
        if torch.compiler.is_compiling() or transformed() or not bool(finite.all()):
            reach = seen.to(self.dtype).expand(weights.shape)
            for spoilt in (torch.nan, torch.inf, -torch.inf):
                there = value.isnan() if spoilt != spoilt else value == spoilt
                output = output + torch.where(self._product(reach, there.to(self.dtype)) > 0, spoilt, 0.0)
        return output

    def outliers(self, block: Block, threshold: float) -> Outliers:
        """Keys other than a query's own whose weight, before the rule, exceeds the threshold."""
        own = self.key_slots == self._query_slots[:, :, block.rows]
        return outlier_rows(above(block.weights.detach(), threshold) & ~own, threshold, self.key_slots)

    def held(self, rows: slice) -> Tensor:
        """Which keys of this layer the edit's outliers name: bool ``[B, H, rows|1, N]``."""
        indices, counts = self.edit.indices, self.edit.counts
        assert indices is not None and counts is not None
        if indices.shape[2] != 1 or self.queries == 1:
            indices, counts = indices[:, :, rows], counts[:, :, rows]
        places = indices.long() - self.visibility.key_offset
        listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
        places = torch.where(listed & (places >= 0) & (places < self.keys), places, self.keys)
        held = torch.zeros(*counts.shape, self.keys + 1, dtype=torch.bool, device=indices.device)
        return held.scatter(3, places, True)[..., : self.keys]

    def block(self, rows: slice) -> Block:
        """These rows."""
        scores = self._product(self.query[:, :, rows], self._key) * self._scale
        if self.scores.softcap:
            scores = self.scores.softcap * torch.tanh(scores / self.scores.softcap)
        scores = scores.masked_fill(self._bad_query[:, :, rows, None] | self._bad_key[:, :, None], torch.nan)
        seen, bias = self._visible(rows)
        if bias is not None:
            scores = scores + bias
        sees_any = seen.any(-1, keepdim=True)
        # A row without keys is computed as one of zeros and hidden later: its own softmax has no gradient but NaN.
        scores = torch.where(sees_any, torch.where(seen, scores, -torch.inf), 0.0)
        top = scores.detach().amax(-1, keepdim=True) if self.keys else scores.sum(-1, keepdim=True)
        sink = None
        if self.scores.sinks is not None:
            score = torch.where(sees_any, self.scores.sinks.to(self.dtype).view(1, -1, 1, 1), 0.0)
            top = torch.maximum(top, score.detach())
            sink = torch.exp(score - top)
        # Relative to the largest score, as a difference from the log-sum-exp would round once more.
        weights = torch.where(seen, torch.exp(scores - top), 0.0)
        total = weights.sum(-1, keepdim=True)
        if sink is not None:
            total = total + sink
        total = torch.where(sees_any, total, 1.0)
        lse = top + torch.log(total)
        weights, sink = weights / total, None if sink is None else sink / total
        return Block(rows, seen, scores, lse, weights, sink)

    def _strengthened(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """The weights after the rule, and what the sum of a row's exponentials grew by, where the rule counts that."""
        assert self._gain is not None
        weights = block.weights
        held = block.seen if self.edit.indices is None else self.held(block.rows)
        if self._rule == "none":
            return torch.where(held, weights * (1 + self._gain), weights), None
        # The rest is summed itself: as 1 - mass it would cancel.
        mass = torch.where(held, weights, 0.0).sum(-1, keepdim=True)
        rest = torch.where(held, 0.0, weights).sum(-1, keepdim=True)
        if block.sink is not None:
            rest = rest + block.sink
        if self._rule == "row":
            total = rest + (1 + self._gain) * mass
            total = torch.where(block.seen.any(-1, keepdim=True), total, 1.0)
            boosted = torch.where(held, weights * (1 + self._gain), weights)
            return boosted / torch.where(total == 0, 1.0, total), total[..., 0]
        alone = rest == 0
        # (1 - (1 + g) m) / (1 - m), as m and the rest sum to 1
        others = 1 - self._gain * mass / torch.where(alone, 1.0, rest)
        return weights * torch.where(alone, 1.0, torch.where(held, 1 + self._gain, others)), None

    def row_blocks(self) -> list[slice]:
        """All rows, some at a time."""
        step = max(1, _BLOCK // max(1, self.batch * self.heads * self.keys))
        return [slice(row, min(row + step, self.queries)) for row in range(0, max(self.queries, 1), step)]

    def _visible(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """What the rows see, bool ``[B|1, H|1, rows, N]``, and what their scores gain by the bias, finite or NaN."""
        seen = self._seen(rows)
        if self._bias is None:
            return seen, None
        first, own, bias = self.edit.first_query, self._query_slots[:, :, rows], self._bias[:, :, None]
        holds = torch.ones_like(own, dtype=torch.bool) if first is None else own >= first.view(-1, 1, 1, 1)
        removed = holds & (bias == -torch.inf)
        return seen & ~removed, torch.where(holds & ~removed, bias, 0.0)

    def _seen(self, rows: slice) -> Tensor:
        """What the rows see by position and mask: bool ``[B|1, H|1, rows, N]``."""
        see, slot, own = self.visibility, self.key_slots, self._query_slots[:, :, rows]
        seen = torch.ones((1, 1, rows.stop - rows.start, self.keys), dtype=torch.bool, device=slot.device)
        start = None if see.key_start is None else see.key_start.view(-1, 1, 1, 1)
        if see.causal:
            seen = seen & (slot <= own)
        if see.window:
            seen = seen & (slot > own - see.window)
        if see.chunk:
            origin = 0 if start is None else start
            seen = seen & ((slot - origin) // see.chunk == (own - origin) // see.chunk)
        if start is not None:
            seen = seen & (slot >= start)
        if see.key_end is not None:
            seen = seen & (slot < see.key_end.view(-1, 1, 1, 1))
        if see.mask is not None:
            per_row = see.mask.dim() >= 2 and see.mask.shape[-2] != 1
            seen = seen & (see.mask[..., rows, :] if per_row else see.mask)
        return seen

    def _bias_of_keys(self, bias: Tensor) -> Tensor:
        """The bias of the keys that this layer holds, ``[B|1, H|1, N]``: 0 at slots that it does not reach."""
        beyond = bias.shape[2]
        return torch.nn.functional.pad(bias.to(self.dtype), (0, 1))[..., self.key_slots.clamp(max=beyond)]

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """``[B, H, rows, X] @ [B, Hk, X, Y]``: each head's rows by the matrix of its key head."""
        batch, heads, count, inner = rows.shape
        grouped = rows.reshape(batch, self.key_heads, heads // self.key_heads * count, inner)
        with torch.autocast(rows.device.type, enabled=False):  # which would round the operands
            product = grouped @ matrix
        return product.reshape(batch, heads, count, matrix.shape[-1])


def outlier_rows(chosen: Tensor, threshold: float, slots: Tensor) -> Outliers:
    """A mask ``[B, H, M, N]`` over keys at ``slots [N]`` as rows of ascending slots (Note: [Outlier capacity])."""
    keys = chosen.shape[3]
    # torch 2.10 traces no sym_min of two plain numbers; a compiler makes one of min where a length is a symbol.
    most = _capacity(threshold)
    capacity = min(most, keys) if type(keys) is int else torch.sym_min(most, keys)  # type: ignore[no-untyped-call]
    last = torch.iinfo(torch.int32).max
    # More than the capacity only where rounding pushed a row's sum above 1.
    indices = torch.where(chosen, slots, last).sort(-1).values[..., :capacity]
    counts = chosen.sum(-1).clamp(max=capacity)
    return Outliers(torch.where(indices == last, -1, indices).to(torch.int32), counts.to(torch.int32))


def above(weights: Tensor, threshold: float) -> Tensor:
    """Which weights exceed the threshold as the number that it is; PyTorch would round it to their dtype first."""
    wide = weights.to(promoted(weights.dtype))
    return wide > (threshold if wide.dtype == torch.float64 else _not_above(threshold))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _not_above(threshold: float) -> float:
    """The largest number of float32 that is not above the threshold."""
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capacity(threshold: float) -> int:
    return outlier_capacity(threshold)


def outlier_mask(weights: Tensor, threshold: float, query_offset: int) -> Tensor:
    """Entries above the threshold that are not the query's own; ``weights [B, H, M, N]``."""
    queries, keys = weights.shape[2:]
    own = torch.arange(queries, device=weights.device)[:, None] + query_offset
    return (above(weights, threshold) & (torch.arange(keys, device=weights.device) != own)).contiguous()


def rebalance(weights: Tensor, mask: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    """Marked entries times 1 + gain, ``[1]`` or ``[H]``; each row divided by its new sum if ``normalize``."""
    boosted = torch.where(mask, weights * (1 + gain.reshape(-1, 1, 1)), weights)
    if not normalize:
        return boosted
    total = boosted.sum(-1, keepdim=True)
    return boosted / torch.where(total == 0, 1.0, total)


def _finite_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., D]`` with zeros for rows that are not finite, and which those are, bool ``[...]``."""
    bad = ~torch.isfinite(rows).all(-1)
    return torch.where(bad[..., None], 0.0, rows), bad
