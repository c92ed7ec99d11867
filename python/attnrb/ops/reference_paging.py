"""Paged attention in NumPy float64: every sequence's rows are picked from their blocks one by one.

Names and arguments are those of `attnrb.functional.attention` with a `attnrb.Paging`; the formulas are
`attnrb.ops.reference`'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnrb.ops.reference import Floats, OutlierRows, ResolvedEdit, _array, _floats, attention, outlier_capacity

__all__ = ["PagedRows", "paged_attention", "paged_rows"]


class PagedRows(NamedTuple):
    """Output [T,H,Dv] and log-sum-exp [T,H], zeros and -inf where a sequence has no keys; outliers [T,H,C], [T,H]."""

    output: Floats
    lse: Floats
    outliers: OutlierRows | None


def paged_rows(pool: Any, table: Any, length: int) -> Floats:
    """The first ``length`` rows of one sequence, [1,Hk,length,D]: key j is row j mod P of block ``table[j // P]``."""
    blocks = _floats(pool)
    rows = [blocks[table[j // blocks.shape[2]], :, j % blocks.shape[2]] for j in range(length)]
    return np.stack(rows, axis=1)[None]


def paged_attention(
    query: Any,
    key: Any,
    value: Any,
    paging: Any,
    *,
    edit: Any = None,
    emit: float | None = None,
    visibility: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
) -> PagedRows:
    """Edited attention of query [T,H,D] to pools [blocks,Hk,P,D] and [blocks,Hk,P,Dv]."""
    queries = _floats(query)
    table, starts, lengths = (_array(each) for each in (paging.block_table, paging.query_starts, paging.seq_lens))
    edit = ResolvedEdit() if edit is None else edit
    rows, heads = queries.shape[:2]
    capacity = 0 if emit is None else outlier_capacity(emit, table.shape[1] * key.shape[2])
    output, lse = np.zeros((rows, heads, value.shape[3])), np.full((rows, heads), -np.inf)
    indices, counts = np.full((rows, heads, capacity), -1, np.int32), np.zeros((rows, heads), np.int32)
    for b, length in enumerate(lengths):
        mine = slice(int(starts[b]), int(starts[b + 1]))
        if length == 0 or mine.start == mine.stop:
            continue
        own, own_lse, found = attention(
            queries[mine].swapaxes(0, 1)[None],
            paged_rows(key, table[b], int(length)),
            paged_rows(value, table[b], int(length)),
            edit=_edit_of(edit, b, mine),
            emit=emit,
            visibility=visibility,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        output[mine], lse[mine] = own[0].swapaxes(0, 1), own_lse[0].swapaxes(0, 1)
        if found is not None:
            indices[mine, :, : found.indices.shape[3]] = found.indices[0].swapaxes(0, 1)
            counts[mine] = found.counts[0].swapaxes(0, 1)
    return PagedRows(output, lse, None if emit is None else OutlierRows(indices, counts))


def _edit_of(edit: Any, sequence: int, rows: slice) -> ResolvedEdit:
    """The edit of one sequence's rows, in a batch of its own."""
    outliers, gain, bias, first = edit.outliers, edit.gain, edit.key_bias, edit.first_query
    if outliers is not None:
        indices, counts = (_array(each)[rows].swapaxes(0, 1)[None] for each in outliers)
        outliers = (indices, counts)
    if gain is not None and np.ndim(_array(gain)) == 2:
        gain = _array(gain)[sequence]
    if bias is not None and bias.shape[0] != 1:
        bias = _array(bias)[sequence : sequence + 1]
    if first is not None and np.ndim(_array(first)) == 1:
        first = _array(first)[sequence : sequence + 1]
    return ResolvedEdit(outliers, gain, edit.rule, bias, first)
