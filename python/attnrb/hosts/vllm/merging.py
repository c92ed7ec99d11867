"""Edits of several policies, put together so that one call of the op serves the rows of all of them.

Note: [One call a layer]
A call has one threshold for what it finds, and one rule for the outliers that it strengthens; all else may differ from
row to row. So the shares of a layer go into one call as long as those that find outliers agree on the threshold, and
those that strengthen some on the rule: the plain rows of a batch, its biased ones and its re-balanced ones are one
call. What a share does not say is filled in so that it changes nothing: a count of 0 for a row without outliers, and a
first query behind every slot for a row without a bias. Rows that ask for no outliers may be in a call that finds them;
nobody looks at theirs. A gain on every key is a factor on a row, which no call has: such a share has one to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrb.ops.edit import NO_EDIT, EditArguments
from attnrb.ops.outliers import Outliers

__all__ = ["Call", "Merging", "Share"]

_BEHIND_EVERY_SLOT = torch.iinfo(torch.int64).max


class Share(NamedTuple):
    """What some rows of a batch want of one layer.

    Attributes:
        rows: their numbers.
        edit: of the whole batch, as the op takes it with a paging. What it says of other rows does not count.
        emit: the threshold of the outliers that these rows report; None: they report none.
        heard: is told the outliers of the whole batch; those of other rows are anything.
    """

    rows: tuple[int, ...]
    edit: EditArguments = NO_EDIT
    emit: float | None = None
    heard: Callable[[Outliers], None] | None = None

    @property
    def strengthens(self) -> bool:
        """Whether it has outliers."""
        return self.edit.indices is not None

    @property
    def strengthens_every_key(self) -> bool:
        """Whether it has a gain without outliers."""
        return self.edit.gain is not None and self.edit.indices is None


class Call(NamedTuple):
    """One call of the op.

    Attributes:
        rows: that it serves, ascending.
        edit: of the whole batch.
        emit: the threshold of the outliers that it finds, or None.
        shares: what it was put together from.
    """

    rows: tuple[int, ...]
    edit: EditArguments
    emit: float | None
    shares: Sequence[Share]


class Merging:
    """Puts the shares of each layer of one forward together: see Note: [One call a layer].

    What several layers have in common, outliers and biases, is put together once.

    Args:
        query_starts: of the step, ``[B + 1]``.
    """

    def __init__(self, query_starts: Tensor) -> None:
        self._starts = query_starts
        self._known: dict[Hashable, tuple[Any, Any]] = {}

    def calls(self, shares: Sequence[Share]) -> list[Call]:
        """As few calls as serve these shares."""
        if len(shares) == 1:
            (share,) = shares
            return [Call(share.rows, share.edit, share.emit, shares)]
        return [self._call(part) for part in _parted(shares)]

    def _call(self, part: Sequence[Share]) -> Call:
        rows = tuple(sorted(row for share in part for row in share.rows))
        emit = next((share.emit for share in part if share.emit is not None), None)
        return Call(rows, part[0].edit if len(part) == 1 else self._edit(part), emit, part)

    def _edit(self, part: Sequence[Share]) -> EditArguments:
        strengthening = [share for share in part if share.strengthens]
        biased = [share for share in part if share.edit.key_bias is not None]
        indices = counts = gain = key_bias = first_query = None
        rule = 0
        if strengthening:
            names = [(id(share.edit.indices), id(share.edit.counts), share.rows) for share in strengthening]
            indices, counts = self._once(("outliers", *names), strengthening, self._outliers)
            gain, rule = self._gain(strengthening), strengthening[0].edit.rule
        if biased:
            names = [(id(share.edit.key_bias), id(share.edit.first_query), share.rows) for share in biased]
            key_bias, first_query = self._once(("bias", *names), biased, self._bias)
        return EditArguments(indices, counts, gain, rule, key_bias, first_query)

    def _once(self, key: Hashable, shares: Sequence[Share], make: Callable[[Sequence[Share]], Any]) -> Any:
        """What ``make`` makes of the shares, once; they are kept beside it, so that their ids stay theirs."""
        if key not in self._known:
            self._known[key] = make(shares), shares
        return self._known[key][0]

    def _rows(self, rows: tuple[int, ...]) -> Tensor:
        """Where these rows are in a tensor that has one for each text: int64."""
        found = self._known.get(rows)
        if found is None:
            device = self._starts.device
            found = self._known[rows] = torch.tensor(rows, dtype=torch.int64, device=device), None
        first: Tensor = found[0]
        return first

    def _queries(self, rows: tuple[int, ...]) -> Tensor:
        """The queries of these rows: bool ``[T]``."""
        each = self._starts[1:] - self._starts[:-1]
        chosen = torch.zeros(each.shape[0], dtype=torch.bool, device=each.device)
        chosen[self._rows(rows)] = True
        return chosen.repeat_interleave(each)

    def _outliers(self, shares: Sequence[Share]) -> tuple[Tensor, Tensor]:
        """``[T, H, C]`` and ``[T, H]``: those of each share in its rows, and none in others."""
        tables = [(share, share.edit.indices, share.edit.counts) for share in shares]
        given = [(self._queries(share.rows), i, c) for share, i, c in tables if i is not None and c is not None]
        _, indices, counts = given[0]
        if all(i is indices and c is counts for _, i, c in given):
            mine = torch.stack([queries for queries, _, _ in given]).any(0)
            return indices, counts * mine[:, None]
        most = max(i.shape[2] for _, i, _ in given)
        joined = indices.new_full((*indices.shape[:2], most), -1)
        joined_counts = torch.zeros_like(counts)
        for queries, i, c in given:
            joined[queries, :, : i.shape[2]] = i[queries]
            joined_counts[queries] = c[queries]
        return joined, joined_counts

    def _gain(self, shares: Sequence[Share]) -> Tensor:
        """``[B, H]``, or what all shares have; rows without outliers have 0."""
        gains = [(share.rows, share.edit.gain) for share in shares]
        first, heads = gains[0][1], 1
        assert first is not None
        if all(gain is first for _, gain in gains):
            return first
        for _, gain in gains:
            assert gain is not None
            heads = max(heads, gain.shape[-1])
        if heads == 1:  # one for all heads, which the op does not take for each row
            indices = shares[0].edit.indices
            assert indices is not None
            heads = indices.shape[1]
        joined = first.new_zeros(self._starts.shape[0] - 1, heads)
        for rows, gain in gains:
            assert gain is not None
            own = self._rows(rows)
            joined[own] = gain[own] if gain.dim() == 2 else gain
        return joined

    def _bias(self, shares: Sequence[Share]) -> tuple[Tensor, Tensor]:
        """``[B, 1 or H, N']`` and the first queries ``[B]``."""
        biases = [(self._rows(share.rows), share.edit.key_bias, share.edit.first_query) for share in shares]
        given = [(own, bias, first) for own, bias, first in biases if bias is not None]
        heads, slots = (max(bias.shape[axis] for _, bias, _ in given) for axis in (1, 2))
        count = self._starts.shape[0] - 1
        joined = given[0][1].new_zeros(count, heads, slots)
        first_query = torch.full((count,), _BEHIND_EVERY_SLOT, dtype=torch.int64, device=joined.device)
        for own, bias, first in given:
            joined[own, :, : bias.shape[2]] = bias if bias.shape[0] == 1 else bias[own]
            first_query[own] = 0 if first is None else first[own].to(torch.int64)
        return joined, first_query


def _parted(shares: Sequence[Share]) -> list[list[Share]]:
    """The shares of each call. Those that say most come first, and the others join them."""
    parts: list[list[Share]] = []
    for share in sorted(shares, key=lambda each: (each.emit is None) + (not each.strengthens)):
        fitting = (part for part in parts if not share.strengthens_every_key and _fits(share, part))
        found = next(fitting, None)
        if found is None:
            parts.append([share])
        else:
            found.append(share)
    return parts


def _fits(share: Share, part: Sequence[Share]) -> bool:
    """Whether a call that serves ``part`` can serve this share too."""
    for other in part:
        if other.strengthens_every_key:
            return False
        if share.emit is not None and other.emit is not None and share.emit != other.emit:
            return False
        if share.strengthens and other.strengthens and share.edit.rule != other.edit.rule:
            return False
    return True
