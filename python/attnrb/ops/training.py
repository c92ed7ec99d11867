"""What training needs of the attention ops: their differentiable twins and how gradients run through them.

`attnrb.functional` calls a twin only while gradients are recorded and an input requires one: a registered gradient
costs each call several microseconds, which decoding should not pay. The formulas are those of docs/method.md,
Gradients; the native backward ops compute weights anew from the log-sum-exp that the forward left, so nothing of size
M×N is kept.

Outlier sets carry no gradient, and there is no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rebalanced_attention", "received_attention", "second_derivative", "source_attention"]

source_attention = torch.ops.attnrb.source_attention_training.default
rebalanced_attention = torch.ops.attnrb.rebalanced_attention_training.default
received_attention = torch.ops.attnrb.received_attention_training.default

_source_backward = torch.ops.attnrb.source_attention_backward.default
_rebalanced_backward = torch.ops.attnrb.rebalanced_attention_backward.default
_received_backward = torch.ops.attnrb.received_attention_backward.default

# How many arguments say what is visible (key_start, key_end and mask last) and how scores are made (sinks last).
_VISIBILITY, _SCORING = 7, 3


def _save(ctx: Any, options: tuple[Any, ...], *tensors: Tensor) -> None:
    """Keep ``tensors`` and the ten arguments of visibility and scoring for the backward."""
    *numbers, key_start, key_end, mask, scale, softcap, sinks = options
    ctx.numbers, ctx.score = numbers, (scale, softcap)
    ctx.save_for_backward(key_start, key_end, mask, sinks, *tensors)
    ctx.set_materialize_grads(False)


def _restore(ctx: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors that `_save` kept, and the ten arguments."""
    key_start, key_end, mask, sinks, *tensors = ctx.saved_tensors
    return tensors, (*ctx.numbers, key_start, key_end, mask, *ctx.score, sinks)


def _option_gradients(grad_sinks: Tensor, sinks: Tensor | None) -> tuple[Tensor | None, ...]:
    """For each of the ten arguments its gradient: sinks may have one."""
    return (*[None] * (_VISIBILITY + _SCORING - 1), None if sinks is None else grad_sinks.to(sinks.dtype))


def _rows_like(tensor: Tensor) -> Tensor:
    """The gradient of ``tensor [B, heads, rows, width]``, laid out as the backward ops do: [B, rows, heads, width]."""
    batch, heads, rows, width = tensor.shape
    return tensor.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _heads_like(query: Tensor) -> Tensor:
    return query.new_empty((query.shape[1],), dtype=torch.float32)


def _log_sum_exp_like(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def second_derivative(ctx: Any, *gradients: Any) -> Any:
    """The backward of every backward op: there is none."""
    raise NotImplementedError(
        "the functions of attnrb have no second derivative: leave create_graph False, or pass float64 inputs, which "
        "plain PyTorch serves, slowly and with every derivative"
    )


# ------------------------------------------------------------------------------------------------ source_attention


def _source_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, *options = inputs
    _save(ctx, tuple(options), query, key, value, *output[:2])
    ctx.mark_non_differentiable(*output[2:])


def _source_gradient(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (query, key, value, output, lse), options = _restore(ctx)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    *gradients, grad_sinks = _source_backward(grad_output, grad_lse, query, key, value, output, lse, *options)
    return (*gradients, None, *_option_gradients(grad_sinks, options[-1]))


def _source_backward_fake(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _rows_like(query), _rows_like(key), _rows_like(value), _heads_like(query)


# -------------------------------------------------------------------------------------------- rebalanced_attention


def _rebalanced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, indices, counts, gain, ctx.normalize, *options = inputs
    _save(ctx, tuple(options), query, key, value, *output, indices, counts, gain)
    ctx.mark_non_differentiable(output[1])


def _rebalanced_gradient(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None:
        return (None,) * (7 + _VISIBILITY + _SCORING)
    tensors, options = _restore(ctx)
    *gradients, grad_gain, grad_sinks = _rebalanced_backward(grad_output, *tensors, ctx.normalize, *options)
    if tensors[-1].shape[0] == 1:  # one gain for all heads
        grad_gain = grad_gain.sum(0, keepdim=True)
    return (*gradients, None, None, grad_gain, None, *_option_gradients(grad_sinks, options[-1]))


def _rebalanced_backward_fake(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _rows_like(query), _rows_like(key), _rows_like(value), _heads_like(query), _heads_like(query)


# ---------------------------------------------------------------------------------------------- received_attention


def _received_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *options = inputs
    _save(ctx, tuple(options), query, key, output[1])
    ctx.mark_non_differentiable(output[1])


def _received_gradient(ctx: Any, grad_received: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_received is None:
        return (None,) * (2 + _VISIBILITY + _SCORING)
    (query, key, lse), options = _restore(ctx)
    *gradients, grad_sinks = _received_backward(grad_received, query, key, lse, *options)
    return (*gradients, *_option_gradients(grad_sinks, options[-1]))


def _received_backward_fake(grad_received: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _rows_like(query), _rows_like(key), _heads_like(query)


# ---------------------------------------------------------------------------------------------------- registration


def register(source_fake: Any, rebalanced_fake: Any, received_fake: Any) -> None:
    """Tell torch of the twins. The arguments are the fakes of the inference ops, which return the same and less."""

    def rebalanced_training_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return rebalanced_fake(query, *rest), _log_sum_exp_like(query)

    def received_training_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return received_fake(query, *rest), _log_sum_exp_like(query)

    for name, fake, setup, gradient, backward_fake in (
        ("source", source_fake, _source_setup, _source_gradient, _source_backward_fake),
        ("rebalanced", rebalanced_training_fake, _rebalanced_setup, _rebalanced_gradient, _rebalanced_backward_fake),
        ("received", received_training_fake, _received_setup, _received_gradient, _received_backward_fake),
    ):
        twin, backward = f"attnrb::{name}_attention_training", f"attnrb::{name}_attention_backward"
        torch.library.register_fake(twin, fake)
        torch.library.register_autograd(twin, gradient, setup_context=setup)
        torch.library.register_fake(backward, backward_fake)
        torch.library.register_autograd(backward, second_derivative)
