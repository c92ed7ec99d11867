"""attnrb as an attention backend of vLLM on the CPU.

Note: [Layout of the cache]
vLLM hands out one tensor for the blocks of a layer, ``[blocks, Hk, P, 2 D]``, and leaves what its bytes mean to the
backend that writes them. Its own kernels pack them by instruction set. Here a block is the keys ``[Hk, P, D]`` of its
heads and then their values, each row as it came: the two pools that `attnrb.functional.attention` reads are views of
the one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from attnrb.hosts.vllm.admission import options_of
from attnrb.hosts.vllm.listener import rows_of
from attnrb.hosts.vllm.refusals import refuse_layer
from attnrb.hosts.vllm.steps import LayerAttention, metadata_of

__all__ = ["Backend", "Builder", "Implementation"]


class Backend(CPUAttentionBackend):
    """vLLM's backend for the CPU, with attnrb's attention in engines that ask for it."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention of a layer."""
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """What a step tells all layers."""
        return Builder


class Builder(CPUAttentionMetadataBuilder):
    """Makes the metadata of each step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = None if options_of(vllm_config) is None else rows_of(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See vLLM's ``AttentionMetadataBuilder``."""
        if self.rows is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return metadata_of(common_attn_metadata, self.rows)


class Implementation(CPUAttentionBackendImpl):
    """The attention of one layer.

    Attributes:
        attnrb: attnrb's attention; None where the engine did not ask for it, and the layer is vLLM's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's ``AttentionImpl``; raises ValueError for a layer that attnrb does not serve."""
        super().__init__(*args, **kwargs)
        self.attnrb: LayerAttention | None = None
        if options_of(get_current_vllm_config()) is None:
            return
        refuse_layer(
            alibi=self.alibi_slopes is not None,
            cache_dtype=self.kv_cache_dtype if self.is_fp8_kv_cache else None,
            other_type=None if self.attn_type == AttentionType.DECODER else str(self.attn_type),
        )
        window = None if self.sliding_window == -1 else self.sliding_window
        self.attnrb = LayerAttention(window, self.scale, self.logits_soft_cap, self.sinks, halves=True)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the attention of a step's T queries ``[T, H, D]`` into ``output [T, H, D]``."""
        scales = (output_scale, output_block_scale)
        if self.attnrb is None or attn_metadata is None or scales != (None, None):
            # No metadata: a run that measures memory. Scales: vLLM's own refusal.
            plain: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return plain
        self.attnrb.attend(layer, query, kv_cache, attn_metadata, output)
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values ``[T, Hk, D]`` into their blocks."""
        if self.attnrb is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            self.attnrb.write(key, value, kv_cache, slot_mapping)
