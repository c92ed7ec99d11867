"""Paged attention by gathering: each sequence's rows are copied out of their blocks, and attended to by themselves.

Slow and obvious. It is what the native ops are compared with, and it serves the dtypes that they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrb.ops import dense
from attnrb.ops.edit import EditArguments
from attnrb.ops.library import outlier_capacity
from attnrb.ops.operands import check_bias_shape, check_gain_values, check_one_device
from attnrb.ops.outliers import Outliers
from attnrb.ops.paging import Layout, PagingArguments, check_paging
from attnrb.ops.scores import Scores, promoted
from attnrb.ops.visibility import VisibilityArguments

__all__ = ["attention", "write_keys"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    paging: PagingArguments,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scores: Scores,
    out: Tensor,
) -> tuple[Tensor, Outliers | None]:
    """Writes the rows of ``out`` whose sequences have keys.

    Returns:
        Log-sum-exp ``[T, H]``, and the outliers ``[T, H, C]`` and ``[T, H]`` above ``emit`` where it is given.

    Raises:
        ValueError: shapes, devices, tables or numbers do not fit.
    """
    rows, heads = query.shape[:2]
    layout = _checked(query, key, value, paging, edit, visibility, scores)
    lse = query.new_full((rows, heads), -torch.inf, dtype=promoted(query.dtype))
    capacity = 0 if emit is None else min(outlier_capacity(emit), paging.block_table.shape[1] * key.shape[2])
    indices = query.new_full((rows, heads, capacity), -1, dtype=torch.int32)
    counts = query.new_zeros((rows, heads), dtype=torch.int32)
    for b, length in enumerate(layout.lengths):
        mine = slice(layout.starts[b], layout.starts[b + 1])
        if length == 0 or mine.start == mine.stop:
            continue
        keys, values = (_gathered(pool, paging.block_table[b], length) for pool in (key, value))
        output, own, outliers = dense.attention(
            _as_batch(query[mine]), keys, values, _edit_of(edit, b, mine), emit, visibility, scores
        )
        out[mine] = output[0].transpose(0, 1)
        lse[mine] = own[0].transpose(0, 1)
        if outliers is not None:
            found = outliers.indices[0].transpose(0, 1)
            indices[mine, :, : found.shape[2]] = found
            counts[mine] = outliers.counts[0].transpose(0, 1)
    return lse, None if emit is None else Outliers(indices, counts)


def write_keys(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """Row t goes to row ``slot_mapping[t]``, counted over all blocks; -1 goes nowhere.

    Raises:
        ValueError: a slot is outside.
    """
    block_rows = key_pool.shape[2]
    if bool(((slot_mapping < -1) | (slot_mapping >= key_pool.shape[0] * block_rows)).any()):
        raise ValueError(f"slot_mapping: expected -1 or numbers below {key_pool.shape[0] * block_rows}, got another")
    written = slot_mapping >= 0
    block, row = slot_mapping[written] // block_rows, slot_mapping[written] % block_rows
    key_pool[block, :, row] = key[written]
    value_pool[block, :, row] = value[written]


def _gathered(pool: Tensor, table: Tensor, length: int) -> Tensor:
    """A sequence's keys or values, ``[1, Hk, length, width]``."""
    block_rows = pool.shape[2]
    blocks = pool[table[: -(-length // block_rows)].long()].transpose(0, 1)
    return blocks.reshape(1, pool.shape[1], -1, pool.shape[3])[:, :, :length]


def _as_batch(rows: Tensor) -> Tensor:
    """``[m, H, ...]`` as the batch of one sequence, ``[1, H, m, ...]``."""
    return rows.transpose(0, 1)[None]


def _edit_of(edit: EditArguments, sequence: int, rows: slice) -> EditArguments:
    """The edit of one sequence's rows, in a batch of its own."""
    mine = slice(sequence, sequence + 1)
    gain, bias, first = edit.gain, edit.key_bias, edit.first_query
    return edit._replace(
        indices=None if edit.indices is None else _as_batch(edit.indices[rows]),
        counts=None if edit.counts is None else _as_batch(edit.counts[rows]),
        gain=gain[sequence] if gain is not None and gain.dim() == 2 else gain,
        key_bias=bias[mine] if bias is not None and bias.shape[0] != 1 else bias,
        first_query=None if first is None else first[mine],
    )


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    paging: PagingArguments,
    edit: EditArguments,
    visibility: VisibilityArguments,
    scores: Scores,
) -> Layout:
    rows, heads, width = query.shape
    blocks, key_heads, block_rows = key.shape[:3]
    if key.shape[3] != width or width < 1:
        raise ValueError(f"key: expected [blocks, Hk, P, D] with D = {width} >= 1, got {tuple(key.shape)}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"query: expected a number of heads that is a multiple of key's {key_heads}, got {heads}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [blocks, Hk, P] of key, {tuple(key.shape[:3])}, then Dv, got {tuple(value.shape)}"
        )
    check_one_device(query=query, key=key, value=value, **edit._asdict(), **paging._asdict(), sinks=scores.sinks)
    if scores.sinks is not None and scores.sinks.shape != (heads,):
        raise ValueError(f"sinks: expected the shape [H] = [{heads}], got {tuple(scores.sinks.shape)}")
    layout = check_paging(paging, rows, blocks, block_rows)
    _check_edit(edit, rows, heads, len(layout.lengths))
    return layout


def _check_edit(edit: EditArguments, rows: int, heads: int, sequences: int) -> None:
    if edit.gain is not None:
        if edit.gain.shape not in ((1,), (heads,), (sequences, heads)):
            raise ValueError(
                f"gain: expected the shape [1], [H] or [B, H] = [{sequences}, {heads}], got {tuple(edit.gain.shape)}"
            )
        check_gain_values(edit)
    if edit.indices is not None and edit.counts is not None:
        if edit.indices.dim() != 3 or edit.indices.shape[:2] != (rows, heads):
            raise ValueError(
                f"indices: expected the shape [T, H, C] with T = {rows} and H = {heads}, got "
                f"{tuple(edit.indices.shape)}"
            )
        if edit.counts.shape != (rows, heads):
            raise ValueError(f"counts: expected the shape [T, H] = [{rows}, {heads}], got {tuple(edit.counts.shape)}")
    check_bias_shape(sequences, heads, edit)
