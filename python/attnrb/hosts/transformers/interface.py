"""Find out whether a decoder's attention can be reached, by its code or by a trial run.

Note: [Who uses the interface]
A module reaches transformers' AttentionInterface if the code of one of its methods names a global that is one: that
tells which modules compute attention, whatever they are called. Where no method does, but its file knows the interface,
or where a module has methods for masks, neither name nor code settles what it does. Then a copy of the decoder without
weights runs once, with an attention function that only notes who calls it and with which mask (see probe.py).
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from functools import cache
from types import FunctionType
from typing import Any

import torch

__all__ = ["SUPPORTED", "attention_modules", "attribute", "check_attention", "every_module", "size"]

SUPPORTED = "attnrb serves decoder-only models that use transformers' AttentionInterface"


def attention_modules(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a decoder that reach the interface by their code: see `Note: [Who uses the interface]`."""
    return _reaching(_parts(decoder))


def _reaching(parts: list[torch.nn.Module]) -> list[torch.nn.Module]:
    kinds = {kind for kind in set(map(type, parts)) if _reaches_interface(kind)}
    return [module for module in parts if type(module) in kinds]


def check_attention(decoder: Any, name: str) -> None:
    """Refuse a decoder whose attention cannot be reached.

    Args:
        decoder: the decoder.
        name: what to call the whole model.

    Raises:
        NotImplementedError: saying why.
    """
    parts = _parts(decoder)
    reaching = _reaching(parts)
    numbered = [module for module in reaching if _has_number(module)]
    if reaching and not numbered:
        raise NotImplementedError(
            f"model: the attention modules of {name} ({type(reaching[0]).__name__}) have no layer_idx, so attnrb "
            f"cannot tell which layer each is; {SUPPORTED}, in which attention modules know their layer"
        )
    if not numbered and not any(_file_knows_interface(type(module)) for module in parts):
        raise NotImplementedError(_no_interface(decoder, name))
    if numbered and all(attribute(module, "is_causal") is False for module in numbered):
        raise NotImplementedError(
            f"model: the attention of {name} goes both ways, to tokens before and behind; {SUPPORTED}"
        )
    making = {kind for kind in set(map(type, parts)) if _has_methods_for_masks(kind)}
    masking = [module for module in parts if _has_number(module) and type(module) in making]
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
            f"model: {doubtful[0]} makes masks of its own, which attnrb cannot know; {SUPPORTED} and its masks"
        )


def _no_interface(decoder: Any, name: str) -> str:
    sizes = decoder.config.get_text_config(decoder=True)
    if size(sizes, "decoder_attention_heads", "num_attention_heads") is None:
        return f"model: {name} has no attention layers; {SUPPORTED}"
    numbered = [module for module in _parts(decoder) if _has_number(module)]
    # Of nested modules with a number the inner ones compute attention.
    inner = [module for module in numbered if not any(each in numbered for each in list(module.modules())[1:])]
    who = type(inner[0]).__name__ if inner else name
    return (
        f"model: {who} computes attention by itself and does not use transformers' AttentionInterface, so attnrb "
        f"cannot reach it; {SUPPORTED}"
    )


def _parts(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a decoder that may be attention.

    Models are not, which know the interface only to choose one, nor is what belongs to a model within, such as one for
    images, if other modules know their layer.
    """
    from transformers import PreTrainedModel

    own: list[torch.nn.Module] = []
    waiting = deque(decoder.children())
    while waiting:
        module = waiting.popleft()
        if not isinstance(module, PreTrainedModel):
            own.append(module)
            if module._modules:
                waiting.extend(module.children())
    if any(map(_has_number, own)):
        return own
    return [module for module in every_module(decoder) if not isinstance(module, PreTrainedModel)]


def _has_number(module: torch.nn.Module) -> bool:
    return isinstance(attribute(module, "layer_idx"), int)


def every_module(root: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of ``root.modules()``, itself first: quicker, since a patch goes through hundreds."""
    found = {root: None}
    waiting = [root]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def attribute(module: torch.nn.Module, name: str) -> Any:
    """An attribute of a module that is neither a tensor nor a module; None where there is none.

    A module looks for what it has not among its tensors and modules, and raises: with hundreds of them that shows.
    """
    if name in vars(module):
        return vars(module)[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


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
