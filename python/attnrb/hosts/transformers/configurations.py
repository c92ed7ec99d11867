"""The configurations of a patched model: copies that name attnrb's attention, and how copied models get rid of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

# The name in transformers' AttentionInterface and AttentionMaskInterface, and where a configuration holds it.
NAME = "attnrb"
IMPLEMENTATION = "_attn_implementation_internal"


class Configurations:
    """The configurations of one model, replaced by copies that name attnrb's attention."""

    def __init__(self, model: torch.nn.Module, decoder: Any) -> None:
        """Give every module of ``model`` that holds a configuration of ``decoder``'s modules a copy of it."""
        from transformers.configuration_utils import PretrainedConfig

        def held(holder: Any) -> dict[str, Any]:
            return {name: value for name, value in vars(holder).items() if isinstance(value, PretrainedConfig)}

        renamed = {id(each) for module in decoder.modules() for each in held(module).values()}
        renamed.add(id(decoder.config.get_text_config(decoder=True)))
        copies: dict[int, Any] = {}  # by the id of the original, which is its own copy where nothing changes

        def replacement(original: Any) -> Any:
            if id(original) not in copies:
                parts = {name: replacement(part) for name, part in held(original).items()}
                changed = {name: part for name, part in parts.items() if part is not vars(original)[name]}
                twin = original
                if changed or id(original) in renamed:
                    twin = copy.copy(original)
                    vars(twin).update(changed)
                    if id(original) in renamed:
                        vars(twin)[IMPLEMENTATION] = NAME
                    self._twins.append((original, twin, dict(vars(twin))))
                copies[id(original)] = twin
            return copies[id(original)]

        # (original, copy, attributes of the copy at first), and (holder, attribute, original, copy).
        self._twins: list[tuple[Any, Any, dict[str, Any]]] = []
        self._places: list[tuple[torch.nn.Module, str, Any, Any]] = []
        for module in model.modules():
            for name, original in held(module).items():
                twin = replacement(original)
                if twin is not original:
                    self._places.append((module, name, original, twin))
        # Only now, when nothing can fail any more.
        for module, name, _, twin in self._places:
            vars(module)[name] = twin

    def restore(self) -> None:
        """Put the originals back, with what was set on their copies meanwhile."""
        for module, name, original, twin in self._places:
            if vars(module).get(name) is twin:
                vars(module)[name] = original
        for original, twin, before in self._twins:
            for name, value in vars(twin).items():
                if name != IMPLEMENTATION and not (name in before and before[name] is value):
                    vars(original)[name] = value
        self._places, self._twins = [], []

    def originals(self) -> list[tuple[Any, Any]]:
        """Each copy, with the attention implementation of its original."""
        return [(twin, vars(original).get(IMPLEMENTATION)) for original, twin, _ in self._twins]


class Hook:
    """A hook of a patch; a copy of it, made with the model that holds it, does nothing."""

    def __init__(self, function: Callable[..., Any], configurations: Configurations) -> None:
        self._function = function
        self._configurations = configurations

    @property
    def owner(self) -> Any:
        """What the hook's function is a method of."""
        return getattr(self._function, "__self__", None)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __reduce__(self) -> Any:
        return _leave_clean, (self._configurations.originals(),)


def _leave_clean(configurations: list[tuple[Any, Any]]) -> Callable[..., None]:
    """Give copied configurations the attention implementation that the originals of the copied model have."""
    for configuration, implementation in configurations:
        vars(configuration)[IMPLEMENTATION] = implementation
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    """What a copy of a hook does."""
