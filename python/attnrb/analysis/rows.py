"""Where single queries look: rows of attention weights, for those queries alone.

Note: [Rows of attention]
A row of one query in every layer and head is computed from what its layer kept: its keys, and the query. Weights are
those that the layer applies, edited where it is, in float32. A page gets of each row the largest weights, with the sum
of all, so that what is left out is known, and which keys are outliers of that query in the source layer. They are
packed in 16 bits each: keys as they are, weights as half precision numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnrb.hosts.session import AttentionCall
from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import Visibility
from attnrb.policies.applied import applied_weights
from attnrb.policies.base import LayerView, Mixture

__all__ = ["Detail", "LayerKeys", "RowCollector", "RunKeys", "TextRows", "interesting", "row_bytes", "spread"]

LARGEST = 12
"""Weights of a row that a page gets."""
MOST_TOKENS = 1 << 15
"""Rows are kept of texts with at most this many tokens: a key's number shares 16 bits with a mark."""
_OUTLIER = 1 << 15
_CANDIDATES = 256  # queries among which the most interesting are looked for
_WORK = 1 << 15  # keys that the rows of a text have together in each head, so that they cost a few per cent
_FEW_QUERIES = 48  # queries whose rows are computed at a time


@dataclass(frozen=True)
class Detail:
    """Which single heads a page shows, and how much of them.

    Attributes:
        layers: numbers of the layers whose heads are shown one by one. Default: all.
        heads: numbers of these heads. Default: all.
        megabytes: what a page may take for the rows of single queries. Default: 2. With 0 there are none.

    Raises:
        ValueError: a number is negative.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    megabytes: float = 2.0

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            chosen = getattr(self, name)
            if chosen is not None:
                if not chosen or min(chosen) < 0:
                    raise ValueError(f"{name}: expected numbers of at least 0, got {list(chosen)}")
                object.__setattr__(self, name, tuple(sorted(set(chosen))))
        if not 0 <= self.megabytes < 1000:
            raise ValueError(f"megabytes: expected a number from 0 to 1000, got {self.megabytes}")

    def places(self, layers: Sequence[int], heads: int) -> tuple[list[int], list[int]]:
        """Places of the layers in ``layers``, and numbers of the heads, that are shown one by one.

        Raises:
            ValueError: there is no such layer or head.
        """
        for name, chosen, there in (("layers", self.layers, layers), ("heads", self.heads, range(heads))):
            missing = sorted(set(chosen or ()) - set(there))
            if missing:
                raise ValueError(f"{name}: expected numbers from {there[0]} to {there[-1]}, got {missing[0]}")
        shown = [place for place, layer in enumerate(layers) if self.layers is None or layer in self.layers]
        return shown, [head for head in range(heads) if self.heads is None or head in self.heads]


DEFAULT_DETAIL = Detail()


class LayerKeys(NamedTuple):
    """What one layer kept of one text."""

    layer: int
    positions: Tensor
    """int64 ``[C]``, ascending: the queries that were kept."""
    query: Tensor
    """``[1, H, C, D]``"""
    key: Tensor
    """``[1, Hk, n, D]``"""
    scores: Mapping[str, Any]
    edit: Edit | Mixture | None

    @classmethod
    def of(cls, call: AttentionCall, positions: Tensor) -> LayerKeys:
        """Keep these queries of one layer's attention over a whole text."""
        positions = positions.to(call.query.device)
        every = len(positions) == call.query.shape[2]
        query = call.query if every else call.query[:, :, positions]
        return cls(call.layer, positions, query.detach(), call.key.detach(), dict(call.scores), call.edit)

    @torch.inference_mode()
    def weights(self, positions: Tensor) -> Tensor:
        """The rows of these queries, all of them kept, as the layer applies them: float32 ``[H, len, n]``."""
        positions = positions.to(self.query.device)
        visibility: Visibility = self.scores["visibility"]
        by_slot = isinstance(self.edit, Mixture) or (self.edit is not None and self.edit.first_query is not None)
        if by_slot or visibility.key_start is not None or visibility.key_end is not None:
            return torch.cat([self._rows(each[None]) for each in positions], 1)
        return self._rows(positions)

    def _rows(self, positions: Tensor) -> Tensor:
        places = torch.searchsorted(self.positions, positions)
        query, key = self.query[:, :, places].float(), self.key.float()
        length, count = key.shape[2], len(positions)
        visibility: Visibility = self.scores["visibility"]
        mask = visibility.mask
        if mask is not None and mask.dim() >= 2 and mask.shape[-2] != 1:
            mask = mask[..., positions, :]
        # Queries far from each other have no one offset: what they see is a mask of few rows.
        if count == 1:
            scores = {**self.scores, "visibility": replace(visibility, query_offset=int(positions[0]), mask=mask)}
            if _causal(visibility) and mask is None and visibility.key_offset == 0:
                key = key[:, :, : int(positions[0]) + 1]
        else:
            scores = {**self.scores, "visibility": Visibility(causal=False, mask=self._seen(positions, length, mask))}
        view = LayerView(self.layer, query, key, lambda: scores)
        weights = applied_weights(view, _narrowed(self.edit, positions))[0]
        return torch.nn.functional.pad(weights, (0, length - weights.shape[2]))

    def _seen(self, positions: Tensor, length: int, mask: Tensor | None) -> Tensor:
        visibility: Visibility = self.scores["visibility"]
        slots, own = torch.arange(length, device=positions.device), positions[:, None]
        seen = torch.ones(len(positions), length, dtype=torch.bool, device=positions.device)
        if _causal(visibility):
            seen &= slots <= own
        if visibility.window is not None:
            seen &= slots > own - visibility.window
        if visibility.chunk is not None:
            seen &= slots // visibility.chunk == own // visibility.chunk
        return seen[None, None] if mask is None else seen & mask


