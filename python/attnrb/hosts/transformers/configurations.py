"""How the modules of a patched model learn attnrb's name, without its configuration saying it.

Note: [Who says attnrb's name]
transformers looks up attention and masks by a name in the configuration that a module holds. Other code reads that name
too: trainers make a second model with it, configurations are saved and checked by it. So the configuration of a patched
model stays as it is. Its modules hold stand-ins for it instead. A stand-in is an object of a subclass, made for this,
which shares the attributes of its original (one ``__dict__`` for both), so that either sees what is set on the other,
and which differs in the name alone. Modules of attention always read attnrb's name. A model within the model, such as
the decoder, reads it only while it runs, since users read the configuration of such a model too. The whole model, if it
has a head, holds its own configuration throughout. Copies of a stand-in, by whatever means, are copies of its original.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from attnrb.hosts.session import calls_of, current_forward
from attnrb.hosts.transformers.interface import every_module

# The name in transformers' AttentionInterface and AttentionMaskInterface, and where a configuration holds its own.
NAME = "attnrb"
IMPLEMENTATION = "_attn_implementation_internal"
_MASKS = "create_masks_for_generate"

# The models around a decoder that run in this thread, each within the one before it: some make its masks.
_running: ContextVar[tuple[weakref.ref[torch.nn.Module], ...]] = ContextVar("attnrb_models_running", default=())


class Configurations:
    """The configurations of one model, with stand-ins in the modules that are to read attnrb's name."""

    def __init__(self, whole: Any, decoder: Any) -> None:
        """Give every module of a model that holds a configuration of its decoder's modules a stand-in for it.

        Args:
            whole: the model.
            decoder: the part of it that holds its layers, or the model itself.
        """
        from transformers import PreTrainedModel

        # Each module is looked at once, and there are hundreds.
        everywhere = [(module, _held(module)) for module in every_module(whole)]
        within = set(map(id, every_module(decoder)))
        renamed = {id(plain(each)) for module, held in everywhere if id(module) in within for each in held.values()}
        renamed.add(id(plain(decoder.config.get_text_config(decoder=True))))
        stand_ins = _StandIns(renamed)
        headed = whole.base_model is not whole or whole.get_output_embeddings() is not None
        # (holder, attribute, what it held, what it holds)
        self._places: list[tuple[Any, str, Any, Any]] = []
        self.around: list[Any] = []
        """The models that hold the decoder and may make its masks."""
        for module, configurations in everywhere:
            is_model = isinstance(module, PreTrainedModel)
            if module is whole and headed and whole is not decoder:
                continue
            for name, held in configurations.items():
                stand_in = stand_ins.of(plain(held), always=not is_model)
                if stand_in is not None:
                    self._places.append((module, name, plain(held), stand_in))
            if is_model and module is not decoder and any(each is decoder for each in module.modules()):
                self.around.append(module)
        masks = _Masks.of(whole, stand_ins.of(plain(whole.config), always=True))
        if masks is not None:
            self._places.append((whole, _MASKS, _NOTHING, masks))
        # Only now, when nothing can fail any more.
        for holder, name, _, new in self._places:
            vars(holder)[name] = new

    def restore(self) -> None:
        """Put the originals back."""
        for holder, name, original, new in self._places:
            if vars(holder).get(name) is not new:
                continue
            if original is _NOTHING:
                del vars(holder)[name]
            else:
                vars(holder)[name] = original
        self._places = []


def begin_model(model: torch.nn.Module, *_: Any) -> None:
    """Note that a model around a decoder runs in this thread, until `end_model`: hooks of it."""
    if not torch.compiler.is_compiling():
        _running.set((*_still_running(), weakref.ref(model)))


def end_model(*_: Any) -> None:
    """See `begin_model`."""
    if not torch.compiler.is_compiling():
        _running.set(_running.get()[:-1])


def _still_running() -> tuple[weakref.ref[torch.nn.Module], ...]:
    """The models that run, without those that an interrupt ended: Note: [Interrupts]."""
    running = _running.get()
    if running and not calls_of(running[-1]()):
        running = tuple(each for each in running if calls_of(each()))
        _running.set(running)
    return running


def plain(configuration: Any) -> Any:
    """What a stand-in stands for; anything else is returned as it is."""
    return configuration._attnrb_original if isinstance(configuration, _StandIn) else configuration


_NOTHING = object()


def _held(holder: Any) -> dict[str, Any]:
    from transformers.configuration_utils import PretrainedConfig

    return {name: value for name, value in vars(holder).items() if isinstance(value, PretrainedConfig)}


class _StandIn:
    """What marks the classes that `_kind` makes."""

    __slots__ = ()
    _attnrb_original: Any


