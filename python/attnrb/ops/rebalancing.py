"""The two operations of re-balancing: attention at the source layer, and in the layers that its outliers reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnrb.ops.attention import attention_fake, dispatch
from attnrb.ops.edit import NO_EDIT, RULES, EditArguments, gain_tensor
from attnrb.ops.operands import check_threshold, operands
from attnrb.ops.outliers import Outliers
from attnrb.ops.scores import OLDER_OPTIONS, promoted, score_arguments
from attnrb.ops.visibility import Visibility, describe, visibility_arguments

__all__ = ["rebalanced_attention", "source_attention"]


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
    seeing, scoring = visibility_arguments(visibility), score_arguments(scale, softcap, sinks)
    output, lse, outliers = dispatch(query, key, value, NO_EDIT, threshold, seeing, scoring)
    assert outliers is not None
    return output, lse, outliers


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
    gain = gain_tensor(gain, query.device, promoted(query.dtype))
    edit = EditArguments(indices, counts, gain, RULES.index("row" if normalize else "none"))
    seeing, scoring = visibility_arguments(visibility), score_arguments(scale, softcap, sinks)
    return dispatch(query, key, value, edit, None, seeing, scoring).output


# The native ops of these names are for callers of torch.ops; the functions above call `attention`.


def _source_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, threshold: float, *options: Any
) -> tuple[Tensor, ...]:
    return attention_fake(query, key, value, emit=threshold, **_older(options))


def _rebalanced_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    gain: Tensor,
    normalize: bool,
    *options: Any,
) -> Tensor:
    lists = {"indices": indices, "counts": counts, "gain": gain}
    return attention_fake(query, key, value, **lists, **_older(options))[0]


def _older(options: tuple[Any, ...]) -> dict[str, Any]:
    """The options that these ops have by position."""
    return dict(zip(OLDER_OPTIONS, options, strict=True))


torch.library.register_fake("attnrb::source_attention", _source_attention_fake)
torch.library.register_fake("attnrb::rebalanced_attention", _rebalanced_attention_fake)
