"""What a mask says, and the numbers that carry it where the object itself cannot go.

Note: [Masks in numbers]
What attnrb hands to a model as a mask is a tensor int64 ``[B, 1, 1, 8 or more]``, a row of numbers for each text, named
by `Column`. The same stands as a `Geometry` in an attribute of the tensor, which layers read at no cost. Attributes do
not survive copies to another device, re-entrant checkpointing, or the edge of a compiled graph; the numbers do. Four
dimensions, because transformers takes such a mask for a finished one wherever it meets it again. The first number is a
mark: without it a tensor of integers is the user's, and no mask.

A model that is spread over devices copies its mask for each layer away from the first, and to read a copy there is to
wait for the device in each layer. So each mask in numbers of a forward is a zero wider than the one before it, and a
copy is known by its shape (`MadeMasks`).
"""

from __future__ import annotations

import dataclasses
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from attnrb.ops.visibility import Visibility, describe

__all__ = ["Column", "Geometry", "MadeMasks", "from_numbers", "integer", "to_numbers"]

# "attnrb" in ASCII, and a version of the columns.
_MARK = int.from_bytes(b"attnrb", "big") << 8 | 2
# Where there is no bound. Chunks are multiplied, so theirs leaves room.
_NO_BOUND = torch.iinfo(torch.int64).max
_NO_CHUNK = 1 << 60


class Column(IntEnum):
    """Which number of a row says what."""

    MARK = 0
    """That these are attnrb's numbers, and in which order."""
    KIND = 1
    """1: causal; 0: not."""
    QUERY_OFFSET = 2
    """Slot of the first query."""
    KEY_OFFSET = 3
    """Slot of the first key."""
    WINDOW = 4
    """How many slots back a query sees, its own included; the largest number: no limit."""
    CHUNK = 5
    """How many slots a chunk has; 2^60: no chunks."""
    KEY_START = 6
    """First slot that holds a token."""
    KEY_END = 7
    """One past the last slot that holds a token; the largest number: no limit."""


class Geometry(NamedTuple):
    """What a mask says, for one kind of attention in one forward."""

    visibility: Visibility
    tokens: torch.Tensor | None
    """bool ``[B, M]``: which queries are tokens rather than padding; None: all of them."""
    keys: int | None = None
    """N, of the layers that it is for; None: not known."""

    def on(self, device: torch.device) -> Geometry:
        """The same for layers on this device."""
        parts = {name: getattr(self.visibility, name) for name in ("query_offset", "key_start", "key_end", "mask")}
        away = {name: part for name, part in parts.items() if isinstance(part, torch.Tensor) and part.device != device}
        tokens = self.tokens
        if not away and (tokens is None or tokens.device == device):
            return self
        moved: dict[str, Any] = {name: part.to(device) for name, part in away.items()}
        return self._replace(
            visibility=dataclasses.replace(self.visibility, **moved),
            tokens=None if tokens is None else tokens.to(device),
        )


class MadeMasks:
    """The masks that one forward made, whose copies on other devices mean the same."""

    def __init__(self) -> None:
        self._made: list[tuple[torch.Tensor, Geometry]] = []
        self._moved: dict[tuple[int, torch.device], Geometry] = {}

    def __len__(self) -> int:
        return len(self._made)

    def add(self, mask: torch.Tensor, geometry: Geometry) -> None:
        """Note what a mask means."""
        self._made.append((mask, geometry))

    def of_copy(self, mask: torch.Tensor) -> Geometry | None:
        """What a copy of one of them on another device means; None where it is no such copy, or may be of several."""
        alike = [
            (number, geometry)
            for number, (made, geometry) in enumerate(self._made)
            if made.shape == mask.shape and made.dtype == mask.dtype and made.device != mask.device
        ]
        if not alike:
            return None
        (number, geometry), *others = alike
        if mask.dtype == torch.bool:  # it says itself what is visible; where keys begin, all must agree
            visibility = geometry.visibility
            if any(other.visibility.key_offset != visibility.key_offset for _, other in others):
                return None
            return geometry._replace(visibility=dataclasses.replace(visibility, mask=mask)).on(mask.device)
        key = number, mask.device
        if key not in self._moved:
            self._moved[key] = geometry.on(mask.device)
        return self._moved[key]


def to_numbers(visibility: Visibility, batch: int, device: torch.device | str | None, ordinal: int = 0) -> torch.Tensor:
    """A visibility without a mask, by `Note: [Masks in numbers]`: int64 ``[batch, 1, 1, 8 + ordinal]``.

    Args:
        visibility: what queries see.
        batch: B.
        device: where the mask is to be.
        ordinal: how many masks the forward made before.
    """
    row: dict[Column, Any] = {
        Column.MARK: _MARK,
        Column.KIND: int(bool(visibility.causal)),
        Column.QUERY_OFFSET: visibility.query_offset,
        Column.KEY_OFFSET: visibility.key_offset,
        Column.WINDOW: _NO_BOUND if visibility.window is None else visibility.window,
        Column.CHUNK: _NO_CHUNK if visibility.chunk is None else visibility.chunk,
        Column.KEY_START: 0,
        Column.KEY_END: _NO_BOUND,
    }
    bounds: dict[Column, Any] = {
        Column.QUERY_OFFSET: visibility.query_offset,
        Column.KEY_START: visibility.key_start,
        Column.KEY_END: visibility.key_end,
    }
    bounds = {column: bound for column, bound in bounds.items() if isinstance(bound, torch.Tensor)}
    if torch.compiler.is_compiling() or device is None or torch.device(device).type == "cpu":
        values = [[[[0 if column in bounds else row[column] for column in Column] + [0] * ordinal]]]
        numbers = torch.tensor(values, dtype=torch.int64, device=device)
        if batch != 1:
            numbers = numbers.expand(batch, -1, -1, -1)
        if bounds:
            numbers = numbers.clone()
    else:  # a number at a time, as an argument of a kernel: a copy from the host would wait for the device
        numbers = torch.zeros(batch, 1, 1, len(Column) + ordinal, dtype=torch.int64, device=device)
        for column, value in row.items():
            if column not in bounds and value != 0:
                numbers[..., column].fill_(value)
    for column, bound in bounds.items():
        numbers[:, 0, 0, column] = bound
    return numbers