class _StandIns:
    """The stand-ins of one patch: at most two for each configuration."""

    def __init__(self, renamed: set[int]) -> None:
        self._renamed = renamed
        self._made: dict[tuple[int, bool], Any] = {}

    def of(self, original: Any, *, always: bool) -> Any:
        """A stand-in for a configuration that is to say attnrb's name, itself or in a part; None for any other."""
        key = (id(original), always)
        if key not in self._made:
            parts = {name: (part, self.of(part, always=always)) for name, part in _held(original).items()}
            parts = {name: pair for name, pair in parts.items() if pair[1] is not None}
            named = id(original) in self._renamed
            self._made[key] = _stand_in(original, named, always, parts) if named or parts else None
        return self._made[key]


_kinds: dict[tuple[type, bool], type] = {}


def _stand_in(original: Any, named: bool, always: bool, parts: dict[str, tuple[Any, Any]]) -> Any:
    base = type(original)
    if named and not parts:
        # One class for all configurations of a class: what torch.compile traced stays valid in the next patch.
        kind = _kinds.get((base, always)) or _kinds.setdefault((base, always), _kind(base, named, always, parts))
    else:
        kind = _kind(base, named, always, parts)
    made: Any = object.__new__(kind)
    object.__setattr__(made, "__dict__", vars(original))
    object.__setattr__(made, "_attnrb_original", original)
    return made


def _kind(base: type, named: bool, always: bool, parts: dict[str, tuple[Any, Any]]) -> type:
    """A class of stand-ins for configurations of a class.

    Args:
        base: the class.
        named: whether they say attnrb's name.
        always: whether they say it always, or only while a model runs.
        parts: by name the configurations within and their stand-ins.
    """
    members: dict[str, Any] = {
        "__slots__": ("_attnrb_original",),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__new__": lambda _, *arguments, **options: base(*arguments, **options),  # what is made of it is plain
        "__copy__": lambda self: copy.copy(self._attnrb_original),
        "__deepcopy__": lambda self, memo: copy.deepcopy(self._attnrb_original, memo),
        "__reduce_ex__": lambda self, _: (_itself, (self._attnrb_original,)),
        "__eq__": lambda self, other: self._attnrb_original == plain(other),
        "__hash__": base.__hash__,
        **{name: _part(name, *pair) for name, pair in parts.items()},
    }
    if named:
        members["_attn_implementation"] = _name_always if always else _name_while_running
        members[IMPLEMENTATION] = _own_name
    return type(base.__name__, (_StandIn, base), members)


def _part(name: str, original: Any, stand_in: Any) -> property:
    def read(self: Any) -> Any:
        held = vars(self)[name]
        return stand_in if held is original else held

    def write(self: Any, value: Any) -> None:
        vars(self)[name] = plain(value)

    return property(read, write)


def _set_implementation(self: Any, value: Any) -> None:
    self._attnrb_original._attn_implementation = value


def _running_name(self: Any) -> Any:
    if torch.compiler.is_compiling() or current_forward() is not None or _still_running():
        return NAME
    return vars(self).get(IMPLEMENTATION)


def _keep_name(self: Any, value: Any) -> None:
    if value != NAME:  # a model that is made with a stand-in writes back what it read
        vars(self)[IMPLEMENTATION] = value


_own_name = property(lambda self: vars(self).get(IMPLEMENTATION), _keep_name)
_name_always = property(lambda self: NAME, _set_implementation)
_name_while_running = property(_running_name, _set_implementation)


def _itself(original: Any) -> Any:
    """What a pickled stand-in becomes."""
    return original


class _Masks:
    """What ``generate`` makes masks with ahead of a forward: as the model does, by attnrb's name."""

    def __init__(self, kind: type, original: Any, stand_in: Any) -> None:
        self._kind, self._original, self._stand_in = kind, original, stand_in

    @classmethod
    def of(cls, whole: Any, stand_in: Any) -> _Masks | None:
        """Of a model, or None where it makes none, or makes them by itself."""
        kind = type(whole)
        static = inspect.getattr_static(kind, _MASKS, None)
        if stand_in is None or _MASKS in vars(whole) or not hasattr(whole, "prepare_inputs_for_generation"):
            return None
        return cls(kind, plain(whole.config), stand_in) if static is None or isinstance(static, staticmethod) else None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if plain(options.get("config")) is self._original:
            options["config"] = self._stand_in
        return _masks_of(self._kind)(*arguments, **options)

    def __reduce__(self) -> Any:
        return _masks_of, (self._kind,)


def _masks_of(kind: type) -> Callable[..., Any]:
    """The function by which a class of models makes masks for ``generate``."""
    from transformers import masking_utils

    return getattr(kind, _MASKS, masking_utils.create_masks_for_generate)


class Hook:
    """A hook of a patch; a copy of it, made with the model that holds it, does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @property
    def owner(self) -> Any:
        """What the hook's function is a method of."""
        return getattr(self._function, "__self__", None)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    """What a copy of a hook does."""
