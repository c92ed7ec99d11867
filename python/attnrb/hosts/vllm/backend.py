"""attnrb as an attention backend of vLLM on the CPU.

Note: [Layout of the cache]
vLLM hands out one tensor for the blocks of a layer, ``[blocks, Hk, P, 2 D]``, and leaves what its bytes mean to the
backend that writes them. Its own kernels pack them by instruction set. Here a block is the keys ``[Hk, P, D]`` of its
heads and then their values, each row as it came: the two pools that `attnrb.functional.attention` reads are views of
the one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from attnrb.functional import write_keys
from attnrb.hosts.vllm.admission import options_of
from attnrb.hosts.vllm.asked import KEY
from attnrb.hosts.vllm.attend import Forward, Layer, Step, attend
from attnrb.hosts.vllm.batch import Batch
from attnrb.hosts.vllm.listener import rows_of
from attnrb.ops.paging import Paging
from attnrb.ops.visibility import Visibility

__all__ = ["Backend", "Builder", "Implementation", "Metadata", "pools"]


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


@dataclass
class Metadata:
    """What a step tells the layers that share a block table.

    Attributes:
        tokens: T.
        step: where queries and keys lie.
        batch: what is asked for in its rows.
    """

    tokens: int
    step: Step
    batch: Batch


class Builder(CPUAttentionMetadataBuilder):
    """Makes the `Metadata` of each step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = None if options_of(vllm_config) is None else rows_of(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See vLLM's ``AttentionMetadataBuilder``."""
        if self.rows is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("attnrb serves causal attention only")
        rows = common.num_reqs
        paging = Paging(common.block_table_tensor[:rows], common.query_start_loc[: rows + 1], common.seq_lens[:rows])
        return Metadata(common.num_actual_tokens, Step(paging), self.rows.batch(rows))


class Implementation(CPUAttentionBackendImpl):
    """The attention of one layer.

    Attributes:
        attnrb: whether it is attnrb's, which the engine's options say.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's ``AttentionImpl``; raises ValueError for a layer that attnrb does not serve."""
        super().__init__(*args, **kwargs)
        self.attnrb = options_of(get_current_vllm_config()) is not None
        if not self.attnrb:
            return
        for refused, name in (
            (self.alibi_slopes is not None, "position biases (alibi)"),
            (self.is_fp8_kv_cache, f"quantised caches ({self.kv_cache_dtype})"),
            (self.attn_type != AttentionType.DECODER, f"attention of the type {self.attn_type}"),
        ):
            if refused:
                raise ValueError(f"attnrb does not serve {name}; take 'attnrb' out of additional_config")
        window = None if self.sliding_window == -1 else self.sliding_window
        self._scores = {
            "visibility": Visibility(window=window),
            "scale": self.scale,
            "softcap": self.logits_soft_cap or None,
            "sinks": self.sinks,
        }
        self._number: int | None = None
        self._pools: tuple[Tensor, Tensor, Tensor] | None = None

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
        if not self.attnrb or attn_metadata is None:  # None: a run that measures memory
            scales = (output_scale, output_block_scale)
            plain: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return plain
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attnrb does not serve quantised outputs of attention")
        if self._number is None:
            self._number = extract_layer_index(layer.layer_name)
        shared = get_forward_context().additional_kwargs
        forward = shared.get(KEY)
        if forward is None:
            forward = shared[KEY] = Forward(attn_metadata.batch)
        tokens = attn_metadata.tokens
        key_pool, value_pool = self._views(kv_cache)
        attend(
            Layer(self._number, query[:tokens], key_pool, value_pool, self._scores, output[:tokens]),
            attn_metadata.step,
            forward,
        )
        return output

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values ``[T, Hk, D]`` into their blocks."""
        if not self.attnrb:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        tokens = slot_mapping.shape[0]
        write_keys(key[:tokens], value[:tokens], *self._views(kv_cache), slot_mapping)

    def _views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        if self._pools is None or self._pools[0] is not kv_cache:
            self._pools = (kv_cache, *pools(kv_cache))
        return self._pools[1:]


def pools(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[blocks, Hk, P, D]`` as views of a cache ``[blocks, Hk, P, 2 D]``: see the note above."""
    blocks, heads, rows, width = kv_cache.shape
    if kv_cache.is_contiguous():
        halves = kv_cache.view(blocks, 2, heads, rows, width // 2)
        return halves[:, 0], halves[:, 1]
    return kv_cache[..., : width // 2], kv_cache[..., width // 2 :]
