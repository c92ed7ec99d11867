"""What training needs of the native ops: keeping options for a backward, and laying gradients out.

An op for inference has no gradient registered, which would cost each call several microseconds that decoding should
not pay. It has a twin, ``…_training``, that has one, and the functions call that only while gradients are recorded and
an input requires one. The native backward ops compute weights again from the log-sum-exp that the forward left
(docs/method.md, Gradients), so nothing of size M×N is kept.

Outlier sets carry no gradient, and there is no second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["keep", "kept", "like_heads", "like_rows", "register_backward", "second_derivative"]


def keep(ctx: Any, options: dict[str, Any], *tensors: Tensor) -> None:
    """Hold ``tensors`` and an op's options by name for the backward."""
    ctx.numbers = {name: option for name, option in options.items() if not isinstance(option, Tensor)}
    ctx.tensor_names = [name for name, option in options.items() if isinstance(option, Tensor)]
    ctx.save_for_backward(*tensors, *(options[name] for name in ctx.tensor_names))
    ctx.set_materialize_grads(False)


def kept(ctx: Any) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """The tensors that `keep` was given, and the options."""
    saved = ctx.saved_tensors
    count = len(saved) - len(ctx.tensor_names)
    return saved[:count], ctx.numbers | dict(zip(ctx.tensor_names, saved[count:], strict=True))


def like_rows(tensor: Tensor) -> Tensor:
    """The gradient of ``tensor [B, heads, rows, width]``, laid out as the backward ops do: [B, rows, heads, width]."""
    batch, heads, rows, width = tensor.shape
    return tensor.new_empty((batch, rows, heads, width)).transpose(1, 2)


def like_heads(query: Tensor) -> Tensor:
    """A gradient that has one number for each head."""
    return query.new_empty((query.shape[1],), dtype=torch.float32)


def like_bias(query: Tensor, key_bias: Tensor | None) -> Tensor:
    """The gradient of a key bias; empty without one."""
    return query.new_empty((0,) if key_bias is None else key_bias.shape, dtype=torch.float32)


def second_derivative(ctx: Any, *gradients: Any) -> Any:
    """The backward of every backward op: there is none."""
    raise NotImplementedError(
        "the functions of attnrb have no second derivative: leave create_graph False, or pass float64 inputs, which "
        "plain PyTorch serves, slowly and with every derivative"
    )


def register_backward(name: str, fake: Any) -> None:
    """Tell torch of a backward op: what it returns, and that it has no gradient itself."""
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, second_derivative)
