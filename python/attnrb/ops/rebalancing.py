"""The two operations of re-balancing: attention at the source layer, and in the layers that its outliers reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnrb import _C
from attnrb.ops import dense, training
from attnrb.ops.edit import EditArguments, gain_tensor
from attnrb.ops.operands import check_one_device, check_shapes, check_threshold, operands, records_gradient
from attnrb.ops.outliers import Outliers
from attnrb.ops.scores import promoted, score_arguments
from attnrb.ops.visibility import Visibility, describe, visibility_arguments

__all__ = ["rebalanced_attention", "source_attention"]

_source_attention = torch.ops.attnrb.source_attention.default
_rebalanced_attention = torch.ops.attnrb.rebalanced_attention.default


def source_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    threshold: float = 0.01,
    scale: float | None = None,
    visibility: Visibility | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Outliers]:
    """Attention at the source layer, which also finds the outliers.

    With ``A = softmax(scale · query · keyᵀ)`` over the visible keys, the outliers of query i are the keys j with
    ``A[i, j] > threshold`` whose slot is not the query's own (arXiv 2403.14932, section 3). No ``[M, N]`` matrix is
    built.

    Args:
        query: ``[B, H, M, D]``, float32, bfloat16, float16 or float64, any strides.
        key: ``[B, Hk, N, D]``, dtype and device of ``query``.
        value: ``[B, Hk, N, Dv]``, likewise.
        threshold: between 0 and 1, both excluded.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        visibility: which keys a query may see: a :class:`attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.

    Returns:
        ``(output, lse, outliers)``: output ``[B, H, M, Dv]`` in the dtype of ``query``, laid out in memory as
        ``[B, M, H, Dv]``; the log-sum-exp of each row, float32 ``[B, H, M]``; :class:`attnrb.Outliers`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit.
    """
    query, key, value = operands(query, key, value)
    check_threshold(threshold)
    seeing = visibility_arguments(visibility, query.size(2), key.size(2))
    scoring = score_arguments(query, scale, softcap, sinks)
    if query.dtype == torch.float64 or seeing.beyond_old_ops:
        check_shapes(query, key, value, EditArguments(), seeing, scoring)
        output, lse, found = dense.attention(query, key, value, EditArguments(), threshold, seeing, scoring)
        assert found is not None
        return output, lse, found
    options = (*seeing.for_old_ops(), *scoring)
    op = training.source_attention if records_gradient(query, key, value, sinks) else _source_attention
    output, lse, indices, counts = op(query, key, value, threshold, *options)
    return output, lse, Outliers(indices, counts)


def _source_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float,
    causal: bool,
    query_offset: int,
    key_offset: int,
    window: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_one_device(query=query, key=key, value=value, key_start=key_start, key_end=key_end, mask=mask, sinks=sinks)
    rows = query.shape[:3]
    capacity = torch.sym_min(_C.outlier_capacity(threshold), key.shape[2])  # type: ignore[no-untyped-call]
    return (
        _attention_output(query, value),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((*rows, capacity), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
    )


torch.library.register_fake("attnrb::source_attention", _source_attention_fake)


# -------------------------------------------------------------------------------------------- rebalanced_attention


def rebalanced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outliers: Outliers | tuple[Tensor, Tensor],
    gain: float | Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    scale: float | None = None,
    visibility: Visibility | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in a layer below the source, with the outliers strengthened.

    ``y_i = Σ_j A_ij v_j + gain · Σ_{j in outliers of i} A_ij v_j`` with ``A = softmax(scale · query · keyᵀ)`` over the
    visible keys. With ``normalize``, y_i is divided by ``1 + gain · Σ_{j in outliers of i} A_ij``. Outliers that this
    layer does not hold, or that the query cannot see, are skipped.

    Args:
        query: ``[B, H, M, D]``, float32, bfloat16, float16 or float64, any strides.
        key: ``[B, Hk, N, D]``, dtype and device of ``query``.
        value: ``[B, Hk, N, Dv]``, likewise.
        outliers: ``(indices, counts)`` of :func:`source_attention` for the same queries and heads; rows must ascend.
        gain: a number, or one for each head: a sequence or a tensor ``[H]``. A float32 tensor costs nothing to pass.
        normalize: whether the weights of a row sum to 1 again.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        visibility: which keys a query may see: a :class:`attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.

    Returns:
        ``[B, H, M, Dv]`` in the dtype of ``query``, laid out in memory as ``[B, M, H, Dv]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit, or a row of ``outliers`` does not ascend.
    """
    query, key, value = operands(query, key, value)
    # A lone tensor would unpack too, along its first axis.
    if not isinstance(outliers, tuple) or len(outliers) != 2:
        raise TypeError(f"outliers: expected a tuple (indices, counts), got {describe(outliers)}")
    indices, counts = outliers
    seeing = visibility_arguments(visibility, query.size(2), key.size(2))
    scoring = score_arguments(query, scale, softcap, sinks)
    gain = gain_tensor(gain, query.device, promoted(query.dtype))
    if query.dtype == torch.float64 or seeing.beyond_old_ops:
        edit = EditArguments(indices, counts, gain, "row" if normalize else "none")
        check_shapes(query, key, value, edit, seeing, scoring)
        return dense.attention(query, key, value, edit, None, seeing, scoring)[0]
    options = (*seeing.for_old_ops(), *scoring)
    result: Tensor
    if records_gradient(query, key, value, sinks, gain):
        result, _ = training.rebalanced_attention(query, key, value, indices, counts, gain, normalize, *options)
    else:
        result = _rebalanced_attention(query, key, value, indices, counts, gain, normalize, *options)
    return result


def _rebalanced_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    gain: Tensor,
    normalize: bool,
    causal: bool,
    query_offset: int,
    key_offset: int,
    window: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    check_one_device(query=query, key=key, value=value, indices=indices, counts=counts, gain=gain)
    check_one_device(query=query, key_start=key_start, key_end=key_end, mask=mask, sinks=sinks)
    return _attention_output(query, value)


torch.library.register_fake("attnrb::rebalanced_attention", _rebalanced_attention_fake)


def _attention_output(query: Tensor, value: Tensor) -> Tensor:
    """Like the output of the attention ops: [B, H, M, Dv] in memory laid out as [B, M, H, Dv]."""
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)
