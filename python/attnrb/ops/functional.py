"""The operations of re-balancing, on plain tensors.

Each section holds one operation: the public function, what ``torch.compile`` needs to know of its native op, and its
gradient where it has one. The native ops are ``torch.ops.attnrb.*``; ``docs/method.md`` derives the formulas.

Axes: ``B`` batch, ``H`` query heads, ``Hk`` key/value heads (H a multiple of Hk), ``M`` queries, ``N`` keys, ``D``
query and key width, ``Dv`` value width. The attention functions read any strides and never repeat keys for grouped
heads.

All are differentiable, once, where an input is (`attnrb.ops.training`); outlier sets carry no gradient. Under autocast
the attention functions compute in its dtype, as PyTorch's own attention does. float64 inputs take a plain path
(`attnrb.ops.plain`): dense and slow, and good for ``torch.autograd.gradcheck``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnrb import _C
from attnrb.ops import plain, training
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import Visibility, describe, visibility_arguments

__all__ = ["outlier_mask", "rebalance", "rebalanced_attention", "received_attention", "source_attention"]

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*NATIVE_DTYPES, torch.float64)

# Looked up once: torch.ops resolves overloads anew at every call.
_outlier_mask = torch.ops.attnrb.outlier_mask.default
_rebalance = torch.ops.attnrb.rebalance.default
_rebalance_per_head = torch.ops.attnrb.rebalance.per_head
_rebalance_backward = torch.ops.attnrb.rebalance_backward.default
_source_attention = torch.ops.attnrb.source_attention.default
_rebalanced_attention = torch.ops.attnrb.rebalanced_attention.default
_received_attention = torch.ops.attnrb.received_attention.default


# ---------------------------------------------------------------------------------------------------- outlier_mask


def outlier_mask(weights: Tensor, threshold: float = 0.01, *, query_offset: int | None = None) -> Tensor:
    """Mark the outliers of attention weights that stand in memory.

    ``mask[b, h, i, j] = weights[b, h, i, j] > threshold and j != query_offset + i``: strictly above, and a query's own
    key never counts (arXiv 2403.14932, section 3).

    Args:
        weights: ``[B, H, M, N]``, float32, bfloat16, float16 or float64.
        threshold: between 0 and 1, both excluded.
        query_offset: the key that is the first query's own. The default is ``N - M``: the last query on the last key.

    Returns:
        bool ``[B, H, M, N]``, contiguous. It carries no gradient.

    Raises:
        TypeError: ``weights`` is no tensor of those dtypes.
        ValueError: ``weights`` has not four dimensions, or ``threshold`` is out of range.
    """
    _check_operand("weights", weights)
    _check_threshold(threshold)
    if query_offset is None:
        query_offset = weights.size(3) - weights.size(2)
    if weights.dtype == torch.float64:
        return plain.outlier_mask(weights, threshold, query_offset)
    result: Tensor = _outlier_mask(weights, threshold, query_offset)
    return result


def _outlier_mask_fake(weights: Tensor, threshold: float, query_offset: int) -> Tensor:
    return weights.new_empty(weights.shape, dtype=torch.bool)


torch.library.register_fake("attnrb::outlier_mask", _outlier_mask_fake)


# ------------------------------------------------------------------------------------------------------- rebalance


def rebalance(
    weights: Tensor, mask: Tensor, gain: float | Sequence[float] | Tensor, *, normalize: bool = False
) -> Tensor:
    """Strengthen the marked entries of attention weights that stand in memory.

    ``out = weights · (1 + gain)`` where ``mask``, ``weights`` elsewhere. Differentiable in ``weights`` and in a
    ``gain`` tensor.

    Args:
        weights: ``[B, H, M, N]``, float32, bfloat16, float16 or float64.
        mask: bool, broadcastable to ``weights``.
        gain: a number, or one for each head: a sequence or a tensor ``[H]``.
        normalize: divide each row by its new sum. A row that sums to zero stays as it is.

    Returns:
        Shape and dtype of ``weights``, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: the shapes do not fit, or ``gain`` is not finite.
    """
    _check_operand("weights", weights)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {describe(mask)}")
    if weights.dtype == torch.float64:
        return plain.rebalance(weights, mask, _gain_tensor(gain, weights.device, torch.float64), normalize)
    if isinstance(gain, (int, float)):
        result: Tensor = _rebalance(weights, mask, gain, normalize)
    else:
        result = _rebalance_per_head(weights, mask, _gain_tensor(gain, weights.device), normalize)
    return result


def _rebalance_fake(weights: Tensor, mask: Tensor, gain: float | Tensor, normalize: bool) -> Tensor:
    _check_one_device(weights=weights, mask=mask, gain=gain)
    return weights.new_empty(weights.shape)


def _rebalance_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float | Tensor, bool], output: Tensor) -> None:
    weights, mask, gain, ctx.normalize = inputs
    ctx.gain = None if isinstance(gain, Tensor) else gain
    ctx.save_for_backward(weights, mask, *([gain] if isinstance(gain, Tensor) else []))


def _rebalance_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
    weights, mask, *gains = ctx.saved_tensors
    gain = gains[0] if gains else weights.new_full((1,), ctx.gain, dtype=torch.float32)
    grad_weights, grad_gain = _rebalance_backward(grad, weights, mask, gain, ctx.normalize)
    if not gains:
        return grad_weights, None, None, None
    return grad_weights, None, grad_gain.sum(0, keepdim=True) if gain.shape[0] == 1 else grad_gain, None


def _rebalance_backward_fake(
    grad_output: Tensor, weights: Tensor, mask: Tensor, gain: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    _check_one_device(weights=weights, grad_output=grad_output, mask=mask, gain=gain)
    return weights.new_empty(weights.shape), weights.new_empty((weights.shape[1],), dtype=torch.float32)


for _name in ("attnrb::rebalance", "attnrb::rebalance.per_head"):
    torch.library.register_fake(_name, _rebalance_fake)
    torch.library.register_autograd(_name, _rebalance_gradient, setup_context=_rebalance_setup)
torch.library.register_fake("attnrb::rebalance_backward", _rebalance_backward_fake)
torch.library.register_autograd("attnrb::rebalance_backward", training.second_derivative)


# ------------------------------------------------------------------------------------------------ source_attention


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
    query, key, value = _operands(query, key, value)
    _check_threshold(threshold)
    options = (
        *visibility_arguments(visibility, query.size(2), key.size(2)),
        *_score_arguments(query, scale, softcap, sinks),
    )
    if query.dtype == torch.float64:
        return plain.source_attention(query, key, value, threshold, *options)
    op = training.source_attention if training.records_gradient(query, key, value, sinks) else _source_attention
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
    _check_one_device(query=query, key=key, value=value, key_start=key_start, key_end=key_end, mask=mask, sinks=sinks)
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
    query, key, value = _operands(query, key, value)
    # A lone tensor would unpack too, along its first axis.
    if not isinstance(outliers, tuple) or len(outliers) != 2:
        raise TypeError(f"outliers: expected a tuple (indices, counts), got {describe(outliers)}")
    indices, counts = outliers
    options = (
        *visibility_arguments(visibility, query.size(2), key.size(2)),
        *_score_arguments(query, scale, softcap, sinks),
    )
    if query.dtype == torch.float64:
        gain = _gain_tensor(gain, query.device, torch.float64)
        return plain.rebalanced_attention(query, key, value, indices, counts, gain, normalize, *options)
    gain = _gain_tensor(gain, query.device)
    result: Tensor
    if training.records_gradient(query, key, value, sinks, gain):
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
    _check_one_device(query=query, key=key, value=value, indices=indices, counts=counts, gain=gain)
    _check_one_device(query=query, key_start=key_start, key_end=key_end, mask=mask, sinks=sinks)
    return _attention_output(query, value)


torch.library.register_fake("attnrb::rebalanced_attention", _rebalanced_attention_fake)


# ---------------------------------------------------------------------------------------------- received_attention


def received_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    visibility: Visibility | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """How much attention each key receives: the mean weight that the queries which can see it give it.

    No ``[M, N]`` matrix is built.

    Args:
        query: ``[B, H, M, D]``, float32, bfloat16, float16 or float64, any strides.
        key: ``[B, Hk, N, D]``, dtype and device of ``query``.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        visibility: which keys a query may see: a :class:`attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.

    Returns:
        float32 ``[B, H, N]``, contiguous; 0 for a key that no query can see.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit.
    """
    query, key, _ = _operands(query, key, key)
    options = (
        *visibility_arguments(visibility, query.size(2), key.size(2)),
        *_score_arguments(query, scale, softcap, sinks),
    )
    if query.dtype == torch.float64:
        return plain.received_attention(query, key, *options)
    result: Tensor
    if training.records_gradient(query, key, sinks):
        result, _ = training.received_attention(query, key, *options)
    else:
        result = _received_attention(query, key, *options)
    return result


def _received_attention_fake(
    query: Tensor,
    key: Tensor,
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
    _check_one_device(query=query, key=key, key_start=key_start, key_end=key_end, mask=mask, sinks=sinks)
    return query.new_empty((query.shape[0], query.shape[1], key.shape[2]), dtype=torch.float32)


torch.library.register_fake("attnrb::received_attention", _received_attention_fake)

training.register(_source_attention_fake, _rebalanced_attention_fake, _received_attention_fake)


# ------------------------------------------------------------------------------------------------- shared by several


def _operands(query: Any, key: Any, value: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Checked, and in the dtype of autocast where that is on.

    Refuses what the C++ checks could only call a ValueError.
    """
    if isinstance(query, Tensor) and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    # One condition for the good case: this runs at every layer of every decoded token.
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.dim() == key.dim() == 4
    ):
        for name, operand in (("query", query), ("key", key), ("value", value)):
            _check_operand(name, operand)
            if operand.dtype != query.dtype:
                raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {operand.dtype}")
    if query.dtype == torch.float64:
        plain.check_shapes(query, key, value)
    return query, key, value


def _check_operand(name: str, operand: Any) -> None:
    if not isinstance(operand, Tensor) or operand.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected a tensor of dtype float32, bfloat16, float16 or float64, got {describe(operand)}"
        )
    if operand.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got {operand.dim()}: {tuple(operand.shape)}")


def _check_threshold(threshold: float) -> None:
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold: expected a number between 0 and 1, both excluded, got {threshold}")


def _score_arguments(
    query: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[float, float, Tensor | None]:
    """As the ops take them: scale, softcap (0: none), sinks."""
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_floating_point()):
        raise TypeError(f"sinks: expected a floating-point tensor [H], got {describe(sinks)}")
    if scale is None:
        width = query.size(-1)
        scale = width**-0.5 if width > 0 else 1.0  # the op refuses a width of 0 by name
    return scale, softcap or 0.0, sinks


def _gain_tensor(gain: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gain as the ops take it: float32 [1] or [H]; float64 for the plain path."""
    if isinstance(gain, Tensor):
        if gain.dtype == dtype and gain.dim() == 1:
            return gain
        if not gain.is_floating_point():
            raise TypeError(f"gain: expected numbers or a floating-point tensor, got {describe(gain)}")
        return (gain.reshape(1) if gain.dim() == 0 else gain).to(dtype)
    if isinstance(gain, (int, float)):
        _check_finite("gain", gain)
        return torch.full((1,), gain, dtype=dtype, device=device)
    try:
        gains = [float(each) for each in (gain if isinstance(gain, Sequence) else [gain])]
    except (TypeError, ValueError):
        raise TypeError(f"gain: expected a number, or one for each head, got {describe(gain)}") from None
    for each in gains:
        _check_finite("gain", each)
    return torch.tensor(gains, dtype=dtype, device=device)


def _check_finite(name: str, value: float) -> None:
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite() of a dynamic float
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _attention_output(query: Tensor, value: Tensor) -> Tensor:
    """Like the output of the attention ops: [B, H, M, Dv] in memory laid out as [B, M, H, Dv]."""
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


def _check_one_device(**arguments: Any) -> None:
    # A meta tensor among others brings the call here, where nothing else would notice the mixture.
    devices = {name: tensor.device for name, tensor in arguments.items() if isinstance(tensor, Tensor)}
    first = next(iter(devices))
    for name, device in devices.items():
        if device != devices[first]:
            raise ValueError(f"{name}: expected on {devices[first]}, where {first} is, got {device}")
