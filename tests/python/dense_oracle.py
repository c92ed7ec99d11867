"""Re-balancing for whole models, the slow and obvious way: an oracle that shares no code with attnrb.

It puts an attention function of its own into transformers that builds every n×n matrix in float64, remembers the source
layer's outliers as a dense set over slots, and multiplies the weights by 1 + g. Masks are those of transformers itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

_NAME = "dense_oracle"


class DenseOracle:
    """The method with everything in sight. One object serves one model at a time."""

    def __init__(
        self,
        gains: Sequence[float | Sequence[float]],
        *,
        threshold: float,
        source_layer: int = 0,
        normalize: bool = False,
        boost_all: bool = False,
        keep_weights: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Note the options.

        Args:
            gains: for each layer its gain, or the gain of each of its heads.
            threshold: attention above which a key is an outlier.
            source_layer: the layer that decides which keys are.
            normalize: divide each row by 1 + what was added to it.
            boost_all: strengthen every entry.
            keep_weights: keep the weights of every layer in ``weights``.
            dtype: what to compute in; float32 for texts that would take too long otherwise.
        """
        self.dtype = dtype
        self.gains = [torch.as_tensor(gain, dtype=dtype).reshape(1, -1, 1, 1) for gain in gains]
        self.threshold = threshold
        self.source_layer = source_layer
        self.normalize = normalize
        self.boost_all = boost_all
        self.keep_weights = keep_weights
        self.outliers: Tensor | None = None  # bool [B, H, M, slots]
        self.counts: list[Tensor] = []  # int64 [B, H, M] of each forward
        self.weights: dict[int, Tensor] = {}  # of the last forward, as applied, float64 [B, H, M, N]
        self.closest = 1.0  # how near any weight came to the threshold

    @contextmanager
    def attached(self, model: Any) -> Iterator[DenseOracle]:
        """Run ``model`` by the oracle inside the block."""
        before = model.config._attn_implementation
        AttentionInterface.register(_NAME, self._attention)
        AttentionMaskInterface.register(_NAME, slot_mask)
        model.set_attn_implementation(_NAME)
        try:
            yield self
        finally:
            model.set_attn_implementation(before)

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer, keys = module.layer_idx, key.shape[2]
        first_query, first_key = attention_mask._slots
        groups = query.shape[1] // key.shape[1]
        k, v = (each.to(self.dtype).repeat_interleave(groups, dim=1) for each in (key, value))
        scores = query.to(self.dtype) @ k.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~attention_mask[..., :keys], -torch.inf)
        if s_aux is not None:
            sink = s_aux.to(self.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat([scores, sink], dim=3)
        weights = torch.softmax(scores, dim=3).nan_to_num(0.0)[..., :keys]

        query_slots = first_query + torch.arange(query.shape[2])
        key_slots = first_key + torch.arange(keys)
        if layer == self.source_layer:
            other = key_slots[None, :] != query_slots[:, None]
            chosen = (weights > self.threshold) & other
            self.outliers = torch.zeros(*weights.shape[:3], int(key_slots[-1]) + 1, dtype=torch.bool)
            self.outliers[..., key_slots] = chosen
            self.counts.append(chosen.sum(3))
            distance = torch.where(other, (weights - self.threshold).abs(), 1.0)
            self.closest = min(self.closest, float(distance.detach().min()))
        elif layer > self.source_layer:
            assert self.outliers is not None
            slots = self.outliers.shape[3]
            held = torch.zeros_like(weights, dtype=torch.bool)
            held[..., key_slots < slots] = self.outliers[..., key_slots[key_slots < slots]]
            added = self.gains[layer] * weights * (torch.ones_like(held) if self.boost_all else held)
            total = 1.0 + added.sum(3, keepdim=True) if self.normalize else 1.0
            weights = (weights + added) / total
        if self.keep_weights:
            self.weights[layer] = weights
        return (weights @ v).transpose(1, 2).to(query.dtype).contiguous(), None


def slot_mask(
    batch_size: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The boolean mask ``[B, 1, M, N]`` of transformers, with the slots of the first query and key noted on it."""
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    if cache_position is not None:
        options["cache_position"], first = cache_position, int(cache_position[0])
    else:
        options["q_length"], options["q_offset"], first = q_length, q_offset, int(q_offset)
    mask = masking_utils.sdpa_mask(batch_size=batch_size, kv_offset=kv_offset, **options)
    mask._slots = first, kv_offset
    return mask


def linear_gains(layers: int, alpha: float, depth: float | None = None) -> list[float]:
    """The published schedule: alpha · (1 - layer / depth)."""
    return [alpha * (1 - layer / (layers - 1 if depth is None else depth)) for layer in range(layers)]
