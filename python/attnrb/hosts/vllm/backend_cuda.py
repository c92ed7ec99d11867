"""attnrb as the attention backend ``CUSTOM`` of vLLM on GPUs. It has not run on one.

vLLM's layout of blocks for GPUs is ``[blocks, Hk, P, 2 D]`` by strides, each row a key and then its value, as its other
backends read it. attnrb's CUDA ops read it and write into it as it lies.

Note: [CUDA graphs of an engine]
The ops themselves wait for nothing and could stand in a CUDA graph. What they are told could not: which requests are in
the batch, and what their policies ask of each layer, is decided in Python in every step, and a graph that was recorded
would repeat the edits of the step that it was recorded in. So the builder declares `AttentionCGSupport.NEVER`. Then
vLLM records what lies between the attention layers, in pieces (its mode ``PIECEWISE``), and calls attention itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from attnrb.hosts.vllm.admission import options_of
from attnrb.hosts.vllm.listener import rows_of
from attnrb.hosts.vllm.refusals import refuse_layer
from attnrb.hosts.vllm.steps import LayerAttention, metadata_of

__all__ = ["Backend", "Builder", "Implementation"]


class Backend(AttentionBackend):
    """``--attention-backend CUSTOM``, for engines whose ``additional_config`` asks for attnrb."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """P."""
        return [MultipleOf(16)]

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's registry."""
        return "CUSTOM"

    @classmethod
    def supports_sink(cls) -> bool:
        """The model's own sinks join each row."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """It does."""
        return True

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """The attention of a layer."""
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """What a step tells all layers."""
        return Builder


class Builder(AttentionMetadataBuilder):
    """Makes the metadata of each step."""

    # See Note: [CUDA graphs of an engine].
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = rows_of(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See vLLM's ``AttentionMetadataBuilder``."""
        return metadata_of(common_attn_metadata, self.rows)


class Implementation(AttentionImpl):
    """The attention of one layer.

    Attributes:
        attnrb: attnrb's attention.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """See vLLM's ``AttentionImpl``; raises ValueError for a layer that attnrb does not serve."""
        if options_of(get_current_vllm_config()) is None:
            raise ValueError(
                "the attention backend CUSTOM is attnrb's, and additional_config does not ask for 'attnrb'"
            )
        refuse_layer(
            alibi=alibi_slopes is not None,
            cache_dtype=kv_cache_dtype if kv_cache_dtype.startswith(("fp8", "int", "nvfp")) else None,
            other_type=None if attn_type == AttentionType.DECODER else str(attn_type),
        )
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.sinks, self.kv_cache_dtype = float(scale), sinks, kv_cache_dtype
        self.attnrb = LayerAttention(sliding_window, self.scale, logits_soft_cap, sinks, halves=False)

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
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attnrb does not serve quantised outputs of attention")
        if attn_metadata is None:  # a run that measures memory
            return output.fill_(0)
        self.attnrb.attend(layer, query, kv_cache, attn_metadata, output)
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values ``[T, Hk, D]`` into their blocks."""
        self.attnrb.write(key, value, kv_cache, slot_mapping)
