"""What one layer's attention looks like, from the ops alone: no n×n matrix at any time.

Note: [Measuring attention]
Write w_ij for the weights that a layer applies (softmax weights A_ij = e^{s_ij − LSE_i}, those of the source layer's
outliers S times 1 + g), T_i = Σ_j w_ij and p_ij = w_ij / T_i. Attention is linear in its values, so one pass of
`source_attention` over the columns

    v_j = (1, [j = 0], slot of j, [token j is of class c] for every c, k_j)

returns all row sums of A that are needed, beside LSE_i and the layer's own outliers. What a gain adds to them is a sum
over the outliers in S, few in every row. From the sums of w:

    first key       p_i0                          its mean leaves out query 0, which sees no other key
    token class     Σ_{j of class c} p_ij
    mean distance   slot of i − Σ_j p_ij · slot of j
    entropy         −Σ_j p_ij ln p_ij = LSE_i + ln T_i − Σ_j p_ij s_ij − ln(1 + g) Σ_{j ∈ S} p_ij,   in nats
                    where Σ_j p_ij s_ij = scale · q_i · Σ_j p_ij k_j

What a key receives, Σ_i w_ij over the number of queries that see it, is `received_attention` and, once more, a sum
over S. Two cases are not linear in that way: a softcap bends s_ij, and normalised rows have a divisor each. There the
weights are computed for a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnrb.hosts.session import AttentionCall
from attnrb.ops import dense, functional
from attnrb.ops.edit import NO_EDIT
from attnrb.ops.outliers import Outliers
from attnrb.ops.scores import score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments
from attnrb.text.classes import TOKEN_CLASSES

Floats = NDArray[np.float64]

_ENTRIES = 1 << 17  # outliers whose queries, keys and values are gathered at a time


@dataclass(frozen=True)
class LayerSums:
    """Sums over the queries of one text in one layer, each ``[H]``, so that texts can be added up."""

    queries: int
    entropy: Floats
    first_key: Floats
    """Over all queries but the first."""
    mean_distance: Floats
    outlier_share: Floats
    """Attention on the source layer's outliers; NaN in layers before it."""
    token_class: Floats
    """``[classes, H]``, in the order of `TOKEN_CLASSES`."""
    outliers: Floats
    """How many outliers the layer has by itself."""
    received: Floats
    """``[H, n]``: the mean weight that each key receives from the queries that see it."""
    share: Floats
    """``[H, n]``: the share of all weights that each key receives."""
    on_source: Floats
    """``[n]``: attention of each query on the source layer's outliers, mean over the heads; NaN in layers before it."""


class Entries(NamedTuple):
    """Places in one text's attention: head, query and key of each, int64 ``[E]``."""

    head: Tensor
    query: Tensor
    key: Tensor

    def at(self, chosen: Tensor | slice) -> Entries:
        return Entries(self.head[chosen], self.query[chosen], self.key[chosen])

    def to(self, device: torch.device) -> Entries:
        """On this device: the layers of a model may be on several."""
        return Entries(*(each.to(device) for each in self))

    def codes(self, keys: int) -> Tensor:
        """One number for each place, ascending as the places are: int64 ``[E]``."""
        return (self.head << 42) + self.query * keys + self.key


def entries(outliers: Outliers) -> Entries:
    """The places in an outlier set of one text whose keys all stand in the tensor, so that slots are positions."""
    head, query, place = (outliers.indices[0] >= 0).nonzero(as_tuple=True)
    return Entries(head, query, outliers.indices[0, head, query, place].long())


def among(codes: Tensor, others: Tensor) -> Tensor:
    """Which of ``codes [E]`` are in ``others``; both ascend, which makes this several times as fast as a sort."""
    if not len(others):
        return torch.zeros_like(codes, dtype=torch.bool)
    place = torch.searchsorted(others, codes).clamp(max=len(others) - 1)
    return others[place] == codes


