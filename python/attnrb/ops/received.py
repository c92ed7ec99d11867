"""How much attention each key receives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrb.ops import dense, training
from attnrb.ops.edit import Edit, edit_arguments
from attnrb.ops.operands import check_one_device, check_shapes, native, operands, records_gradient
from attnrb.ops.refusals import native_op
from attnrb.ops.scores import OLDER_OPTIONS, score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments

__all__ = ["received_attention"]

# The overload `edited` has the options that came later, which the first form of the op lacks.
_received_attention = native_op(torch.ops.attnrb.received_attention.edited)
_received_training = native_op(torch.ops.attnrb.received_attention_training.default)
_received_backward = native_op(torch.ops.attnrb.received_attention_backward.default)

_LATER = {"key_bias": None, "first_query": None, "query_offsets": None, "chunk": 0}
_OPTIONS = (*OLDER_OPTIONS, *_LATER)


def received_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    visibility: Visibility | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    first_query: int | Tensor | None = None,
) -> Tensor:
    """How much attention each key receives: the mean weight that the queries which can see it give it.

    No ``[M, N]`` matrix is built.

    Args:
        query: ``[B, H, M, D]``, float32, bfloat16, float16 or float64, any strides.
        key: ``[B, Hk, N, D]``, dtype and device of ``query``.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        visibility: which keys a query may see: a `attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.
        key_bias: floating ``[B, H, N']``, as in `attnrb.Edit`: added to the scores; -inf removes a key.
        first_query: likewise: the slot from which on queries have the bias.

    Returns:
        float32 ``[B, H, N]``, contiguous; 0 for a key that no query can see.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit.
    """
    query, key, _ = operands(query, key, key)
    edit = edit_arguments(Edit(key_bias=key_bias, first_query=first_query), query)
    seeing, scoring = visibility_arguments(visibility), score_arguments(scale, softcap, sinks)
    if not native(query):
        check_shapes(query, key, key, edit, seeing, scoring)
        return dense.received_attention(query, key, edit, seeing, scoring)
    older = (*seeing.for_older_ops(query.size(2), key.size(2)), *scoring.for_older_ops(query.size(3)))
    later = (edit.key_bias, edit.first_query, seeing.query_offsets, seeing.chunk)
    result: Tensor
    if records_gradient(query, key, edit.key_bias, sinks):
        result, _ = _received_training(query, key, *older, *later)
    else:
        result = _received_attention(query, key, *older, **dict(zip(_LATER, later, strict=True)))
    return result


# ------------------------------------------------------------------------------------------------ as torch knows it


def _received_fake(query: Tensor, key: Tensor, *positional: Any, **keywords: Any) -> Tensor:
    check_one_device(query=query, key=key, **dict(zip(_OPTIONS, positional, strict=False)), **keywords)
    return query.new_empty((query.shape[0], query.shape[1], key.shape[2]), dtype=torch.float32)


def _training_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _received_fake(query, *rest), query.new_empty(query.shape[:3], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *options = inputs
    training.keep(ctx, dict(zip(_OPTIONS, options, strict=True)), query, key, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad_received: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_received is None:
        return (None,) * (2 + len(_OPTIONS))
    (query, key, lse), options = training.kept(ctx)
    *rows, sinks, key_bias = _received_backward(grad_received, query, key, lse, *(options[name] for name in _OPTIONS))
    found: dict[str, Tensor] = {}
    if options["key_bias"] is not None:
        found["key_bias"] = key_bias
    if options["sinks"] is not None:
        found["sinks"] = sinks.to(options["sinks"].dtype)
    return (*rows, *(found.get(name) for name in _OPTIONS))


def _backward_fake(
    grad_received: Tensor, query: Tensor, key: Tensor, lse: Tensor, *positional: Any
) -> tuple[Tensor, ...]:
    options = _LATER | dict(zip(_OPTIONS, positional, strict=False))
    check_one_device(query=query, key=key, lse=lse, grad_received=grad_received, **options)
    bias = training.like_bias(query, options["key_bias"])
    return training.like_rows(query), training.like_rows(key), training.like_heads(query), bias


for _overload in ("", ".edited"):
    torch.library.register_fake(f"attnrb::received_attention{_overload}", _received_fake)
torch.library.register_fake("attnrb::received_attention_training", _training_fake)
torch.library.register_autograd("attnrb::received_attention_training", _gradient, setup_context=_setup)
training.register_backward("attnrb::received_attention_backward", _backward_fake)
