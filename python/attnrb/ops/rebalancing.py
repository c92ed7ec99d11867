"""The two operations of re-balancing: attention at the source layer, and in the layers that its outliers reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnrb.ops import training
from attnrb.ops.attention import attend_unchecked, attention_fake, dispatch, gradients
from attnrb.ops.edit import NO_EDIT, RULES, EditArguments, gain_tensor
from attnrb.ops.operands import check_threshold, op_first, operands
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
        visibility: which keys a query may see: a `attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.

    Returns:
        ``(output, lse, outliers)``: output ``[B, H, M, Dv]`` in the dtype of ``query``, laid out in memory as
        ``[B, M, H, Dv]``; the log-sum-exp of each row, float32 ``[B, H, M]``; `attnrb.Outliers`.

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
        outliers: ``(indices, counts)`` of `source_attention` for the same queries and heads; rows must ascend.
        gain: a number, or one for each head: a sequence or a tensor ``[H]``. A float32 tensor costs nothing to pass.
        normalize: whether the weights of a row sum to 1 again.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        visibility: which keys a query may see: a `attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.

    Returns:
        ``[B, H, M, Dv]`` in the dtype of ``query``, laid out in memory as ``[B, M, H, Dv]``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit, or a row of ``outliers`` does not ascend.
    """
    # A lone tensor would unpack too, along its first axis.
    if not isinstance(outliers, tuple) or len(outliers) != 2:
        raise TypeError(f"outliers: expected a tuple (indices, counts), got {describe(outliers)}")
    indices, counts = outliers
    rule = RULES.index("row" if normalize else "none")
    seeing, scoring = visibility_arguments(visibility), score_arguments(scale, softcap, sinks)
    try:
        if not (isinstance(gain, Tensor) and gain.dtype is torch.float32 and gain.dim() == 1):
            gain = gain_tensor(gain, query.device, promoted(query.dtype))
        if op_first(query, key, value, gain, sinks):
            edit = EditArguments(indices, counts, gain, rule)
            # The log-sum-exp, and options by name, would show in so short a call.
            return attend_unchecked(query, key, value, edit, None, seeing, *scoring, rows_first=False)[0]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        pass  # see Note: [Short calls]
    query, key, value = operands(query, key, value)
    edit = EditArguments(indices, counts, gain_tensor(gain, query.device, promoted(query.dtype)), rule)
    return dispatch(query, key, value, edit, None, seeing, scoring).output


# The native ops of these names are for callers of torch.ops; the functions above call `attention`. So a gradient that
# is registered for them costs nobody else anything.


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


def _source_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, *options = inputs
    training.keep(ctx, _older(tuple(options)), query, key, value, *output[:2])
    ctx.mark_non_differentiable(*output[2:])


def _source_gradient(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None and grad_lse is None:
        return (None,) * (4 + len(OLDER_OPTIONS))
    tensors, options = training.kept(ctx)
    rows, found = gradients(grad_output, grad_lse, tensors, options)
    return (*rows, None, *(found.get(name) for name in OLDER_OPTIONS))


def _rebalanced_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, indices, counts, gain, normalize, *options = inputs
    rule = RULES.index("row" if normalize else "none")
    edit = {"indices": indices, "counts": counts, "gain": gain, "rule": rule}
    training.keep(ctx, edit | _older(tuple(options)), query, key, value)


def _rebalanced_gradient(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None:
        return (None,) * (7 + len(OLDER_OPTIONS))
    rows, options = training.kept(ctx)
    output, lse, *_ = torch.ops.attnrb.attention(*rows, **options)  # the op returns no log-sum-exp, which this needs
    found_rows, found = gradients(grad_output, None, (*rows, output, lse), options)
    return (*found_rows, None, None, found.get("gain"), None, *(found.get(name) for name in OLDER_OPTIONS))


torch.library.register_fake("attnrb::source_attention", _source_attention_fake)
torch.library.register_fake("attnrb::rebalanced_attention", _rebalanced_attention_fake)
torch.library.register_autograd("attnrb::source_attention", _source_gradient, setup_context=_source_setup)
torch.library.register_autograd("attnrb::rebalanced_attention", _rebalanced_gradient, setup_context=_rebalanced_setup)
