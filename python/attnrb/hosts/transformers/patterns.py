"""Which pattern a mask function of transformers describes, told by which function it is and what it was made with.

Note: [Recognised patterns]
transformers composes masks from small functions of a query's and a key's slot, which functions of its `masking_utils`
make: ``sliding_window_overlay(6)`` returns one that says whether a key is within a window of 6. Every function that
such a maker returns has the same code, which stands in the maker's own, and keeps what it was made with in its closure.
So the code says which pattern it is, and the closure its numbers. Intersections keep the functions that they combine,
and are read one by one. A function with any other code, from a model or from the user, is not guessed at: it gets the
general mask ``[B, 1, M, N]``.

A graph of torch.compile cannot look into closures. There transformers' other arguments say whether the function is made
of numbers alone; if so, it is read while the graph is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from attnrb.ops.torch_version import TORCH_VERSION

__all__ = ["Pattern", "recognise"]

PACKED = "several texts share a row, told apart by their positions"
_CLOSURES_IN_GRAPHS = TORCH_VERSION >= (2, 11)


class Pattern(NamedTuple):
    """What a mask function says of a query and a key, in numbers. All that is set must hold."""

    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    chunk_origin: torch.Tensor | None = None
    """int64 ``[B]``: the slot that chunks are counted from; None: the first token of each row."""
    padding: tuple[torch.Tensor, ...] = ()
    """Padding masks bool ``[B, slots]`` that are part of the pattern."""
    nothing: bool = False
    """No query sees any key: an overlay for images in a text without images, or a window of 0."""


_CAUSAL = Pattern(causal=True)
_EVERYTHING = Pattern()


def recognise(function: Callable[..., Any], options: Mapping[str, Any], *, packed: bool) -> Pattern | str:
    """Recognise the pattern of a mask function.

    Args:
        function: what transformers passes to the `AttentionMaskInterface`.
        options: what it passes besides: ``local_size``, ``use_vmap``, ``config``.
        packed: whether positions may tell that several texts share a row; a graph cannot look.

    Returns:
        The pattern, or why there is none, as part of a sentence.
    """
    if function is masking_utils.causal_mask_function:  # nearly always
        return _CAUSAL
    return _read_in_graph(function, options, packed) if torch.compiler.is_compiling() else _read(function)


def _read(function: Callable[..., Any]) -> Pattern | str:
    """The pattern of one function, or why there is none."""
    if function is masking_utils.causal_mask_function:
        return _CAUSAL
    if function is _bidirectional:
        return _EVERYTHING
    code = getattr(function, "__code__", None)
    read = None if code is None else _READERS.get(code)
    if read is None:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"attnrb does not know the mask function {name} of {getattr(function, '__module__', 'nowhere')}"
    assert code is not None
    cells = function.__closure__ or ()
    return read(**{name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)})


def _read_in_graph(function: Callable[..., Any], options: Mapping[str, Any], packed: bool) -> Pattern | str:
    if function is _bidirectional:
        return _EVERYTHING
    size, custom = options.get("local_size"), options.get("use_vmap")
    if packed or custom or size is None or function.__code__ is not _AND or not _CLOSURES_IN_GRAPHS:
        return "a graph of torch.compile cannot tell which pattern it is"
    config = options.get("config")
    if getattr(config, "attention_chunk_size", None) == size and getattr(config, "sliding_window", None) != size:
        # Not made of numbers alone. Before 5.4 transformers does not say whether anything was combined with it.
        known = custom is not None
        return Pattern(causal=True, chunk=size) if known else "a graph of torch.compile cannot tell which pattern it is"
    causal, window, nothing, why = _read_constant(function)
    return why or Pattern(causal, window, nothing=nothing)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _read_constant(function: Callable[..., Any]) -> tuple[bool, int | None, bool, str]:
    """Causality, window and `Pattern.nothing`, or why there is no such pattern: read when a graph is traced."""
    pattern = _read(function)
    if isinstance(pattern, str):
        return False, None, False, pattern
    if pattern != Pattern(pattern.causal, pattern.window, nothing=pattern.nothing):
        return False, None, False, "a graph of torch.compile cannot tell which pattern it is"
    return pattern.causal, pattern.window, pattern.nothing, ""


# ---------------------------------------------------------------------------------------------------- one by one


def _intersection(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | str:
    whole = _EVERYTHING
    for function in mask_functions:
        part = _read(function)
        if isinstance(part, str):
            return part
        if whole.chunk is not None and part.chunk is not None:
            return "chunks of two kinds are combined"
        chunked = whole if part.chunk is None else part
        windows = [each.window for each in (whole, part) if each.window is not None]
        whole = Pattern(
            causal=whole.causal or part.causal,
            window=min(windows, default=None),
            chunk=chunked.chunk,
            chunk_origin=chunked.chunk_origin,
            padding=whole.padding + part.padding,
            nothing=whole.nothing or part.nothing,
        )
    return whole


def _union(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | str:
    parts: list[Pattern] = []
    for function in mask_functions:
        part = _read(function)
        if isinstance(part, str):
            return part
        if not part.nothing:
            parts.append(part)
    if not parts:
        return Pattern(nothing=True)
    return parts[0] if len(parts) == 1 else "it joins several patterns"


def _window(sliding_window: int) -> Pattern | str:
    return Pattern(window=sliding_window) if sliding_window > 0 else Pattern(nothing=True)


def _chunks(chunk_size: int, left_padding: torch.Tensor) -> Pattern | str:
    return Pattern(chunk=chunk_size, chunk_origin=left_padding)


def _padding(padding_mask: torch.Tensor) -> Pattern | str:
    return Pattern(padding=(padding_mask,))


def _blocks(block_sequence_ids: torch.Tensor) -> Pattern | str:
    if bool((block_sequence_ids >= 0).any()):
        return "tokens of an image or another block see each other"
    return Pattern(nothing=True)


def _several_texts(packed_sequence_mask: torch.Tensor) -> Pattern | str:
    # Before 5.4 transformers adds this also where each row has one text.
    return _EVERYTHING if bool((packed_sequence_mask == packed_sequence_mask[:, :1]).all()) else PACKED


def _other_positions(mask_function: Callable[..., Any], position_ids: torch.Tensor) -> Pattern | str:
    return PACKED


def _shifted(mask_function: Callable[..., Any], q_offset: Any, kv_offset: Any) -> Pattern | str:
    pattern = _read(mask_function)
    plain = isinstance(pattern, Pattern) and pattern == Pattern(pattern.causal, pattern.window)
    if isinstance(pattern, str) or (q_offset is kv_offset and plain) or pattern == _EVERYTHING:
        return pattern
    return "slots are counted from elsewhere"


# By the function of masking_utils that makes them: what reads the functions that it makes, from their closure.
_MAKERS: dict[str, Callable[..., Pattern | str]] = {
    "and_masks": _intersection,
    "or_masks": _union,
    "sliding_window_overlay": _window,
    "chunked_overlay": _chunks,
    "padding_mask_function": _padding,
    "blockwise_overlay": _blocks,
    "packed_sequence_mask_function": _several_texts,
    "remap_positions_for_packed_sequence": _other_positions,
    "add_offsets_to_mask_function": _shifted,
}


def _code_inside(maker: Callable[..., Any]) -> CodeType:
    """The code of the function that this one makes and returns."""
    (code,) = (each for each in maker.__code__.co_consts if isinstance(each, CodeType) and each.co_freevars)
    return code


def _readers() -> dict[CodeType, Callable[..., Pattern | str]]:
    """What reads functions of each code; makers that this version of transformers has not are left out."""
    readers = {}
    for name, reader in _MAKERS.items():
        maker = getattr(masking_utils, name, None)
        if maker is not None:
            code = _code_inside(maker)
            arguments = reader.__code__.co_varnames[: reader.__code__.co_argcount]
            if set(code.co_freevars) == set(arguments):  # otherwise it means something else by now
                readers[code] = reader
    return readers


_READERS = _readers()
_AND = _code_inside(masking_utils.and_masks)
_bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
