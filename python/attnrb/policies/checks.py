"""Checks of options: each names the option, says what was expected and what came."""

from __future__ import annotations

import difflib
import functools
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

__all__ = [
    "HeadChoice",
    "Indices",
    "as_ranges",
    "beyond_the_model",
    "choose_heads",
    "explained",
    "head_choice",
    "index",
    "indices",
    "iterable",
    "number",
    "read_ranges",
]

Indices = Sequence[int] | str
"""Numbers of layers or heads: a list, a range, or text such as ``"1-12,15"``."""

HeadChoice = Indices | Mapping[int, Indices]
"""Heads: the same for all layers, or ``{layer: heads}``, where a layer that is not named has none."""


def explained(cls: Any) -> None:
    """Let a dataclass say which options it has, and which is near, where an unknown one is given by name."""
    made = cls.__init__
    known = [each.name for each in fields(cls) if each.init]

    @functools.wraps(made)
    def init(self: Any, *values: Any, **options: Any) -> None:
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise TypeError(f"{name}: unknown option of {cls.__name__}; {hint}known are {', '.join(known)}")
        made(self, *values, **options)

    cls.__init__ = init


def number(name: str, value: Any) -> float:
    """A finite number as a float; numbers of NumPy and torch pass, text and truth values do not."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected a finite number, got {result}")
    return result


def index(name: str, value: Any) -> int:
    """An integer of at least 0."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if result < 0:
        raise ValueError(f"{name}: expected 0 or above, got {result}")
    return result


def indices(name: str, values: Any) -> tuple[int, ...]:
    """Ascending, without repeats, so that equal choices are equal configurations; text is read by `read_ranges`."""
    if isinstance(values, str):
        return tuple(read_ranges(name, values))
    found = {index(name, value) for value in iterable(name, values)}
    if not found:
        raise ValueError(f"{name}: expected at least one, got none; leave it None to mean all")
    return tuple(sorted(found))


def read_ranges(name: str, text: str) -> list[int]:
    """Numbers of a list like ``1-12,15`` or ``1-12+15``, ascending. Raises ValueError for anything else."""
    found: set[int] = set()
    for part in re.split(r"[,+]", text):
        match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?\s*", part)
        if match is None:
            raise ValueError(f"{name}: expected numbers and ranges like 1-12,15, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{name}: the range {part.strip()} runs backwards")
        found.update(range(first, last + 1))
    return sorted(found)


def as_ranges(numbers: Iterable[int]) -> str:
    """Numbers as `read_ranges` reads them, neighbours as a range: ``1-12,15``."""
    runs: list[list[int]] = []
    for each in sorted(set(numbers)):
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def iterable(name: str, values: Any) -> Iterable[Any]:
    """A sequence of anything but characters."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence, got {values!r}")
    return values


def head_choice(name: str, heads: HeadChoice) -> tuple[int, ...] | dict[int, tuple[int, ...]]:
    """Heads as a tuple, or as ``{layer: tuple}``; JSON's keys, which are strings, pass for layers."""
    if not isinstance(heads, Mapping):
        return indices(name, heads)
    by_layer = {}
    for layer, chosen in heads.items():
        place = int(layer) if str(layer).isascii() and str(layer).isdecimal() else layer
        by_layer[index(name, place)] = indices(f"{name}[{place}]", chosen)
    return by_layer


def choose_heads(heads: Any, layer: int, total: int) -> Sequence[int]:
    """The heads of one layer that a choice of `head_choice` names, of ``total``; None names all."""
    if heads is None:
        return range(total)
    chosen: Sequence[int] = heads.get(layer, ()) if isinstance(heads, Mapping) else heads
    return chosen


def beyond_the_model(layers: Any, heads: Any, total_layers: int, total: int) -> None:
    """Refuse layers and heads that a model of ``total_layers`` layers with ``total`` heads has not.

    Raises:
        ValueError: there are some.
    """
    by_layer = heads if isinstance(heads, Mapping) else {}
    for name, named in (("layers", layers or ()), ("heads", by_layer)):
        if beyond := [layer for layer in named if layer >= total_layers]:
            raise ValueError(f"{name}: the model's layers are 0 to {total_layers - 1}, got {as_ranges(beyond)}")
    for chosen in by_layer.values() if by_layer else (heads or (),):
        if beyond := [head for head in chosen if head >= total]:
            raise ValueError(f"heads: the model's heads are 0 to {total - 1}, got {as_ranges(beyond)}")
