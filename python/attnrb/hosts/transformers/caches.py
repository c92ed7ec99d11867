"""Caches: what is kept of the texts in them, and those that attnrb cannot serve.

Note: [Slots are tokens]
Layers tell each other keys by their slots. Tools that drop keys from a cache choose them for each layer, so that a slot
is one token in one layer and another in the next. Where the layers then hold different numbers of keys, the mask does
not fit (`check_keys`). Where they hold equally many, only positions tell: the next token's is beyond the number of keys
that are left (`Caches`). A position below its slot is padding on the left.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Caches", "Sequences", "cache_of", "check_keys", "with_cache"]

# What a forward calls its cache, and its output: the first since transformers 5.24, the second before.
_NAMES = ("cache", "past_key_values")

_WHY = (
    "past_key_values: {what}: keys were removed from this cache. attnrb tells keys by their slots, so it serves caches "
    "that hold the same tokens in every layer"
)


def cache_of(given: Any) -> Any:
    """The cache among the keyword arguments of a forward, or in its output; None where there is none."""
    for name in _NAMES:
        cache = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        if cache is not None:
            return cache
    return None


def with_cache(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a model takes a cache."""
    known = inspect.signature(model.forward).parameters
    return {next((name for name in _NAMES if name in known), _NAMES[-1]): cache}


class Caches:
    """The caches that a patched model is called with, and how many keys they held when it was done."""

    def __init__(self) -> None:
        self._lengths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def check(self, cache: Any, positions: Any, queries: int) -> None:
        """Refuse a cache from which keys were removed.

        Positions are looked at only where a cache comes for the first time or was changed since, for on an accelerator
        a look is a wait.

        Args:
            cache: that of this forward, or None.
            positions: int ``[B or 1, M]``: its ``position_ids``; anything else says nothing.
            queries: M.

        Raises:
            NotImplementedError: the first query's position is beyond the keys that the cache holds.
        """
        if cache is None or torch.compiler.is_compiling():
            return
        held = cache.get_seq_length()
        if not isinstance(held, int):  # the live counter of a static cache, from which nothing is removed
            return
        as_left = self._lengths.get(cache) == held
        self._lengths[cache] = held + queries
        if held == 0 or as_left or not isinstance(positions, torch.Tensor) or positions.dim() != 2:
            return
        first = int(positions[:, 0].max())
        if first > held:
            raise NotImplementedError(
                _WHY.format(what=f"the first new token has the position {first}, and the cache holds {held} keys")
            )


class Sequences:
    """What policies keep of the texts in caches, for as long as a cache holds their keys."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def of(self, cache: Any) -> dict[Any, Any]:
        """What is kept of the texts in ``past_key_values``; an empty cache begins new ones, and so does None.

        Raises:
            NotImplementedError: a graph is being traced, which cannot find it again in the next call.
        """
        if cache is None:
            return {}
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "past_key_values: this policy keeps what it found in a prompt for the tokens after it, which a graph "
                "of torch.compile cannot: compile without a cache, or run the model eagerly"
            )
        if int(cache.get_seq_length()) == 0:
            self._kept[cache] = {}
        return self._kept.setdefault(cache, {})

    def note(self, output: Any, sequence: dict[Any, Any]) -> None:
        """Keep it by the cache that a forward made, if it made one."""
        if torch.compiler.is_compiling():
            return
        parts = output if isinstance(output, tuple) else (cache_of(output),)
        for cache in parts:
            if hasattr(cache, "get_seq_length"):
                self._kept.setdefault(cache, sequence)


def check_keys(module: torch.nn.Module, expected: int | None, keys: int, queries: int) -> None:
    """Refuse a layer that holds another number of keys than its mask is for.

    Args:
        module: its attention.
        expected: the number of keys that the mask is for; None: not known.
        keys: N.
        queries: M; where all keys are new, there is no cache, and the mask may be longer.

    Raises:
        NotImplementedError: saying so.
    """
    if expected is not None and keys not in (expected, queries):
        layer = getattr(module, "layer_idx", None)
        raise NotImplementedError(_WHY.format(what=f"layer {layer} has {keys} keys where its mask is for {expected}"))
