"""Attention over keys and values in blocks: what `attnrb.functional.attention` does with a paging, and their writer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrb.decisions import tell
from attnrb.ops import dense_paging
from attnrb.ops.edit import RULES, Attended, EditArguments
from attnrb.ops.everything import strengthened
from attnrb.ops.operands import (
    check_gain_values,
    check_one_device,
    check_operand,
    given,
    native,
    records_gradient,
    transformed,
)
from attnrb.ops.outliers import Outliers
from attnrb.ops.paging import PagingArguments, check_seeing
from attnrb.ops.refusals import native_op
from attnrb.ops.scores import Scores
from attnrb.ops.visibility import VisibilityArguments, describe

__all__ = ["attend_blocks", "attend_paged", "write_blocks", "write_keys"]

# Looked up once: torch.ops resolves overloads at every call.
_attention = native_op(torch.ops.attnrb.attention.default)
_attention_into = native_op(torch.ops.attnrb.attention.into)
_attention_output_into = native_op(torch.ops.attnrb.attention.output_into)
_write_keys = native_op(torch.ops.attnrb.write_keys.default)


def attend_paged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    paging: PagingArguments,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scores: Scores,
    out: Tensor | None,
) -> Attended:
    """`attnrb.ops.attention.attention` of checked operands with a paging, its options as the op takes them."""
    check_seeing(visibility)
    if transformed() or records_gradient(query, key, value, edit.gain, edit.key_bias, scores.sinks):
        raise RuntimeError(
            "attention with paging is forward only, and a gradient would be recorded: call it under torch.no_grad() or "
            "with tensors that require none"
        )
    shape = (query.shape[0], query.shape[1], value.shape[3])
    if out is not None:
        _check_out(out, query, shape)
    if edit.gain is not None and edit.indices is None:
        return _every_key(query, key, value, paging, edit, emit, visibility, scores, out)
    if native(query):
        options = given(edit, emit, visibility, scores) | paging._asdict()
        if out is None:
            output, lse, indices, counts = _attention(query, key, value, **options)
        else:
            output = out
            lse, indices, counts = _attention_into(query, key, value, out=out, **options)
        return Attended(output, lse, None if emit is None else Outliers(indices, counts))
    tell("gathered", "no native op serves their dtype and device")
    output = query.new_zeros(shape) if out is None else out
    lse, outliers = dense_paging.attention(query, key, value, paging, edit, emit, visibility, scores, output)
    return Attended(output, lse, outliers)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    paging: PagingArguments,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scores: Scores,
    out: Tensor,
) -> Outliers | None:
    """`attend_paged` for layers that are called once a token: nothing is checked here that the op checks itself.

    Nobody wants a gradient or a cast, and the visibility has no more than a window or chunks. Returned are the outliers
    where they are asked for; no log-sum-exp is made where they are not.
    """
    if not native(query) or (edit.gain is not None and edit.indices is None):
        return attend_paged(query, key, value, paging, edit, emit, visibility, scores, out).outliers
    options = given(edit, emit, visibility, scores)
    table, starts, lengths = paging
    options.update(block_table=table, query_starts=starts, seq_lens=lengths, out=out)
    if emit is None:
        _attention_output_into(query, key, value, **options)
        return None
    return Outliers(*_attention_into(query, key, value, **options)[1:])


def _every_key(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    paging: PagingArguments,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scores: Scores,
    out: Tensor | None,
) -> Attended:
    """A gain without outliers: plain attention, each row multiplied by what `strengthened` says."""
    gain, sequences, heads = edit.gain, paging.seq_lens.shape[0], query.shape[1]
    assert gain is not None
    if gain.shape not in ((1,), (heads,), (sequences, heads)):
        raise ValueError(f"gain: expected [1], [H] or [B, H] = [{sequences}, {heads}], got {tuple(gain.shape)}")
    check_gain_values(edit)
    plain = edit._replace(gain=None)
    output, lse, outliers = attend_paged(query, key, value, paging, plain, emit, visibility, scores, None)
    # Each row's sequence, found without waiting for a device, and within bounds whatever the tables say.
    row = torch.arange(query.shape[0], device=query.device)
    sequence = torch.searchsorted(paging.query_starts[1:].long(), row, right=True).clamp(max=sequences - 1)
    rows = gain[sequence] if gain.dim() == 2 else gain[None]
    factor, lse = strengthened(lse, rows, RULES[edit.rule], scores.sinks)
    output = (output * factor[..., None]).to(output.dtype)
    if out is None:
        return Attended(output, lse, outliers)
    served = (paging.seq_lens > 0)[sequence]
    return Attended(out.copy_(torch.where(served[:, None, None], output, out)), lse, outliers)


def write_keys(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """Writes new keys and values into the blocks that `attnrb.Paging` describes.

    Args:
        key: ``[T, Hk, D]``, any strides.
        value: ``[T, Hk, Dv]``, likewise.
        key_pool: ``[blocks, Hk, P, D]``, dtype of ``key``; the last axis contiguous, the others in any order.
        value_pool: ``[blocks, Hk, P, Dv]``, likewise. Both may be views of one tensor.
        slot_mapping: int64 ``[T]``: row t goes to row ``slot_mapping[t] mod P`` of block ``slot_mapping[t] // P``; -1
            goes nowhere. Of two rows for one place the later stays; on CUDA either may.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, or a slot is outside the pools; nothing is written then. On CUDA
            nothing waits for the device: rows of such slots go nowhere, unless ``ATTNRB_CUDA_CHECKS=1`` is set.
    """
    for name, tensor, rank in (("key", key, 3), ("value", value, 3), ("key_pool", key_pool, 4)):
        check_operand(name, tensor, rank)
    check_operand("value_pool", value_pool, 4)
    if not isinstance(slot_mapping, Tensor) or slot_mapping.dtype != torch.int64:
        raise TypeError(f"slot_mapping: expected an int64 tensor [T], got {describe(slot_mapping)}")
    for name, tensor in (("value", value), ("key_pool", key_pool), ("value_pool", value_pool)):
        if tensor.dtype != key.dtype:
            raise TypeError(f"{name}: expected the dtype of key, {key.dtype}, got {tensor.dtype}")
    if records_gradient(key, value, key_pool, value_pool):
        raise RuntimeError("write_keys has no gradient, and one would be recorded: call it under torch.no_grad()")
    _check_pools(key, value, key_pool, value_pool, slot_mapping)
    write_blocks(key, value, key_pool, value_pool, slot_mapping)


def write_blocks(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    """`write_keys` for layers that are called once a token: nothing is checked here that the op checks itself."""
    if native(key):
        _write_keys(key, value, key_pool, value_pool, slot_mapping)
    else:
        dense_paging.write_keys(key, value, key_pool, value_pool, slot_mapping)


def _write_keys_fake(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    check_one_device(key=key, value=value, key_pool=key_pool, value_pool=value_pool, slot_mapping=slot_mapping)


torch.library.register_fake("attnrb::write_keys", _write_keys_fake)


def _check_pools(key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slot_mapping: Tensor) -> None:
    rows, heads, width = key.shape
    for name, tensor, shape in (
        ("value", value, (rows, heads, value.shape[2])),
        ("key_pool", key_pool, (key_pool.shape[0], heads, key_pool.shape[2], width)),
        ("value_pool", value_pool, (*key_pool.shape[:3], value.shape[2])),
        ("slot_mapping", slot_mapping, (rows,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected the shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != key.device:
            raise ValueError(f"{name}: expected on {key.device}, where key is, got {tensor.device}")


def _check_out(out: Any, query: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(out, Tensor) or out.dtype != query.dtype:
        raise TypeError(f"out: expected a tensor of the dtype of query, {query.dtype}, got {describe(out)}")
    if out.shape != shape:
        raise ValueError(f"out: expected the shape [T, H, Dv] = {tuple(shape)}, got {tuple(out.shape)}")
    if out.device != query.device:
        raise ValueError(f"out: expected on {query.device}, where query is, got {out.device}")
    if out.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(f"out: expected a contiguous last axis, got the strides {out.stride()}")
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("out: expected a tensor that requires no gradient")
