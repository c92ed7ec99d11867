"""Find the part of a model that holds its decoder layers, and what its configuration says of them."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch

from attnrb.hosts.transformers.configurations import IMPLEMENTATION, NAME

# What configurations call a layer of softmax attention, where they name the kinds of their layers.
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "hybrid_sliding"}

_SUPPORTED = "attnrb serves decoder-only models that use transformers' AttentionInterface"


def find_decoder(model: Any) -> Any:
    """The module whose forward hands keyword arguments to each decoder layer.

    Raises:
        TypeError: ``model`` is no model of transformers.
        NotImplementedError: it is one that cannot be served, as far as one can tell before a forward.
        RuntimeError: it is patched already.
    """
    from transformers import PreTrainedModel

    whole = None
    if isinstance(model, torch.nn.Module):
        # Adapters and other wrappers hold the model somewhere within.
        whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None:
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    name = type(whole).__name__
    if getattr(whole.config, "is_encoder_decoder", False) or getattr(whole.config, "add_cross_attention", False):
        raise NotImplementedError(f"model: {name} attends to an encoder; {_SUPPORTED}")

    decoder: Any = whole.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is whole or not isinstance(decoder, PreTrainedModel):  # some call their last projection a decoder
        decoder = whole.base_model
    if decoder.config.__dict__.get(IMPLEMENTATION) == NAME:
        raise RuntimeError(f"model: this {name} is patched already; remove that patch first")

    # Of nested modules named so (a layer that holds its attention) the inner ones have the number.
    modules = [module for module in decoder.modules() if re.search("attention|attn|MLA$", type(module).__name__, re.I)]
    if not modules:
        raise NotImplementedError(f"model: {name} has no attention layers; {_SUPPORTED}")
    numbered = [module for module in modules if isinstance(getattr(module, "layer_idx", None), int)]
    if not numbered:
        raise NotImplementedError(
            f"model: the attention modules of {name} ({type(modules[0]).__name__}) have no layer_idx, so attnrb cannot "
            f"tell which layer each is; {_SUPPORTED}, in which attention modules know their layer"
        )
    if not any(_uses_interface(type(module)) for module in numbered):
        raise NotImplementedError(
            f"model: {type(numbered[0]).__name__} computes attention by itself and does not use transformers' "
            f"AttentionInterface, so attnrb cannot reach it; {_SUPPORTED}"
        )
    for kind in {type(module) for module in numbered}:
        if own := [method for method in dir(kind) if "mask" in method]:
            raise NotImplementedError(
                f"model: {kind.__name__} makes masks of its own ({own[0]}), which attnrb cannot know; "
                f"{_SUPPORTED} and its masks"
            )
    return decoder


def _uses_interface(attention_class: type) -> bool:
    """Whether a class, or one that it inherits from, stands in a file that knows transformers' AttentionInterface."""
    from transformers import AttentionInterface

    return any(
        isinstance(value, AttentionInterface)
        for each in attention_class.__mro__
        if each is not torch.nn.Module and each.__module__ in sys.modules
        for value in vars(sys.modules[each.__module__]).values()
    )


def shard_of(model: torch.nn.Module) -> tuple[int, int]:
    """Rank and number of ranks among which transformers' tensor parallelism split this model's heads."""
    for module in model.modules():
        ranks = getattr(module, "_tp_size", None)
        if isinstance(ranks, int) and ranks > 1:
            mesh = getattr(module, "_device_mesh", None)
            if mesh is None:
                return torch.distributed.get_rank() % ranks, ranks
            names = mesh.mesh_dim_names or ()
            return (mesh["tp"] if "tp" in names else mesh).get_local_rank(), ranks
    return 0, 1


def size(sizes: Any, *names: str) -> Any:
    """The first of these that a configuration has."""
    for name in names:
        try:
            value = getattr(sizes, name, None)
        except Exception as error:  # some refuse to say what differs from layer to layer
            return type(error).__name__
        if value is not None:
            return value
    return None


def layers_with_attention(sizes: Any, layers: int) -> list[bool]:
    """Which decoder layers have softmax attention of their own, where the configuration says; all where it does not."""
    named = kinds(sizes, layers)
    has = [True] * layers if named is None else [kind in _ATTENTION_KINDS for kind in named]
    crossing = getattr(sizes, "cross_attention_layers", None) or ()
    return [each and layer not in crossing for layer, each in enumerate(has)]


def kinds(sizes: Any, layers: int) -> list[str] | None:
    """What a configuration calls each of the decoder layers; None where it does not say."""
    for name in ("layer_types", "layers_block_type"):
        named = getattr(sizes, name, None)
        if isinstance(named, (list, tuple)) and len(named) >= layers:
            return [str(kind) for kind in named[:layers]]
    return None
