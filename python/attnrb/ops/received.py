"""How much attention each key receives."""

from __future__ import annotations

import torch
from torch import Tensor

from attnrb.ops import dense, training
from attnrb.ops.edit import EditArguments
from attnrb.ops.operands import check_one_device, check_shapes, operands, records_gradient
from attnrb.ops.scores import score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments

__all__ = ["received_attention"]

_received_attention = torch.ops.attnrb.received_attention.default


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
    query, key, _ = operands(query, key, key)
    seeing = visibility_arguments(visibility, query.size(2), key.size(2))
    scoring = score_arguments(query, scale, softcap, sinks)
    if query.dtype == torch.float64 or seeing.beyond_old_ops:
        check_shapes(query, key, key, EditArguments(), seeing, scoring)
        return dense.received_attention(query, key, EditArguments(), seeing, scoring)
    options = (*seeing.for_old_ops(), *scoring)
    result: Tensor
    if records_gradient(query, key, sinks):
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
    check_one_device(query=query, key=key, key_start=key_start, key_end=key_end, mask=mask, sinks=sinks)
    return query.new_empty((query.shape[0], query.shape[1], key.shape[2]), dtype=torch.float32)


torch.library.register_fake("attnrb::received_attention", _received_attention_fake)
