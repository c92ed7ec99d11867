"""Attention with an edit: `torch.ops.attnrb.attention` and the function that calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrb.ops import dense, rebalancing
from attnrb.ops.edit import Attended, Edit, edit_arguments
from attnrb.ops.operands import check_shapes, check_threshold, operands
from attnrb.ops.outliers import Outliers
from attnrb.ops.scores import score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments

__all__ = ["attend", "attention", "attention_weights", "strengthen_everything"]


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
    everything = editing.gain if editing.indices is None else None
    if everything is not None:
        editing = editing._replace(gain=None)
    attended = Attended(*dense.attention(query, key, value, editing, emit, seeing, scoring))
    return attended if everything is None else strengthen_everything(attended, everything, editing.rule, scoring.sinks)


def strengthen_everything(attended: Attended, gain: Tensor, rule: str, sinks: Tensor | None) -> Attended:
    """Strengthen every entry of attention: ``(1 + g) / (1 + g m)`` times its output with the rule ``row``.

    A row's m is 1 less its sink's share, ``1 - exp(sink - lse)``: only where there are sinks does normalising leave
    anything of the gain. With the rule ``rest`` nobody is left to share with, and the row stays as it is.
    """
    if rule == "rest" or (rule == "row" and sinks is None):
        return attended
    factor = (1 + gain)[:, None, None]
    lse = attended.lse
    if rule == "row" and sinks is not None:
        taken = 1 - torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        divisor = 1 + gain[:, None] * taken
        factor = factor / divisor[..., None]
        lse = lse + torch.log(divisor)
    # Not in place: a backward may need the output.
    return attended._replace(output=(attended.output * factor).to(attended.output.dtype), lse=lse)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    edit: Edit | None,
    emit: float | None,
    visibility: Visibility,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Outliers | None]:
    """Output and outliers of `attention`, without the log-sum-exp that a model's layers do not need."""
    common: dict[str, Any] = {"visibility": visibility, "scale": scale, "softcap": softcap, "sinks": sinks}
    if emit is not None and edit is None:
        output, _, outliers = rebalancing.source_attention(query, key, value, threshold=emit, **common)
        return output, outliers
    if emit is None and (edit is None or (edit.outliers is not None and edit.rule != "rest" and edit.key_bias is None)):
        if edit is None or edit.outliers is None or edit.gain is None:
            counts = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
            none = Outliers(counts.new_empty((*counts.shape, 0)), counts)
            return rebalancing.rebalanced_attention(query, key, value, none, 0.0, **common), None
        normalize = edit.rule == "row"
        output = rebalancing.rebalanced_attention(
            query, key, value, edit.outliers, edit.gain, normalize=normalize, **common
        )
        return output, None
    attended = attention(query, key, value, edit=edit, emit=emit, **common)
    return attended.output, attended.outliers


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
    """The weights of `attention` as a matrix, for those who ask to see them.

    Models return their weights with ``output_attentions=True``. No op has them: they are computed again here, in
    float32 (float64 for float64), ``4 B H M N`` bytes, and as many of ``query``'s dtype for every layer that a model
    keeps. Output and weights of a layer agree up to rounding.

    Args:
        query: ``[B, H, M, D]``.
        key: ``[B, Hk, N, D]``.
        edit: as `attention` has it.
        visibility: likewise.
        scale: likewise.
        softcap: likewise.
        sinks: likewise.

    Returns:
        ``[B, H, M, N]`` in the dtype of ``query``; 0 where a query sees no key.
    """
    editing = edit_arguments(edit, query.size(0), query.device, query.dtype)
    everything = editing.gain if editing.indices is None else None
    if everything is not None:
        editing = editing._replace(gain=None)
    seeing = visibility_arguments(visibility, query.size(2), key.size(2))
    scoring = score_arguments(query, scale, softcap, sinks)
    check_shapes(query, key, key, editing, seeing, scoring)
    weights = dense.attention_weights(query, key, editing, seeing, scoring)
    if everything is None:
        return weights
    lse = torch.log(weights.float().sum(3)) if sinks is None else _sink_lse(weights, sinks)
    return strengthen_everything(Attended(weights, lse, None), everything, editing.rule, sinks).output


def _sink_lse(weights: Tensor, sinks: Tensor) -> Tensor:
    """The log-sum-exp of rows of which the sink took what the weights leave of 1."""
    return sinks.float()[:, None] - torch.log1p(-weights.float().sum(3))
