"""What attnrb's backends of vLLM share, whatever device they are for: a step's metadata, and a layer's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index

from attnrb.hosts.vllm.asked import KEY
from attnrb.hosts.vllm.attend import Forward, Layer, LayerScores, Step, attend
from attnrb.hosts.vllm.batch import Batch, Rows
from attnrb.ops.paged import write_blocks
from attnrb.ops.paging import Paging

__all__ = ["LayerAttention", "Metadata", "metadata_of", "pools"]


@dataclass
class Metadata:
    """What a step tells the layers that share a block table.

    Attributes:
        num_actual_tokens: T; the name is vLLM's.
        step: where queries and keys lie.
        batch: what is asked for in its rows.
    """

    num_actual_tokens: int
    step: Step
    batch: Batch


def metadata_of(common: Any, rows: Rows) -> Metadata:
    """The metadata of a step, from vLLM's ``CommonAttentionMetadata``.

    Raises:
        NotImplementedError: the step is not causal.
    """
    if common.causal is not True:
        raise NotImplementedError("attnrb serves causal attention only")
    count = common.num_reqs
    table = common.block_table_tensor[:count]
    paging = Paging(table, common.query_start_loc[: count + 1], common.seq_lens[:count])
    return Metadata(common.num_actual_tokens, Step(paging), rows.batch(count))


class LayerAttention:
    """The attention of one layer.

    Args:
        window: how many slots back a query sees, its own included; None: all.
        scale: factor on the scores.
        softcap: bound of the scores; None or 0: none.
        sinks: ``[H]``, the model's own.
        halves: whether a block is its keys and then its values, where the cache is contiguous: see `pools`.
    """

    def __init__(
        self, window: int | None, scale: float, softcap: float | None, sinks: Tensor | None, *, halves: bool
    ) -> None:
        self._scores = LayerScores(window, scale, softcap, sinks)
        self._halves = halves
        self._number: int | None = None
        self._pools: tuple[Tensor, Tensor, Tensor] | None = None

    def attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Metadata, output: Tensor) -> None:
        """Write the attention of a step's T queries ``[T, H, D]`` into ``output [T, H, D]``."""
        if self._number is None:
            self._number = extract_layer_index(layer.layer_name)
        shared = get_forward_context().additional_kwargs  # of this forward alone
        forward = shared.get(KEY)
        if forward is None:
            forward = shared[KEY] = Forward(metadata.batch, metadata.step)
        key, value = self._views(kv_cache)
        query, output = _first(metadata.num_actual_tokens, query, output)
        attend(Layer(self._number, query, key, value, self._scores, output), metadata.step, forward)

    def write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write new keys and values ``[T, Hk, D]`` into their blocks."""
        key, value = _first(slot_mapping.shape[0], key, value)
        write_blocks(key, value, *self._views(kv_cache), slot_mapping)

    def _views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        if self._pools is None or self._pools[0] is not kv_cache:
            self._pools = (kv_cache, *pools(kv_cache, halves=self._halves))
        return self._pools[1:]


def _first(tokens: int, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to this many tokens; batches may be padded."""
    return (one, other) if one.shape[0] == tokens == other.shape[0] else (one[:tokens], other[:tokens])


def pools(kv_cache: Tensor, *, halves: bool) -> tuple[Tensor, Tensor]:
    """Keys and values ``[blocks, Hk, P, D]`` as views of a cache ``[blocks, Hk, P, 2 D]``.

    Args:
        kv_cache: as vLLM hands it out.
        halves: a block of a contiguous cache is the keys ``[Hk, P, D]`` of its heads and then their values. Otherwise
            each row is a key and then its value.
    """
    blocks, heads, rows, width = kv_cache.shape
    if halves and kv_cache.is_contiguous():
        parts = kv_cache.view(blocks, 2, heads, rows, width // 2)
        return parts[:, 0], parts[:, 1]
    return kv_cache[..., : width // 2], kv_cache[..., width // 2 :]
