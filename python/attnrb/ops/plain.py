"""The operations in plain PyTorch, for float64: dense, slow, differentiable any number of times.

`attnrb.functional` takes this path for float64 inputs, so that `torch.autograd.gradcheck` runs through modules that use
it. Everything of size M×N stands in memory. Arguments are those of the native ops; docs/method.md has the formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrb import _C
from attnrb.ops.outliers import Outliers

__all__ = ["outlier_mask", "rebalance", "rebalanced_attention", "received_attention", "source_attention"]


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what PyTorch would broadcast or complain of without naming it.

    Raises:
        ValueError: shapes do not fit, or a tensor is on another device.
    """
    batch, heads, _, width = query.shape
    key_heads = key.shape[1]
    if key.shape[0] != batch or key.shape[3] != width or width < 1:
        raise ValueError(f"key: expected [B, Hk, N, D] with B = {batch} and D = {width} >= 1, got {tuple(key.shape)}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"query: expected a number of heads that is a multiple of key's {key_heads}, got {heads}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [B, Hk, N] of key, {tuple(key.shape[:3])}, then Dv, got {tuple(value.shape)}"
        )
    for name, operand in (("key", key), ("value", value)):
        if operand.device != query.device:
            raise ValueError(f"{name}: expected on {query.device}, where query is, got {operand.device}")


def outlier_mask(weights: Tensor, threshold: float, query_offset: int, key_offset: int = 0) -> Tensor:
    """Entries above the threshold that are not the query's own; ``weights [B, H, M, N]``."""
    queries, keys = weights.shape[2:]
    own = torch.arange(keys, device=weights.device) + key_offset
    own = own == torch.arange(queries, device=weights.device)[:, None] + query_offset
    return (weights > threshold) & ~own


def rebalance(weights: Tensor, mask: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    """Marked entries times 1 + gain, each row divided by its new sum if ``normalize``."""
    boosted = torch.where(mask, weights * (1 + _per_head(gain)), weights)
    if not normalize:
        return boosted
    total = boosted.sum(-1, keepdim=True)
    return boosted / torch.where(total == 0, 1.0, total)


def source_attention(
    query: Tensor, key: Tensor, value: Tensor, threshold: float, *options: Any
) -> tuple[Tensor, Tensor, Outliers]:
    """See `attnrb.functional.source_attention`; ``options`` are the op's ten of visibility and scoring."""
    weights, lse, seen = _weights(query, key, options)
    query_offset, key_offset, keys = options[1], options[2], key.shape[2]
    chosen = outlier_mask(weights.detach(), threshold, query_offset, key_offset)
    capacity = min(_C.outlier_capacity(threshold), keys)
    slots = torch.arange(keys, device=key.device) + key_offset
    last = torch.iinfo(torch.int32).max
    # More than the capacity only where rounding pushed a row's sum above 1.
    indices = torch.where(chosen, slots, last).sort(-1).values[..., :capacity]
    counts = chosen.sum(-1).clamp(max=capacity)
    outliers = Outliers(torch.where(indices == last, -1, indices).to(torch.int32), counts.to(torch.int32))
    return _weigh(weights, value, seen), lse, outliers


def rebalanced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    gain: Tensor,
    normalize: bool,
    *options: Any,
) -> Tensor:
    """See `attnrb.functional.rebalanced_attention`; ``gain`` is ``[1]`` or ``[H]``."""
    weights, _, seen = _weights(query, key, options)
    key_offset, keys = options[2], key.shape[2]
    places = indices.long() - key_offset
    listed = torch.arange(indices.shape[3], device=key.device) < counts[..., None]
    places = torch.where(listed & (places >= 0) & (places < keys), places, keys)
    held = weights.new_zeros((*weights.shape[:3], keys + 1), dtype=torch.bool).scatter(3, places, True)[..., :keys]
    extra = weights * held * _per_head(gain)
    weights = weights + extra
    if normalize:
        # By 1 plus what was added, not by the row's sum: sinks have their share of it.
        weights = weights / (1 + extra.sum(-1, keepdim=True))
    return _weigh(weights, value, seen)


def received_attention(query: Tensor, key: Tensor, *options: Any) -> Tensor:
    """See `attnrb.functional.received_attention`."""
    weights, _, seen = _weights(query, key, options)
    return weights.sum(2) / seen.sum(2).clamp(min=1)


def _per_head(gain: Tensor) -> Tensor:
    """``[1]`` or ``[H]`` as something that broadcasts against ``[B, H, M, N]``."""
    return gain.reshape(-1, 1, 1)


def _visible(batch: int, heads: int, queries: int, keys: int, options: tuple[Any, ...], device: Any) -> Tensor:
    causal, query_offset, key_offset, window, key_start, key_end, mask = options[:7]
    slot = (torch.arange(keys, device=device) + key_offset).view(1, 1, 1, keys)
    own = (torch.arange(queries, device=device) + query_offset).view(1, 1, queries, 1)
    seen = torch.ones((batch, heads, queries, keys), dtype=torch.bool, device=device)
    if causal:
        seen = seen & (slot <= own)
    if window:
        seen = seen & (slot > own - window)
    if key_start is not None:
        seen = seen & (slot >= key_start.view(-1, 1, 1, 1))
    if key_end is not None:
        seen = seen & (slot < key_end.view(-1, 1, 1, 1))
    return seen if mask is None else seen & mask


def _weights(query: Tensor, key: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[B, H, M, N]``, the log-sum-exp of each row, and what each query sees."""
    scale, softcap, sinks = options[7:]
    batch, heads, queries, _ = query.shape
    seen = _visible(batch, heads, queries, key.shape[2], options, query.device)
    any_seen = seen.any(-1)
    # What nobody sees is zeros from here on, so that a NaN there reaches no gradient.
    query = torch.where(any_seen[..., None], query, 0.0)
    key = torch.where(seen.any(2)[..., None], key.repeat_interleave(heads // key.shape[1], 1), 0.0)
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        sink = sinks.to(scores).view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sink], -1)
        shown = torch.cat([seen, any_seen[..., None]], -1)
    else:
        shown = seen
    if scores.shape[-1] == 0:
        return scores, scores.sum(-1) - torch.inf, seen
    # A row without keys is computed as one of zeros and then hidden: its own softmax has no gradient but NaN.
    shown = shown | ~any_seen[..., None]
    lse = torch.logsumexp(torch.where(shown, scores, -torch.inf), -1)
    weights = torch.where(
        seen, torch.exp(torch.where(shown, scores, -torch.inf) - lse[..., None])[..., : key.shape[2]], 0.0
    )
    return weights, torch.where(any_seen, lse, -torch.inf), seen


def _weigh(weights: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    return weights @ torch.where(seen.any(2)[..., None], value, 0.0)
