"""The masks of Hugging Face models, without an n×n matrix wherever the pattern has a structure.

transformers asks the function registered here for the mask of each kind of attention, once in a forward, and hands what
it returns to every layer. Patterns that `Visibility` can say become a few numbers (`Note: [Masks in numbers]`), and any
other the general boolean mask ``[B, 1, M, N]``, which is counted and said.

Needs transformers, so it is imported only once a model is patched.

Note: [Masks that nobody looks at]
On the CPU a padding mask is read, and becomes numbers where its tokens are one range. To read what lies on another
device is to wait for it, which costs a token as much as a layer, and cannot be while a CUDA graph is recorded. So there
a mask of few queries stays a mask, ``[B, 1, M, N]`` with the queries' own rows: N numbers a text for a token that is
decoded. Prompts are read, once a forward, since numbers are what the fast kernels take; not while a graph is recorded.
A slot that only the device knows (a static cache counts there) stays a tensor as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from attnrb.hosts.session import current_forward
from attnrb.hosts.stats import warn_of_general_mask
from attnrb.hosts.transformers.attention import GEOMETRY
from attnrb.hosts.transformers.geometry import Geometry, MadeMasks, from_numbers, integer, queries_at_tokens, to_numbers
from attnrb.hosts.transformers.patterns import Pattern, recognise
from attnrb.ops.visibility import Visibility, describe

__all__ = ["Geometry", "attention_mask", "integer", "read_mask"]


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> torch.Tensor:
    """Make a mask that carries its `Geometry`: the function of the `AttentionMaskInterface`.

    Args:
        batch_size: B.
        q_length: M, the number of queries.
        kv_length: N, the number of keys.
        q_offset: slot of the first query. A static cache hands out its live counter: a tensor that goes on counting.
        kv_offset: slot of the first key.
        mask_function: the pattern, as transformers composes it from small functions.
        attention_mask: bool ``[B, slots]``, True for tokens, False for padding; None: no padding.
        cache_position: int ``[M]``: slots of the queries, which transformers before 5.4 passes instead of ``q_length``
            and ``q_offset``.
        device: where the mask is to be.
        options: what else transformers passes to functions of its own.
    """
    if cache_position is not None:
        q_length, device = cache_position.shape[0], cache_position.device
        # All keys are new: the first query sits at slot 0, and nothing has to be read.
        first = 0 if q_length == kv_length and kv_offset == 0 else _slot(cache_position[0], batch_size)
    else:
        assert q_length is not None, "transformers passes q_length, or cache_position before 5.4"
        first = _slot(q_offset, batch_size)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected [B, slots], which slots are tokens, or a mask [B, 1 or H, M, N], got "
            f"{describe(attention_mask)}"
        )
    forward = current_forward()
    if forward is not None:
        forward.first_slot = first
        if forward.unpadded:
            attention_mask = None

    pattern = recognise(mask_function, options, packed=forward is None or forward.packed)
    call = _Call(batch_size, first, q_length, kv_offset, kv_length, device)
    found = _in_numbers(pattern, attention_mask, call)
    if not isinstance(found, str):
        made = _made()
        mask = to_numbers(found, batch_size, device, ordinal=0 if made is None else len(made))
        return _bearing(mask, Geometry(found, queries_at_tokens(found, q_length), kv_length))

    if found == _UNREAD and q_length < _MANY_QUERIES:
        pass  # it is no larger than what was given
    elif forward is None or torch.compiler.is_compiling():  # a graph counts nothing
        warn_of_general_mask(found)
    else:
        forward.stats.add_general_mask(found)
    position: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset, "device": device or "cpu"}
    if cache_position is not None:
        position = {"cache_position": cache_position}
    # Those who ask for the general mask must get it: None would mean "plainly causal" or "everything".
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    general = masking_utils.sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **position,
        **options,
    )
    assert general is not None
    visibility = Visibility(causal=False, query_offset=first, key_offset=kv_offset, mask=general)
    return _bearing(general, Geometry(visibility, _query_tokens(attention_mask, first, q_length), kv_length))


def _bearing(mask: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """A mask that says what it means, itself and through the forward that made it."""
    setattr(mask, GEOMETRY, geometry)
    made = _made()
    if made is not None:
        made.add(mask, geometry)
    return mask


def _made() -> MadeMasks | None:
    """The masks of the forward that runs; a graph, which serves many forwards, notes none."""
    forward = current_forward()
    return None if forward is None or torch.compiler.is_compiling() else forward.made


_UNREAD = "the padding of a mask is not read while a CUDA graph is recorded"
_MANY_QUERIES = 64  # from here on numbers are worth waiting for: a library's kernels may take the dense part


def _unread(mask: torch.Tensor, queries: int) -> bool:
    """Whether a padding mask is left unread: see `Note: [Masks that nobody looks at]`."""
    if mask.device.type == "cpu" or torch.compiler.is_compiling():
        return False
    return queries < _MANY_QUERIES or (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _slot(offset: int | torch.Tensor, batch: int) -> int | torch.Tensor:
    """The slot of the first query: a number where that costs nothing to know, else int64 ``[batch]`` on its device."""
    if not isinstance(offset, torch.Tensor) or offset.device.type == "cpu" or torch.compiler.is_compiling():
        return integer(offset)
    # A copy: it may be a counter that goes on counting.
    return offset.to(torch.int64).reshape(1).repeat(batch)


class _Call(NamedTuple):
    """Where queries and keys are."""

    batch: int
    query_offset: int | torch.Tensor
    queries: int
    key_offset: int
    keys: int
    device: torch.device | str | None


def _in_numbers(pattern: Pattern | str, mask: torch.Tensor | None, call: _Call) -> Visibility | str:
    """A pattern and a padding mask as a visibility in numbers, or why that cannot be."""
    if isinstance(pattern, str):
        return pattern
    if pattern.padding:
        if mask is not None or len(pattern.padding) > 1 or pattern.padding[0].dim() != 2:
            return "padding is said in two ways"
        (mask,) = pattern.padding
    if mask is not None and _unread(mask, call.queries):
        return _UNREAD
    where: dict[str, Any] = {"query_offset": call.query_offset, "key_offset": call.key_offset}
    if pattern.nothing:
        none = torch.zeros(call.batch, dtype=torch.int64, device=call.device)
        return Visibility(causal=True, key_start=none, key_end=none, **where)
    # Causal queries look no further than their own slot.
    end = call.key_offset + call.keys
    first = call.query_offset
    ends = (end, first + call.queries) if pattern.causal and not isinstance(first, torch.Tensor) else (end,)
    padding = _padding(mask, ends)
    if padding is None:
        return "a row has padding between its tokens"
    if pattern.chunk_origin is not None and not _begins(padding, pattern.chunk_origin):
        return "its chunks are not counted from the first token of each row"
    limits: dict[str, Any] = {"window": pattern.window, "chunk": pattern.chunk}
    return Visibility(causal=pattern.causal, key_start=padding.start, key_end=padding.end, **limits, **where)


def read_mask(mask: torch.Tensor | None, first_slot: int | torch.Tensor | None, queries: int, keys: int) -> Geometry:
    """Read a mask without a geometry: one of the user's, or one of ours that lost it on the way.

    Args:
        mask: what the layer got: numbers (see `Note: [Masks in numbers]`); or a mask ``[B, 1 or H, M, N or more]``,
            boolean (True: visible) or additive (0: visible, hugely negative: not); or None, plainly causal.
        first_slot: slot of the first query; None: not known, so the last query is on the last key.
        queries: M.
        keys: N.

    Raises:
        TypeError: the mask holds integers that are not attnrb's.
        NotImplementedError: an additive mask holds other values, for example position biases; or a mask has not four
            dimensions.
    """
    if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
        return from_numbers(mask, queries)
    if first_slot is None:
        first_slot = keys - queries
    elif isinstance(first_slot, torch.Tensor):
        first_slot = integer(first_slot[0])
    # A windowed layer has dropped its oldest keys; a static cache has room for keys to come.
    key_offset = torch.sym_max(first_slot + queries - keys, 0)  # type: ignore[no-untyped-call]
    if mask is None:
        return Geometry(Visibility(causal=True, query_offset=first_slot, key_offset=key_offset), None)
    if mask.dim() != 4:
        raise NotImplementedError(
            f"attention_mask: the model changed the mask {tuple(mask.shape)} on its way to the attention, so attnrb "
            "cannot tell what it means; masks must reach it as they were made, or have four dimensions"
        )
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            raise NotImplementedError(
                "attention_mask: attnrb supports additive masks of 0 (visible) and hugely negative numbers (not "
                "visible), and not biases between them"
            )
        mask = ~hidden
    visibility = Visibility(causal=False, query_offset=first_slot, key_offset=key_offset, mask=mask[..., :keys])
    return Geometry(visibility, None)


# ------------------------------------------------------------------------------------------------------ the padding


class _Padding(NamedTuple):
    """The slots of each row that hold tokens: ``start`` up to but not ``end``; int64 ``[B]``, None: no bound."""

    start: torch.Tensor | None = None
    end: torch.Tensor | None = None


def _padding(mask: torch.Tensor | None, ends: tuple[int, ...]) -> _Padding | None:
    """Read a padding mask as one range of slots in each row; None where a row has holes inside.

    Args:
        mask: bool ``[B, slots]``; slots beyond its end are padding.
        ends: the least of them is one past the last slot that a query may look at.
    """
    if mask is None:
        return _Padding()
    rows, width = mask.shape
    compiling = torch.compiler.is_compiling()
    if not compiling and bool(mask.all()):
        return _Padding(
            end=torch.full((rows,), width, dtype=torch.int64, device=mask.device) if width < min(ends) else None
        )
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    whole = begins.sum(1) <= 1
    if compiling:
        torch._assert_async(whole.all(), _HOLES)
    elif not bool(whole.all()):
        return None
    start = begins.to(torch.uint8).argmax(1)
    return _Padding(start, start + mask.sum(1))


def _begins(padding: _Padding, slots: torch.Tensor) -> bool:
    """Whether the tokens of every row begin at its slot of these; rows without a token do not matter."""
    if padding.start is None or padding.end is None:
        return not bool(slots.any())
    return bool(((padding.start == slots) | (padding.start == padding.end)).all())


_HOLES = (
    "attention_mask: a row has padding between its tokens, which attnrb supports only outside torch.compile; pass a "
    "mask [B, 1, M, N] instead"
)


def _query_tokens(mask: torch.Tensor | None, first: int | torch.Tensor, queries: int) -> torch.Tensor | None:
    """Which queries the padding mask says are tokens: bool ``[B, M]``, or None for all."""
    if mask is None or torch.compiler.is_compiling() or isinstance(first, torch.Tensor):
        return None
    tokens = mask[:, first : first + queries]
    return torch.nn.functional.pad(tokens, (0, queries - tokens.shape[1]))
