"""Find the part of a model that holds its decoder layers, and what its configuration says of them.

Note: [Who uses the interface]
A module reaches transformers' AttentionInterface if the code of one of its methods names a global that is one: that
tells which modules compute attention, whatever they are called. Where no method does, but its file knows the interface,
or where a module has methods for masks, neither name nor code settles what it does. Then a copy of the decoder without
weights runs once, with an attention function that only notes who calls it and with which mask (see probe.py).
"""

from __future__ import annotations

import inspect
import os
import sys
from functools import cache
from types import FunctionType
from typing import Any

import torch

from attnrb.hosts.transformers.configurations import IMPLEMENTATION, NAME
from attnrb.policies.base import ModelShape, register_shape_reader

# What configurations call a layer of softmax attention, where they name the kinds of their layers.
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "hybrid_sliding"}

_SUPPORTED = "attnrb serves decoder-only models that use transformers' AttentionInterface"


def decoder_of(model: Any) -> Any:
    """The module of a model whose forward hands keyword arguments to each decoder layer, served or not.

    Raises:
        TypeError: ``model`` is no model of transformers.
    """
    from transformers import PreTrainedModel

    whole = _whole_model(model)
    decoder: Any = whole.get_decoder()
    if decoder is whole or not isinstance(decoder, PreTrainedModel):  # some call their last projection a decoder
        decoder = whole.base_model
    return decoder


def _whole_model(model: Any) -> Any:
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
    whole, decoder = _whole_model(model), decoder_of(model)
    name = type(whole).__name__
    if getattr(whole.config, "is_encoder_decoder", False) or getattr(whole.config, "add_cross_attention", False):
        raise NotImplementedError(f"model: {name} attends to an encoder; {_SUPPORTED}")
    if decoder.config.__dict__.get(IMPLEMENTATION) == NAME:
        raise RuntimeError(f"model: this {name} is patched already; remove that patch first")

    _check_attention(decoder, name)
    return decoder


def attention_modules(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a decoder that reach the interface by their code: see `Note: [Who uses the interface]`."""
    return [module for module in _parts(decoder) if _reaches_interface(type(module))]


def _check_attention(decoder: Any, name: str) -> None:
    """Refuse a decoder whose attention cannot be reached.

    Args:
        decoder: the decoder.
        name: what to call the whole model.

    Raises:
        NotImplementedError: saying why.
    """
    reaching = attention_modules(decoder)
    numbered = [module for module in reaching if _has_number(module)]
    if reaching and not numbered:
        raise NotImplementedError(
            f"model: the attention modules of {name} ({type(reaching[0]).__name__}) have no layer_idx, so attnrb "
            f"cannot tell which layer each is; {_SUPPORTED}, in which attention modules know their layer"
        )
    if not numbered and not any(_file_knows_interface(type(module)) for module in _parts(decoder)):
        raise NotImplementedError(_no_interface(decoder, name))
    masking = [module for module in _parts(decoder) if _has_number(module) and _has_methods_for_masks(type(module))]
    if numbered and not masking:
        return
    from attnrb.hosts.transformers.probe import probe

    seen = probe(decoder)
    if seen is not None and not numbered and not seen.reached:
        raise NotImplementedError(_no_interface(decoder, name))
    # What was not seen is left to the first forward, but for attention that may well make masks.
    doubtful = [type(module).__name__ for module in masking if module in reaching] if seen is None else seen.own_masks
    if doubtful:
        raise NotImplementedError(
            f"model: {doubtful[0]} makes masks of its own, which attnrb cannot know; {_SUPPORTED} and its masks"
        )


def _no_interface(decoder: Any, name: str) -> str:
    sizes = decoder.config.get_text_config(decoder=True)
    if size(sizes, "decoder_attention_heads", "num_attention_heads") is None:
        return f"model: {name} has no attention layers; {_SUPPORTED}"
    numbered = [module for module in _parts(decoder) if _has_number(module)]
    # Of nested modules with a number the inner ones compute attention.
    inner = [module for module in numbered if not any(each in numbered for each in list(module.modules())[1:])]
    who = type(inner[0]).__name__ if inner else name
    return (
        f"model: {who} computes attention by itself and does not use transformers' AttentionInterface, so attnrb "
        f"cannot reach it; {_SUPPORTED}"
    )


def _parts(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a decoder that may be attention.

    Models are not, which know the interface only to choose one, nor is what belongs to a model within, such as one for
    images, if other modules know their layer.
    """
    from transformers import PreTrainedModel

    own: list[torch.nn.Module] = []
    waiting = list(decoder.children())
    while waiting:
        module = waiting.pop(0)
        if not isinstance(module, PreTrainedModel):
            own.append(module)
            waiting.extend(module.children())
    if any(map(_has_number, own)):
        return own
    return [module for module in decoder.modules() if not isinstance(module, PreTrainedModel)]


def _has_number(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)


def _reaches_interface(kind: type) -> bool:
    """Whether the code of one of its methods names a global that is an AttentionInterface."""
    from transformers import AttentionInterface

    return any(
        isinstance(function.__globals__.get(name), AttentionInterface)
        for function in _methods(kind)
        for name in function.__code__.co_names
    )


@cache
def _methods(kind: type) -> tuple[FunctionType, ...]:
    """The functions behind the methods that a class has of its own or inherits, other than those of every module."""
    found = []
    for name in dir(kind):
        method = inspect.getattr_static(kind, name)
        method = method.__func__ if isinstance(method, (staticmethod, classmethod)) else method
        function = inspect.unwrap(method) if callable(method) else None
        if isinstance(function, FunctionType) and function is not getattr(torch.nn.Module, name, None):
            found.append(function)
    return tuple(found)


def _file_knows_interface(kind: type) -> bool:
    """Whether a class, or one that it inherits from, stands in a file that knows transformers' AttentionInterface."""
    from transformers import AttentionInterface

    return any(
        isinstance(value, AttentionInterface)
        for each in kind.__mro__
        if each.__module__ in sys.modules and not each.__module__.startswith("torch.")
        for value in vars(sys.modules[each.__module__]).values()
    )


def _has_methods_for_masks(kind: type) -> bool:
    return any("mask" in name for name in dir(kind))


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
    for module in decoder.modules():
        layer = getattr(module, "layer_idx", None)
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