def measure(
    call: AttentionCall, classes: Tensor, threshold: float, source: Entries | None, is_source: bool
) -> tuple[LayerSums, Entries]:
    """Measure one layer: see Note: [Measuring attention].

    Args:
        call: the layer's attention over one whole text: B = 1 and M = N = n, without a cache.
        classes: int64 ``[n]``: index in `TOKEN_CLASSES` of each token.
        threshold: weight above which an entry is an outlier, between 0 and 1.
        source: the source layer's outliers, as measured there; None up to and including that layer.
        is_source: whether this is the source layer.

    Returns:
        The sums, and the layer's own outliers: the entries of other keys than the query's own whose weight, as the
        layer applies it, exceeds the threshold. In the source layer they are those that re-balancing found.
    """
    return _Layer(call, classes, threshold, source).measure(is_source)


def seen_by(call: AttentionCall) -> Tensor:
    """How many queries see each key in a layer's attention over a whole text, at least 1: float64 ``[1 or H, n]``."""
    return _Layer(call, torch.zeros(call.query.shape[2], dtype=torch.int64, device="cpu"), 0.5, None)._seen_by()


class _Layer:
    """One layer's attention in float32, whatever the model computes in, with the sums that every measure needs."""

    def __init__(self, call: AttentionCall, classes: Tensor, threshold: float, source: Entries | None) -> None:
        self.query, self.key = call.query.float(), call.key.float()
        self.scores, self.threshold = dict(call.scores), threshold
        self.softcap = self.scores["softcap"] or 0.0
        self.scale = self.query.shape[-1] ** -0.5 if self.scores["scale"] is None else self.scores["scale"]
        self.heads, self.length = self.query.shape[1], self.query.shape[2]
        self.groups = self.heads // self.key.shape[1]
        self.slots = torch.arange(self.length, device=self.query.device)
        strengthened = call.gain is not None
        self.boost_all = strengthened and call.outliers is None
        self.normalize = strengthened and call.normalize
        # Where every entry grows alike and rows are divided by their sums, nothing changes.
        self.gain = None if self.boost_all and self.normalize else call.gain
        self.known = entries(call.outliers) if source is None and call.outliers is not None else None
        self.source = None if source is None else self._visible(source.to(self.query.device))
        columns = torch.zeros(self.length, 3 + len(TOKEN_CLASSES), dtype=torch.float32, device=self.query.device)
        columns[:, 0] = 1
        columns[0, 1] = 1
        columns[:, 2] = self.slots
        columns[self.slots, 3 + classes.to(self.query.device)] = 1
        columns = columns.expand(1, self.key.shape[1], -1, -1)
        self.columns = columns.shape[-1]
        self.values = torch.cat([columns, self.key], dim=-1)

    def measure(self, is_source: bool) -> tuple[LayerSums, Entries]:
        output, lse, found = functional.source_attention(
            self.query, self.key, self.values, threshold=self._candidate_threshold(), **self.scores
        )
        self.lse = lse[0]
        sums = output[0].contiguous()
        strengthened, z = self._strengthen(sums)
        own = self._own_outliers(entries(found), strengthened, z)
        if is_source:
            own = self.source = own if self.known is None else self.known

        total = sums[..., 0]
        received = self._received(strengthened, z)
        column = received * self._seen_by().cpu().numpy()
        on_source = torch.full_like(total, math.nan)
        if self.source is not None:
            places = self.source
            weights = strengthened.weights if strengthened is not None else self._weights(places)
            on_source = self._row_total(places, self._grown(places, weights)) / total
        classes = sums[..., 3 : self.columns] / total[..., None]
        return (
            LayerSums(
                queries=self.length,
                entropy=_over_queries(self._entropy(sums, total, strengthened)),
                first_key=_over_queries((sums[..., 1] / total)[:, 1:]),
                mean_distance=_over_queries(self.slots - sums[..., 2] / total),
                outlier_share=_over_queries(on_source),
                token_class=_over_queries(classes).T,
                outliers=torch.bincount(own.head, minlength=self.heads).double().cpu().numpy(),
                received=received,
                share=column / column.sum(1, keepdims=True),
                on_source=np.asarray(on_source.mean(0).double().cpu().numpy()),
            ),
            own,
        )

    def _candidate_threshold(self) -> float:
        """A threshold on softmax weights that every outlier of the strengthened weights exceeds."""
        if self.gain is None:
            return self.threshold
        gain = self.gain.double()
        most, least = 1 + max(float(gain.max()), 0.0), 1 + min(float(gain.min()), 0.0)
        # A row's new sum lies between 1 and 1 + g. A little lower still, for roundings.
        least_sum = max(least, 0.01) if self.normalize else 1.0
        return 0.9999 * self.threshold * least_sum / most

    def _strengthen(self, sums: Tensor) -> tuple[_Strengthened | None, Tensor | None]:
        """Add what the gain does to the row sums, in place; the outliers' softmax weights, and the rows' divisors."""
        if self.gain is None:
            return None, None
        gain = self.gain[:, None]
        if self.boost_all:
            sums *= 1 + gain[..., None]
            return None, None
        places = self.source
        assert places is not None, "the source layer runs before the layers that its outliers are strengthened in"
        weights = self._weights(places)
        flat = sums.view(self.heads * self.length, -1)
        for part in _parts(len(weights)):
            head, query, key = places.at(part)
            values = self.values[0, head // self.groups, key]
            flat.index_add_(0, head * self.length + query, values * (weights[part] * self.gain[head])[:, None])
        strengthened = _Strengthened(places, weights)
        return strengthened, 1 + gain * self._row_total(places, weights) if self.normalize else None

    def _own_outliers(self, found: Entries, strengthened: _Strengthened | None, z: Tensor | None) -> Entries:
        """Those of the candidates whose applied weight exceeds the threshold."""
        if self.gain is None:
            return found
        weights = self._weights(found)
        factor = 1 + self.gain[found.head]
        if strengthened is not None:
            chosen = among(found.codes(self.length), strengthened.places.codes(self.length))
            factor = torch.where(chosen, factor, 1.0)
        if z is not None:
            factor = factor / z[found.head, found.query]
        return found.at(weights * factor > self.threshold)

    def _entropy(self, sums: Tensor, total: Tensor, strengthened: _Strengthened | None) -> Tensor:
        """Float64 ``[H, n]``. NaN where a gain of -1 or less left no distribution."""
        total = total.double()
        if self.softcap:
            score = self._bent_scores(strengthened) / total
        else:
            score = self.scale * (self.query[0].double() * sums[..., self.columns :].double()).sum(-1) / total
        entropy = self.lse.double() + total.log() - score
        if self.gain is not None:
            grown = total
            if strengthened is not None:
                places, weights = strengthened
                grown = self._row_total(places, self._grown(places, weights)).double()
            entropy -= torch.log1p(self.gain.double())[:, None] * grown / total
        return entropy

    def _bent_scores(self, strengthened: _Strengthened | None) -> Tensor:
        """Σ_j w_ij s_ij, float64 ``[H, n]``, where a softcap makes it not linear in the keys."""
        result = torch.empty(self.heads, self.length, dtype=torch.float64, device=self.query.device)
        for block in self._dense().blocks():
            scores = block.scores.masked_fill(~block.seen, 0)
            result[:, block.rows] = (block.weights * scores).sum(-1, dtype=torch.float64)[0]
        if self.gain is not None and strengthened is None:
            result *= 1 + self.gain.double()[:, None]
        elif self.gain is not None and strengthened is not None:
            places, weights = strengthened
            scores = weights.clamp(min=torch.finfo(torch.float32).tiny).log() + self.lse[places.head, places.query]
            result += self.gain.double()[:, None] * self._row_total(places, weights * scores)
        return result

    def _received(self, strengthened: _Strengthened | None, z: Tensor | None) -> Floats:
        """float64 ``[H, n]``."""
        if z is None:
            received = functional.received_attention(self.query, self.key, **self.scores)[0].double()
            if self.gain is not None and strengthened is None:
                received *= 1 + self.gain.double()[:, None]
        else:
            received = torch.zeros(self.heads, self.length, dtype=torch.float64, device=self.query.device)
            for block in self._dense().blocks():
                received += (block.weights[0] / z[:, block.rows, None]).sum(1)
            received /= self._seen_by()
        if self.gain is not None and strengthened is not None:
            (head, query, key), weights = strengthened
            added = weights * self.gain[head]
            if z is not None:
                added = added / z[head, query]
            column = torch.zeros(self.heads * self.length, dtype=torch.float64, device=self.query.device)
            column.index_add_(0, head * self.length + key, added.double())
            received += column.view(self.heads, self.length) / self._seen_by()
        array: Floats = received.cpu().numpy()
        return array

    def _grown(self, places: Entries, weights: Tensor) -> Tensor:
        """Weights of strengthened places, as the layer applies them before it divides its rows."""
        return weights if self.gain is None else weights * (1 + self.gain[places.head])

    def _row_total(self, places: Entries, weights: Tensor) -> Tensor:
        result = torch.zeros(self.heads * self.length, dtype=weights.dtype, device=weights.device)
        result.index_add_(0, places.head * self.length + places.query, weights)
        return result.view(self.heads, self.length)

    def _weights(self, places: Entries) -> Tensor:
        """Softmax weights A at these places, float32 ``[E]``."""
        result = self.query.new_empty(len(places.head))
        for part in _parts(len(result)):
            head, query, key = places.at(part)
            score = self.scale * (self.query[0, head, query] * self.key[0, head // self.groups, key]).sum(-1)
            result[part] = (self._bend(score) - self.lse[head, query]).exp()
        return result

    def _bend(self, score: Tensor) -> Tensor:
        return self.softcap * torch.tanh(score / self.softcap) if self.softcap else score

    def _visible(self, places: Entries) -> Entries:
        """Those of the places that this layer sees; a source layer may see further."""
        visibility: Visibility = self.scores["visibility"]
        if visibility.mask is not None:
            mask = visibility.mask.expand(1, -1, self.length, -1)[0]
            return places.at(mask[places.head % mask.shape[0], places.query, places.key])
        if visibility.window is not None:
            return places.at(places.query - places.key < visibility.window)
        return places

    def _seen_by(self) -> Tensor:
        """How many queries see each key, at least 1: float64 ``[1 or H, n]``."""
        visibility: Visibility = self.scores["visibility"]
        named = (visibility.mask, visibility.chunk, visibility.key_start, visibility.key_end)
        if all(each is None for each in named):
            first = self.slots if visibility.causal else torch.zeros_like(self.slots)
            beyond = (self.slots + (visibility.window or self.length)).clamp(max=self.length)
            return (beyond - first).double()[None]
        return self._dense().onlookers()[0].double().clamp(min=1)

    def _dense(self) -> dense.Layer:
        """The layer's softmax weights, a few rows of them at a time."""
        visibility = visibility_arguments(self.scores["visibility"])
        scores = score_arguments(self.scale, self.softcap, self.scores["sinks"])
        return dense.Layer(self.query, self.key, NO_EDIT, visibility, scores)


class _Strengthened(NamedTuple):
    """The source layer's outliers and their softmax weights in this layer, float32 ``[E]``."""

    places: Entries
    weights: Tensor


def _parts(length: int) -> Iterator[slice]:
    return (slice(first, first + _ENTRIES) for first in range(0, length, _ENTRIES))


def _over_queries(rows: Tensor) -> Floats:
    """Sum of ``[H, queries]`` or ``[H, queries, any]`` over the queries."""
    result: Floats = rows.sum(1, dtype=torch.float64).cpu().numpy()
    return result
