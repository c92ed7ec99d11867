"""Outliers and re-balancing of attention weights that stand in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnrb.ops import dense
from attnrb.ops.edit import NO_EDIT, gain_tensor
from attnrb.ops.operands import check_gain_values, check_one_device, check_operand, check_threshold, native
from attnrb.ops.refusals import native_op
from attnrb.ops.scores import promoted
from attnrb.ops.training import second_derivative
from attnrb.ops.visibility import describe

__all__ = ["outlier_mask", "rebalance"]

# Looked up once: torch.ops resolves overloads at every call.
_outlier_mask = native_op(torch.ops.attnrb.outlier_mask.default)
_rebalance = native_op(torch.ops.attnrb.rebalance.default)
_rebalance_per_head = native_op(torch.ops.attnrb.rebalance.per_head)
_rebalance_backward = native_op(torch.ops.attnrb.rebalance_backward.default)


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
    check_operand("weights", weights)
    check_threshold(threshold)
    if query_offset is None:
        query_offset = weights.size(3) - weights.size(2)
    if not native(weights):
        return dense.outlier_mask(weights, threshold, query_offset)
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
    check_operand("weights", weights)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {describe(mask)}")
    dtype = promoted(weights.dtype)
    if isinstance(gain, (int, float)) and native(weights):
        simple: Tensor = _rebalance(weights, mask, gain, normalize)
        return simple
    gains = gain_tensor(gain, weights.device, dtype)
    check_gain_values(NO_EDIT._replace(gain=gains))
    if native(weights):
        result: Tensor = _rebalance_per_head(weights, mask, gains, normalize)
    else:
        result = dense.rebalance(weights.to(dtype), mask, gains, normalize).to(weights.dtype).contiguous()
    return result


def _rebalance_fake(weights: Tensor, mask: Tensor, gain: float | Tensor, normalize: bool) -> Tensor:
    check_one_device(weights=weights, mask=mask, gain=gain)
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
    check_one_device(weights=weights, grad_output=grad_output, mask=mask, gain=gain)
    return weights.new_empty(weights.shape), weights.new_empty((weights.shape[1],), dtype=torch.float32)


for _name in ("attnrb::rebalance", "attnrb::rebalance.per_head"):
    torch.library.register_fake(_name, _rebalance_fake)
    torch.library.register_autograd(_name, _rebalance_gradient, setup_context=_rebalance_setup)
torch.library.register_fake("attnrb::rebalance_backward", _rebalance_backward_fake)
torch.library.register_autograd("attnrb::rebalance_backward", second_derivative)