def from_numbers(mask: torch.Tensor, queries: int) -> Geometry:
    """What `to_numbers` made.

    Args:
        mask: a mask of integers.
        queries: M.

    Raises:
        TypeError: it is not what `to_numbers` made, so it is a mask of the user's with the wrong dtype.
    """
    if mask.dtype != torch.int64 or mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] < len(Column):
        raise TypeError(_integers(mask))
    numbers = mask[:, 0, 0]
    compiling = torch.compiler.is_compiling()
    causal = _check_mark(mask, numbers, compiling)
    # Less 1 and more 1: a graph that is made before the number is known then knows that it is not below 1.
    first, key_offset, window, chunk = (
        integer(numbers[0, column] - least) + least
        for column, least in ((Column.QUERY_OFFSET, 0), (Column.KEY_OFFSET, 0), (Column.WINDOW, 1), (Column.CHUNK, 1))
    )
    start, end = numbers[:, Column.KEY_START].contiguous(), numbers[:, Column.KEY_END].contiguous()
    bounded = compiling or bool(((start > 0) | (end < _NO_BOUND)).any())
    visibility = Visibility(
        causal=causal,
        query_offset=first,
        key_offset=key_offset,
        window=window if compiling or window < _NO_BOUND else None,
        chunk=chunk if compiling or chunk < _NO_CHUNK else None,
        key_start=start if bounded else None,
        key_end=end if bounded else None,
    )
    return Geometry(visibility, queries_at_tokens(visibility, queries))


def _check_mark(mask: torch.Tensor, numbers: torch.Tensor, compiling: bool) -> bool:
    """Make sure that these are attnrb's numbers; whether they say causal."""
    marked = (numbers[:, Column.MARK] == _MARK).all()
    if compiling:  # a graph has one kind of attention
        torch._assert_async(marked & (numbers[:, Column.KIND] == 1).all(), _NOT_CAUSAL)
        return True
    if not bool(marked):
        raise TypeError(_integers(mask))
    return bool(numbers[0, Column.KIND] == 1)


_NOT_CAUSAL = (
    "attention_mask: expected a mask of attnrb's own for causal attention; a graph that begins between a model's masks "
    "and its layers takes no other integers"
)


def _integers(mask: torch.Tensor) -> str:
    return (
        "attention_mask: expected a mask [B, 1 or H, M, N] that is boolean (True: visible) or additive in floating "
        f"point (0: visible), or integers [B, slots] that say which slots are tokens, got {describe(mask)}"
    )


def queries_at_tokens(visibility: Visibility, queries: int) -> torch.Tensor | None:
    """Which queries sit at slots that hold tokens: bool ``[B, M]``, or None for all."""
    start, end = visibility.key_start, visibility.key_end
    if start is None or end is None or torch.compiler.is_compiling():
        return None
    offset = visibility.query_offset
    assert offset is not None
    slots = (offset[:, None] if isinstance(offset, torch.Tensor) else offset) + torch.arange(
        queries, device=start.device
    )
    return (slots >= start[:, None]) & (slots < end[:, None])


@torch.library.custom_op("attnrb::integer", mutates_args=())
def _integer(number: torch.Tensor) -> int:
    return int(number)


@_integer.register_fake
def _(number: torch.Tensor) -> int:
    _leave_out_of_cuda_graphs()
    size: Any = torch.library.get_ctx().new_dynamic_size(min=0)
    return size  # type: ignore[no-any-return]


def _leave_out_of_cuda_graphs() -> None:
    """Have Inductor record nothing that is computed from such a number.

    A CUDA graph holds one value of it. With a static cache, where transformers compiles a model for CUDA graphs by
    itself, the number is the slot of a token, and each token would record graphs of its own.
    """
    from torch._inductor import config

    left_out = getattr(config, "cudagraph_unsafe_unbacked_ops", None)  # of newer versions of torch
    if left_out is not None and "attnrb::integer" not in left_out:
        config.cudagraph_unsafe_unbacked_ops = [*left_out, "attnrb::integer"]


def integer(number: torch.Tensor | int) -> int:
    """A tensor of one number, at least 0, as an integer; in a compiled graph one that is read at every call."""
    if not isinstance(number, torch.Tensor):
        return number
    if torch.compiler.is_dynamo_compiling():  # which breaks the graph at an item()
        value: int = torch.ops.attnrb.integer.default(number)
        return value
    return int(number)
