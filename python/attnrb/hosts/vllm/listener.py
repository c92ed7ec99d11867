"""Hears which request sits in which row, by vLLM's interface for logits processors; it changes no logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from attnrb.hosts.vllm.admission import asked_for, options_of
from attnrb.hosts.vllm.asked import engine_policy
from attnrb.hosts.vllm.batch import Rows
from attnrb.hosts.vllm.refusals import shape_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["Listener", "rows_of"]

_ROWS = "_attnrb_rows"


def rows_of(config: VllmConfig) -> Rows:
    """The rows of the engine with this configuration.

    Raises:
        RuntimeError: no listener was started for it.
    """
    rows = vars(config).get(_ROWS)
    if rows is None:
        raise RuntimeError(
            "vLLM did not start attnrb's listener, so which request sits in which row is not known: the engine's "
            "configuration was not made by EngineArgs.create_engine_config"
        )
    return cast(Rows, rows)


class Listener(LogitsProcessor):
    """Tells the `Rows` of an engine of requests that come, go and move."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.config = vllm_config
        self.checked = False
        shape = shape_of(vllm_config, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        self.rows = vars(vllm_config)[_ROWS] = Rows(engine_policy(options_of(vllm_config)), shape)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changes nothing."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """It is: so greedy decoding skips it."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """What became of the batch before this step.

        Raises:
            NotImplementedError: in the first step: a layer of the model is not attnrb's.
        """
        if not self.checked:
            check_layers(self.config, self.rows)
            self.checked = True
        if batch_update is None:
            return
        self.rows.change(
            batch_update.removed,
            {row: asked_for(params) for row, params, *_ in batch_update.added},
            [(one, other, how is MoveDirectionality.SWAP) for one, other, how in batch_update.moved],
        )


def check_layers(config: VllmConfig, rows: Rows) -> None:
    """Make sure that every layer has attnrb's attention: what has not would run plain without a word.

    Raises:
        NotImplementedError: naming the layers that have not.
    """
    shape, found = rows.shape, {}
    for name, layer in config.compilation_config.static_forward_context.items():
        impl: Any = getattr(layer, "impl", None)
        if getattr(impl, "attnrb", None) is not None:
            found[extract_layer_index(name)] = impl
    if missing := sorted(set(range(shape.layers)) - set(found)):
        raise NotImplementedError(
            f"the attention of layers {missing} is not attnrb's: this model, or another plugin, has attention of its "
            "own there, which would run as it is without a word"
        )
    if others := {layer: impl.num_heads for layer, impl in found.items() if impl.num_heads != shape.local_heads}:
        layer, heads = next(iter(others.items()))
        raise NotImplementedError(
            f"layer {layer} has {heads} query heads on this rank where the model's configuration says "
            f"{shape.local_heads}: attnrb serves models whose layers have as many heads each"
        )
