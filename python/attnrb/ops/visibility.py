"""What a query may see, said without an n-by-n mask."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attnrb.ops.shown import shown_fields


@dataclass(frozen=True, eq=False, repr=False)
class Visibility:
    """Which keys each query may see. Every condition that is set must hold.

    Positions are cache slots: query i sits at slot ``query_offset + i``, key j at slot ``key_offset + j``. A query that
    sees no key gets a zero output, no outliers and a log-sum-exp of -inf.

    Attributes:
        causal: a key's slot must not exceed the query's. The default, None, is True without a mask and False with one.
        query_offset: slot of the first query: one number for all sequences, or int64 or int32 ``[B]``, one for
            each. The default, None, puts the last query on the last key: ``key_offset + N - M``.
        key_offset: slot of the first key, at least 0. Not 0 in windowed layers, which cache only their last keys.
        window: how many slots back a query sees, its own included (slot of key > slot of query - window). At least 1;
            None: no limit.
        chunk: slots are counted off in chunks of this many, from ``key_start`` of the batch row where that is given,
            else from slot 0; a query sees keys of its own chunk only. At least 1; None: no chunks.
        key_start: int64 or int32 ``[B]``: first slot visible in each batch row (left padding).
        key_end: int64 or int32 ``[B]``: one past the last slot visible in each batch row (right padding).
        mask: bool, broadcastable to ``[B, H, M, N]``, True where the key is visible: for everything else.

    Raises:
        TypeError: an attribute has the wrong type or dtype.
        ValueError: ``window`` or ``chunk`` is below 1, ``key_offset`` below 0, or a tensor has the wrong rank.
    """

    causal: bool | None = None
    query_offset: int | torch.Tensor | None = None
    key_offset: int = 0
    window: int | None = None
    key_start: torch.Tensor | None = None
    key_end: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.causal is not None and not isinstance(self.causal, bool):
            raise TypeError(f"causal: expected True, False or None, got {self.causal!r}")
        if isinstance(self.query_offset, torch.Tensor):
            check_slots("query_offset", self.query_offset)
        else:
            _check_integer("query_offset", self.query_offset, "an int, an int64 tensor [B] or None", optional=True)
        _check_integer("key_offset", self.key_offset, "an int", optional=False)
        if self.key_offset < 0:
            raise ValueError(f"key_offset: expected a slot of at least 0, got {self.key_offset}")
        for name, value in (("window", self.window), ("chunk", self.chunk)):
            _check_integer(name, value, "an int or None", optional=True)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, or None for no limit, got {value}")
        for name, bounds in (("key_start", self.key_start), ("key_end", self.key_end)):
            if bounds is not None:
                check_slots(name, bounds)
        if self.mask is not None:
            check_mask("mask", self.mask)

    def __repr__(self) -> str:
        return shown_fields(self, vars(self))


class VisibilityArguments(NamedTuple):
    """A visibility as the ops take it, under the names of their arguments."""

    causal: bool = True
    query_offset: int | None = None
    """Slot of the first query of every sequence; None: ``key_offset + N - M``, or ``query_offsets`` has them."""
    query_offsets: torch.Tensor | None = None
    key_offset: int = 0
    window: int = 0
    """0: no limit."""
    chunk: int = 0
    """0: no chunks."""
    key_start: torch.Tensor | None = None
    key_end: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def for_older_ops(self, queries: int, keys: int) -> tuple[Any, ...]:
        """In the order of the ops of the first release, for so many queries and keys; offsets and chunks left out."""
        offset = self.key_offset + keys - queries if self.query_offset is None else self.query_offset
        return self.causal, offset, self.key_offset, self.window, self.key_start, self.key_end, self.mask


DEFAULT_VISIBILITY = VisibilityArguments()


def visibility_arguments(visibility: Visibility | torch.Tensor | None) -> VisibilityArguments:
    """What an op is told for ``visibility``.

    Args:
        visibility: a `Visibility`, a bool mask, or None: causal, with the last query on the last key.

    Raises:
        TypeError: ``visibility`` is something else, or a mask that is not boolean.
    """
    if visibility is None:
        return DEFAULT_VISIBILITY
    if isinstance(visibility, torch.Tensor):
        check_mask("visibility", visibility)
        return VisibilityArguments(causal=False, mask=visibility)
    if not isinstance(visibility, Visibility):
        raise TypeError(f"visibility: expected a Visibility, a bool tensor or None, got {describe(visibility)}")
    offset, offsets = visibility.query_offset, None
    if isinstance(offset, torch.Tensor):
        offset, offsets = None, offset
    return VisibilityArguments(
        visibility.mask is None if visibility.causal is None else visibility.causal,
        offset,
        offsets,
        visibility.key_offset,
        visibility.window or 0,
        visibility.chunk or 0,
        visibility.key_start,
        visibility.key_end,
        visibility.mask,
    )


def check_mask(name: str, mask: Any) -> None:
    """Refuses anything but a bool tensor of at most four dimensions."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, True where a key is visible, got {describe(mask)}")
    if mask.dim() > 4:
        raise ValueError(f"{name}: expected at most 4 dimensions [B, H, M, N], got {tuple(mask.shape)}")


def check_slots(name: str, value: Any) -> None:
    """Refuse anything but an int64 or int32 tensor ``[B]``."""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor [B], got {describe(value)}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected one slot for each batch row, [B], got the shape {tuple(value.shape)}")


def _check_integer(name: str, value: Any, expected: str, *, optional: bool) -> None:
    if optional and value is None:
        return
    # A size under torch.compile is an int or a SymInt; True and False are ints only by accident.
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def describe(value: Any) -> str:
    """What came, for the end of an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} ({reprlib.repr(value)})"
