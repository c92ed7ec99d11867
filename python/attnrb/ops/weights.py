"""The attention weights of one layer as a matrix, for those who ask to see them.

Note: [Weights on request]
Models return their weights with ``output_attentions=True``. The ops never have them, so they are computed anew, eagerly
and in float32: ``4 B H M N`` bytes for each of a few copies, and as many of ``query``'s dtype for every layer that the
model keeps. Output and weights of a layer agree up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import Visibility

__all__ = ["attention_weights"]


def attention_weights(
    query: Tensor,
    key: Tensor,
    outliers: Outliers | None,
    gain: Tensor | None,
    *,
    visibility: Visibility,
    normalize: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention weights, re-balanced where there is a gain: ``A · (1 + gain · [outlier])``.

    Args:
        query: ``[B, H, M, D]``.
        key: ``[B, Hk, N, D]``.
        outliers: those of the source layer for the same queries; None: every entry counts as one.
        gain: float32 ``[H]`` or ``[1]``; None: plain attention.
        visibility: which keys a query may see; ``query_offset`` must be given.
        normalize: divide each row by what it then sums to, a sink's share included.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        softcap: scores become ``softcap · tanh(score / softcap)``.
        sinks: ``[H]``: one more score of each row, in the softmax denominator only.

    Returns:
        ``[B, H, M, N]`` in the dtype of ``query``; a query that sees no key has zeros.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    grouped = query.float().reshape(batch, key.shape[1], -1, queries, width)
    scores = (grouped @ key.float()[:, :, None].transpose(3, 4)).flatten(1, 2) * (
        width**-0.5 if scale is None else scale
    )
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible_keys(visibility, queries, keys, query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, heads, 1, 1).expand(batch, heads, queries, 1)], dim=3)
    weights = torch.softmax(scores, dim=3)[..., :keys].nan_to_num(0.0)
    if gain is None:
        return weights.to(query.dtype)
    added = gain.view(1, -1, 1, 1) * weights
    if outliers is not None:
        added = added * _held(outliers, visibility.key_offset, keys)
    total = 1.0 + added.sum(3, keepdim=True) if normalize else 1.0
    return ((weights + added) / total).to(query.dtype)


def visible_keys(visibility: Visibility, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool, broadcastable to ``[B, H, M, N]``: what `Visibility` says, as a matrix."""
    assert visibility.query_offset is not None
    query_slots = visibility.query_offset + torch.arange(queries, device=device)[:, None]
    key_slots = visibility.key_offset + torch.arange(keys, device=device)[None]
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if visibility.causal or (visibility.causal is None and visibility.mask is None):
        seen = seen & (key_slots <= query_slots)
    if visibility.window is not None:
        seen = seen & (key_slots > query_slots - visibility.window)
    if visibility.key_start is not None:
        seen = seen & (key_slots >= visibility.key_start[:, None, None, None])
    if visibility.key_end is not None:
        seen = seen & (key_slots < visibility.key_end[:, None, None, None])
    if visibility.mask is not None:
        seen = seen & visibility.mask
    return seen


def _held(outliers: Outliers, key_offset: int, keys: int) -> Tensor:
    """Which of the keys that this layer holds are outliers: bool ``[B, H, M, N]``."""
    indices, counts = outliers
    positions = indices.long() - key_offset
    listed = torch.arange(indices.shape[3], device=indices.device) < counts[..., None]
    positions = torch.where(listed & (positions >= 0) & (positions < keys), positions, keys)
    held = torch.zeros(*counts.shape, keys + 1, dtype=torch.bool, device=indices.device)
    return held.scatter(3, positions, True)[..., :keys]
