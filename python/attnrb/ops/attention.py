"""Attention with an edit: `torch.ops.attnrb.attention` and the function that calls it."""

from __future__ import annotations

from torch import Tensor

from attnrb.ops import dense
from attnrb.ops.edit import Attended, Edit, edit_arguments
from attnrb.ops.operands import check_shapes, check_threshold, operands
from attnrb.ops.scores import score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments

__all__ = ["attention", "attention_weights"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    edit: Edit | None = None,
    emit: float | None = None,
    visibility: Visibility | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Attended:
    """Attention whose weights are edited, and which may find its own outliers.

    With ``s`` the scores ``scale · query · keyᵀ`` after the softcap, ``β`` the edit's key bias and ``P = softmax(s +
    β)`` over the visible keys, :class:`attnrb.Edit` says what becomes of ``P`` before it weighs the values. No
    ``[M, N]`` matrix is built.

    Differentiable in query, key, value, sinks, and the edit's gain and key bias, through output and log-sum-exp.

    Args:
        query: ``[B, H, M, D]``, float32, bfloat16, float16 or float64, any strides.
        key: ``[B, Hk, N, D]``, dtype and device of ``query``.
        value: ``[B, Hk, N, Dv]``, likewise.
        edit: what is done to the weights. The default is nothing.
        emit: return the outliers too: the keys of each row, other than the query's own, with ``P`` above this number,
            between 0 and 1, both excluded. ``P`` includes the bias, not the gain. The default is not to.
        visibility: which keys a query may see: a :class:`attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.

    Returns:
        :class:`attnrb.Attended`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or numbers do not fit, or a row of the edit's outliers does not ascend.
    """
    query, key, value = operands(query, key, value)
    if emit is not None:
        check_threshold(emit, "emit")
    editing = edit_arguments(edit, query.size(0), query.device, query.dtype)
    seeing = visibility_arguments(visibility, query.size(2), key.size(2))
    scoring = score_arguments(query, scale, softcap, sinks)
    check_shapes(query, key, value, editing, seeing, scoring)
    return Attended(*dense.attention(query, key, value, editing, emit, seeing, scoring))


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    edit: Edit | None = None,
    visibility: Visibility | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights of :func:`attention` as a matrix, for those who ask to see them.

    Models return their weights with ``output_attentions=True``. No op has them: they are computed again here, in
    float32 (float64 for float64), ``4 B H M N`` bytes, and as many of ``query``'s dtype for every layer that a model
    keeps. Output and weights of a layer agree up to rounding.

    Args:
        query: ``[B, H, M, D]``.
        key: ``[B, Hk, N, D]``.
        edit: what is done to the weights.
        visibility: as for :func:`attention`, like the rest.
        scale: likewise.
        softcap: likewise.
        sinks: likewise.

    Returns:
        ``[B, H, M, N]`` in the dtype of ``query``; a query that sees no key has zeros.
    """
    editing = edit_arguments(edit, query.size(0), query.device, query.dtype)
    seeing = visibility_arguments(visibility, query.size(2), key.size(2))
    scoring = score_arguments(query, scale, softcap, sinks)
    check_shapes(query, key, key, editing, seeing, scoring)
    return dense.attention_weights(query, key, editing, seeing, scoring)