def _causal(visibility: Visibility) -> bool:
    return visibility.mask is None if visibility.causal is None else visibility.causal


def _narrowed(edit: Edit | Mixture | None, positions: Tensor) -> Edit | Mixture | None:
    """The edit of these queries, of one that is for all of a text."""
    if not isinstance(edit, Edit) or edit.outliers is None:
        return edit
    indices, counts = edit.outliers
    if indices.shape[2] == 1:
        return edit
    return replace(edit, outliers=Outliers(indices[:, :, positions].contiguous(), counts[:, :, positions].contiguous()))


class RunKeys:
    """What all layers of one run kept of one text, and the source layer's outliers.

    Attributes:
        layers: ascending.
        source: head, query and key of each outlier, int64 each; as `attnrb.analysis.measure.Entries`.
        interest: float64 ``[n]``: how much attention each query has on them, mean over heads, summed over layers.
    """

    def __init__(self, length: int, positions: Sequence[int] | None = None) -> None:
        """Keep these queries, which ascend; by default some among which interesting ones are looked for."""
        self.length = length
        self.positions = spread(length, _CANDIDATES) if positions is None else _places(positions)
        self.layers: list[LayerKeys] = []
        self.source: tuple[Tensor, Tensor, Tensor] | None = None
        self.interest: NDArray[np.float64] = np.zeros(length)

    def add(self, call: AttentionCall) -> None:
        self.layers.append(LayerKeys.of(call, self.positions))

    @torch.inference_mode()
    def pack(self, queries: Sequence[int], layers: Sequence[int], heads: Sequence[int]) -> NDArray[np.uint16]:
        """The largest weights of these queries, packed: see Note: [Rows of attention].

        Args:
            queries: positions that were kept, ascending.
            layers: places of the layers that are told one by one, and
            heads: their heads.

        Returns:
            uint16 ``[queries, 1 + layers, 1 + heads, 1 + LARGEST, 2]``. First the mean of all layers and, of each, the
            mean of its heads. The first pair of each row is the number of outliers of the query and the sum of the
            row's weights; the others are key and weight, the largest weight first.
        """
        parts = [
            self._pack(_places(queries[first : first + _FEW_QUERIES]), layers, heads)
            for first in range(0, len(queries), _FEW_QUERIES)
        ]
        return np.concatenate(parts)

    def _pack(self, queries: Tensor, layers: Sequence[int], heads: Sequence[int]) -> NDArray[np.uint16]:
        most = max(each.query.shape[1] for each in self.layers)
        marks = self._marks(queries, most)
        shape = (len(queries), 1 + len(layers), 1 + len(heads), 1 + LARGEST, 2)
        packed = np.zeros(shape, dtype=np.uint16)
        total = torch.zeros(most, len(queries), self.length, dtype=torch.float32, device="cpu")
        counted = torch.zeros(most, 1, 1, dtype=torch.float32, device="cpu")
        for place, kept in enumerate(self.layers):
            weights = kept.weights(queries).cpu()
            own = len(weights)
            total[:own] += weights
            counted[:own] += 1
            if place in layers:
                _pack_rows(weights, marks[: own + 1], heads, packed[:, 1 + list(layers).index(place)])
        _pack_rows(total / counted.clamp(min=1), marks, heads, packed[:, 0])
        return packed

    def _marks(self, queries: Tensor, heads: int) -> Tensor:
        """Outliers of these queries: bool ``[1 + heads, queries, n]``, in any head first."""
        marks = torch.zeros(1 + heads, len(queries), self.length, dtype=torch.bool, device="cpu")
        if self.source is not None:
            head, query, key = (each.cpu().contiguous() for each in self.source)
            place = torch.searchsorted(queries, query).clamp(max=len(queries) - 1)
            mine = (queries[place] == query) & (head < heads)
            marks[1 + head[mine], place[mine], key[mine]] = True
            marks[0] = marks[1:].any(0)
        return marks


