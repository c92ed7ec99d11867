"""Run a copy of a decoder without weights, and note which modules reach transformers' AttentionInterface.

Nothing of the model is touched: parameters and buffers of the copy lie on the meta device, where tensors have shapes
and no numbers, its configurations are copies, and hooks are left behind. So it costs neither memory nor time worth
speaking of, and leaves no trace, whatever holds the weights.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from attnrb.hosts.transformers.configurations import IMPLEMENTATION

__all__ = ["Seen", "probe"]

_NAME = "attnrb_probe"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_log = logging.getLogger("attnrb")


class Seen(NamedTuple):
    """What came by in one forward."""

    reached: list[str]
    """The class of each module that called the attention function, in order."""
    own_masks: list[str]
    """The classes among them that passed a mask which transformers did not make for them."""


class _Recorder:
    def __init__(self) -> None:
        self.seen = Seen([], [])
        self.masks: list[torch.Tensor] = []


_recorder: ContextVar[_Recorder] = ContextVar("attnrb_probe")


def probe(decoder: Any) -> Seen | None:
    """Run a copy of a decoder on two tokens.

    Args:
        decoder: a model of transformers without its head.

    Returns:
        What was seen; None where nothing was because the copy could not be run so far.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    recorder = _Recorder()
    token = _recorder.set(recorder)
    try:
        with torch.no_grad(), torch.device("meta"):
            ids = torch.zeros(1, 2, dtype=torch.int64)
            # With a mask, transformers does not look at positions, which have no numbers either.
            _without_weights(decoder)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # of the model's own code, which may need numbers where there are none
        _log.debug("trial run of %s ended early: %s: %s", type(decoder).__name__, type(error).__name__, error)
        return recorder.seen if recorder.seen.reached else None
    finally:
        _recorder.reset(token)
    return recorder.seen


def _without_weights(decoder: Any) -> Any:
    """A copy for inference whose parameters and buffers have no numbers, and whose configurations name the recorder."""
    from transformers.configuration_utils import PretrainedConfig

    memo: dict[int, Any] = {}
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        memo[id(tensor)] = tensor.to("meta")
    for module in decoder.modules():
        memo.update((id(vars(module)[name]), OrderedDict()) for name in _HOOKS if name in vars(module))
    twin = copy.deepcopy(decoder, memo).eval()
    for module in twin.modules():
        for value in list(vars(module).values()):
            if isinstance(value, PretrainedConfig):
                vars(value)[IMPLEMENTATION] = _NAME
    return twin


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Note who calls, and return something of the right shape."""
    recorder, name = _recorder.get(), type(module).__name__
    recorder.seen.reached.append(name)
    if attention_mask is not None and not any(attention_mask is mask for mask in recorder.masks):
        recorder.seen.own_masks.append(name)
    batch, heads, queries, _width = query.shape
    return query.new_zeros(batch, queries, heads, value.shape[-1]), None


def _mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    cache_position: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> torch.Tensor:
    """A mask that hides nothing, of the kind that transformers makes."""
    if cache_position is not None:
        q_length, device = cache_position.shape[0], cache_position.device
    assert q_length is not None
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    _recorder.get().masks.append(mask)
    return mask
