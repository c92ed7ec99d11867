"""Find the part of a model that holds its decoder layers, and what its configuration says of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from attnrb.hosts.transformers.configurations import Hook
from attnrb.hosts.transformers.interface import SUPPORTED, attribute, check_attention, every_module, size
from attnrb.policies.base import ModelShape, register_shape_reader

# What configurations call a layer of softmax attention, where they name the kinds of their layers.
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "hybrid_sliding"}


def decoder_of(model: Any) -> Any:
    """The module of a model whose forward hands keyword arguments to each decoder layer, served or not.

    Raises:
        TypeError: ``model`` is no model of transformers.
    """
    from transformers import PreTrainedModel

    whole = whole_model(model)
    decoder: Any = whole.get_decoder()
    if decoder is whole or not isinstance(decoder, PreTrainedModel):  # some call their last projection a decoder
        decoder = whole.base_model
    if decoder is whole and whole.get_output_embeddings() is not None:
        # Some with a head do not say where the rest is.
        within = [module for module in whole.children() if isinstance(module, PreTrainedModel)]
        decoder = within[0] if len(within) == 1 else whole
    return decoder


def whole_model(model: Any) -> Any:
    """The model of transformers that ``model`` is, or wraps."""
    from transformers import PreTrainedModel

    if isinstance(model, torch.nn.Module):
        # Adapters and other wrappers hold the model somewhere within.
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}{_hint(model)}")


def _hint(model: Any) -> str:
    """What somebody may have meant who passed something else."""
    if isinstance(model, (str, os.PathLike)):
        return ": load it first, with attnrb.models.load(name) or transformers"
    if isinstance(model, tuple):
        return ": pass the model alone, without its tokenizer"
    if isinstance(getattr(model, "model", None), torch.nn.Module):
        return ": pass its model, as .model"
    return ""


def find_decoder(model: Any) -> Any:
    """The decoder of a model that can be served: see `decoder_of`.

    Raises:
        TypeError: ``model`` is no model of transformers.
        NotImplementedError: it is one that cannot be served, as far as one can tell before a forward.
        RuntimeError: it is patched already.
    """
    whole, decoder = whole_model(model), decoder_of(model)
    name = type(whole).__name__
    if getattr(whole.config, "is_encoder_decoder", False) or getattr(whole.config, "add_cross_attention", False):
        raise NotImplementedError(f"model: {name} attends to an encoder; {SUPPORTED}")
    if (found := patch_of(decoder)) is not None:
        if getattr(found, "leaving", False):
            raise RuntimeError(
                f"model: a forward of this {name} runs, and its patch goes when that is over: patch it again then"
            )
        raise RuntimeError(
            f"model: this {name} is patched already; remove that patch first, with remove() of its handle or with "
            "attnrb.unpatch(model)"
        )

    check_attention(decoder, name)
    return decoder


def patch_of(decoder: torch.nn.Module) -> Any:
    """The patch whose hooks a decoder has; None where there is none."""
    owners = (hook.owner for hook in decoder._forward_pre_hooks.values() if isinstance(hook, Hook))
    return next((owner for owner in owners if hasattr(owner, "remove")), None)


def shard_of(model: torch.nn.Module) -> tuple[int, int]:
    """Rank and number of ranks among which transformers' tensor parallelism split this model's heads."""
    for module in every_module(model):
        ranks = attribute(module, "_tp_size")
        if isinstance(ranks, int) and ranks > 1:
            mesh = getattr(module, "_device_mesh", None)
            if mesh is None:
                return torch.distributed.get_rank() % ranks, ranks
            names = mesh.mesh_dim_names or ()
            return (mesh["tp"] if "tp" in names else mesh).get_local_rank(), ranks
    return 0, 1


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


def decoder_shape(decoder: Any, shard: tuple[int, int] = (0, 1)) -> ModelShape:
    """The layers and heads of a decoder, as its configuration names them.

    Raises:
        NotImplementedError: the configuration gives no one number of them, or no layer has softmax attention.
    """
    sizes = decoder.config.get_text_config(decoder=True)
    layers = size(sizes, "decoder_layers", "num_hidden_layers")
    heads = size(sizes, "decoder_attention_heads", "num_attention_heads")
    for what, value in (("layers (num_hidden_layers)", layers), ("heads (num_attention_heads)", heads)):
        if not isinstance(value, int):
            raise NotImplementedError(
                f"model: the configuration of {type(decoder).__name__} gives no one number of {what}, but {value!r}; "
                "attnrb supports models whose layers have equally many heads"
            )
    has_attention = layers_with_attention(sizes, layers)
    if True not in has_attention:
        raise NotImplementedError(
            f"model: none of the layers of {type(decoder).__name__} has softmax attention over all keys or a window of "
            f"them; their kinds are {', '.join(sorted(set(kinds(sizes, layers) or [])))}"
        )
    return ModelShape(layers, heads, tuple(has_attention), shard, _devices(decoder, layers))


def _devices(decoder: torch.nn.Module, layers: int) -> tuple[torch.device, ...] | None:
    """Where each layer is, by its weights; None where all are on the CPU."""
    found: dict[int, torch.device] = {}
    for module in every_module(decoder):
        layer = attribute(module, "layer_idx")
        if isinstance(layer, int) and layer not in found:
            weight = next(module.parameters(), None)
            if weight is not None and weight.device.type != "meta":
                found[layer] = weight.device
    devices = tuple(found.get(layer, torch.device("cpu")) for layer in range(layers))
    return None if all(device.type == "cpu" for device in devices) else devices


def model_shape(model: Any) -> ModelShape:
    """The shape of a whole model that is not split: see `attnrb.policies.model_shape`."""
    return decoder_shape(find_decoder(model))


register_shape_reader(model_shape)