def _pack_rows(weights: Tensor, marks: Tensor, heads: Sequence[int], packed: NDArray[np.uint16]) -> None:
    """Write ``[H, queries, n]`` into ``[queries, 1 + heads, 1 + LARGEST, 2]``."""
    there = _places([head for head in heads if head < len(weights)])
    chosen = torch.cat([_places([0]), 1 + there])
    rows = torch.cat([weights.mean(0, keepdim=True), weights[there]]).transpose(0, 1)
    marked = marks[chosen].transpose(0, 1)
    largest, keys = rows.topk(min(LARGEST, rows.shape[2]), dim=2)
    slots, count = [0, *(1 + place for place, head in enumerate(heads) if head < len(weights))], largest.shape[2]
    codes = keys.int() | (marked.gather(2, keys).int() * _OUTLIER)
    first, second = packed[..., 0], packed[..., 1]
    first[:, slots, 1 : 1 + count] = codes.numpy().astype(np.uint16)
    second[:, slots, 1 : 1 + count] = _halves(largest)
    first[:, slots, 0] = marked.sum(2).numpy().astype(np.uint16)
    second[:, slots, 0] = _halves(rows.sum(2))


def _places(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _halves(values: Tensor) -> NDArray[np.uint16]:
    return values.clamp(-65000, 65000).numpy().astype(np.float16).view(np.uint16)


class TextRows(NamedTuple):
    """Rows of the most interesting queries of one text."""

    queries: tuple[int, ...]
    layers: tuple[int, ...]
    """Places of the layers that are told one by one."""
    heads: tuple[int, ...]
    runs: tuple[NDArray[np.uint16], ...]
    """What `RunKeys.pack` gives, for each run."""


def spread(length: int, count: int) -> Tensor:
    """At most ``count`` positions of a text, evenly spread, with the last: int64, ascending."""
    if length <= count:
        return torch.arange(length, dtype=torch.int64, device="cpu")
    return torch.from_numpy(np.unique(np.rint(np.linspace(0, length - 1, count)).astype(np.int64)))


def row_bytes(layers: int, heads: int, runs: int) -> float:
    """What one query takes in a page, where numbers are written in base 64."""
    return (1 + layers) * (1 + heads) * (1 + LARGEST) * 2 * 2 * runs * 4 / 3


def interesting(kept: RunKeys, count: int) -> list[int]:
    """The last query, and those with most attention on the source layer's outliers: at most ``count``, ascending."""
    positions = kept.positions.tolist()
    by_interest = sorted(positions[:-1], key=lambda each: (-kept.interest[each], -each))
    return sorted([positions[-1], *by_interest][:count])


class RowCollector:
    """Collects the rows of single queries, one text after the other."""

    def __init__(self, detail: Detail, keep_keys: bool) -> None:
        self.detail, self.keep_keys = detail, keep_keys
        self.found: list[TextRows | None] = []
        self.keys: list[tuple[RunKeys, ...]] = []
        self._left = 1e6 * detail.megabytes
        self._running: list[RunKeys] = []
        self._queries: list[int] | None = None
        self._packed: list[NDArray[np.uint16]] = []

    def collect(self, length: int, run: int) -> RunKeys | None:
        """What collects the next run of a text; None where nothing is to be collected."""
        if length > MOST_TOKENS:
            return None
        if not self.keep_keys and not (self._queries if run else self._left > 0):
            return None
        positions: Sequence[int] | None = range(length) if self.keep_keys else self._queries if run else None
        self._running.append(RunKeys(length, positions))
        return self._running[-1]

    def run_done(self, layers: Sequence[int], heads: int, runs: int) -> None:
        """Compute the rows of the run that was collected last, and let go of its keys."""
        if not self._running:
            return
        kept = self._running[-1]
        shown = self.detail.places(layers, heads)
        if self._queries is None:
            size = row_bytes(len(shown[0]), len(shown[1]), runs)
            room = min(int(self._left / size), max(4, _WORK // kept.length))
            self._queries = interesting(kept, room)
            self._left -= len(self._queries) * size
        if self._queries:
            self._packed.append(kept.pack(self._queries, *shown))
        if not self.keep_keys:
            kept.layers.clear()

    def finish(self, layers: Sequence[int], heads: int) -> None:
        """Note what was found in the text that is done."""
        shown = self.detail.places(layers, heads)
        packed, queries = tuple(self._packed), tuple(self._queries or ())
        self.found.append(TextRows(queries, tuple(shown[0]), tuple(shown[1]), packed) if packed else None)
        if self.keep_keys:
            self.keys.append(tuple(self._running))
        self._running, self._queries, self._packed = [], None, []
