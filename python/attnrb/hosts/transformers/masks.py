"""The masks of Hugging Face models, without an n×n matrix wherever the pattern has a structure.

transformers asks the function registered here for the mask of each kind of attention, once in a forward, and hands what
it returns to every layer. Patterns that `Visibility` can say become a few numbers, and any other the general boolean
mask ``[B, 1, M, N]``.

Note: [Masks in numbers]
What is handed out is a tensor int64 ``[B, 1, 1, 5]`` with a row of numbers for each text: slot of the first query, slot
of the first key, window, and the slots ``[start, end)`` that hold tokens; where there is no bound, the largest number.
One column more means that attention is not causal. The same stands as a `Geometry` in an attribute of the tensor, which
layers read at no cost. Attributes do not survive copies to another device, re-entrant checkpointing, or the edge of a
compiled graph; the numbers do. Four dimensions, because transformers takes such a mask for a finished one wherever it
meets it again.

Needs transformers, so it is imported only once a model is patched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from attnrb.hosts.session import current_forward
from attnrb.hosts.transformers.attention import GEOMETRY
from attnrb.ops.visibility import Visibility

_CAUSAL, _NOT_CAUSAL = 5, 6  # columns
_NO_BOUND = torch.iinfo(torch.int64).max


class Geometry(NamedTuple):
    """What a mask says, for one kind of attention in one forward."""

    visibility: Visibility
    tokens: torch.Tensor | None
    """bool ``[B, M]``: which queries are tokens rather than padding; None: all of them."""

    def on(self, device: torch.device) -> Geometry:
        """The same for layers on this device."""
        parts = {name: getattr(self.visibility, name) for name in ("key_start", "key_end", "mask")}
        away = {name: part for name, part in parts.items() if part is not None and part.device != device}
        if not away:
            return self
        moved = {name: part.to(device) for name, part in away.items()}
        return Geometry(dataclasses.replace(self.visibility, **moved), self.tokens)


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
        first = 0 if q_length == kv_length and kv_offset == 0 else integer(cache_position[0])
    else:
        assert q_length is not None, "transformers passes q_length, or cache_position before 5.4"
        first = integer(q_offset) if isinstance(q_offset, torch.Tensor) else q_offset
    forward = current_forward()
    if forward is not None:
        forward.first_slot = first
        if forward.unpadded:
            attention_mask = None

    pattern = _pattern(mask_function)
    padding = None
    if pattern is not None:
        # Causal queries look no further than their own slot.
        ends = (kv_offset + kv_length, first + q_length) if pattern.causal else (kv_offset + kv_length,)
        padding = _padding(attention_mask, ends)
    if pattern is not None and padding is not None:
        visibility = Visibility(
            causal=pattern.causal,
            query_offset=first,
            key_offset=kv_offset,
            window=pattern.window,
            key_start=padding.start,
            key_end=padding.end,
        )
        mask = _in_numbers(visibility, batch_size, device)
        tokens = _tokens(visibility, q_length)
    else:
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
        mask = general
        visibility = Visibility(causal=False, query_offset=first, key_offset=kv_offset, mask=mask)
        tokens = _query_tokens(attention_mask, first, q_length)
    setattr(mask, GEOMETRY, Geometry(visibility, tokens))
    return mask


def read_mask(mask: torch.Tensor | None, first_slot: int | None, queries: int, keys: int) -> Geometry:
    """Read a mask without a geometry: one of the user's, or one of ours that lost it on the way.

    Args:
        mask: what the layer got: numbers (see `Note: [Masks in numbers]`); or a mask ``[B, 1 or H, M, N or more]``,
            boolean (True: visible) or additive (0: visible, hugely negative: not); or None, plainly causal.
        first_slot: slot of the first query; None: not known, so the last query is on the last key.
        queries: M.
        keys: N.

    Raises:
        NotImplementedError: an additive mask holds other values, for example position biases; or a mask has not four
            dimensions.
    """
    if mask is not None and mask.dtype == torch.int64 and mask.dim() == 4:
        return _from_numbers(mask, queries)
    if first_slot is None:
        first_slot = keys - queries
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


# ------------------------------------------------------------------------------------------------------- the numbers


def _in_numbers(visibility: Visibility, batch: int, device: torch.device | str | None) -> torch.Tensor:
    """A visibility without a mask, by `Note: [Masks in numbers]`."""
    window = _NO_BOUND if visibility.window is None else visibility.window
    row = [visibility.query_offset, visibility.key_offset, window, 0, _NO_BOUND]
    numbers = torch.tensor([[[row if visibility.causal else [*row, 0]]]], dtype=torch.int64, device=device)
    if batch != 1:
        numbers = numbers.expand(batch, -1, -1, -1)
    if visibility.key_start is not None or visibility.key_end is not None:
        numbers = numbers.clone()
        for column, bound in ((3, visibility.key_start), (4, visibility.key_end)):
            if bound is not None:
                numbers[:, 0, 0, column] = bound
    return numbers


def _from_numbers(mask: torch.Tensor, queries: int) -> Geometry:
    """What `_in_numbers` made."""
    numbers = mask[:, 0, 0]
    # Less 1 and more 1: a graph that is made before the number is known then knows that it is not below 1.
    first, key_offset, window = (integer(numbers[0, column] - least) + least for column, least in enumerate((0, 0, 1)))
    start, end = numbers[:, 3].contiguous(), numbers[:, 4].contiguous()
    compiling = torch.compiler.is_compiling()
    bounded = compiling or bool(((start > 0) | (end < _NO_BOUND)).any())
    visibility = Visibility(
        causal=numbers.shape[1] == _CAUSAL,
        query_offset=first,
        key_offset=key_offset,
        window=window if compiling or window < _NO_BOUND else None,
        key_start=start if bounded else None,
        key_end=end if bounded else None,
    )
    return Geometry(visibility, _tokens(visibility, queries))


@torch.library.custom_op("attnrb::integer", mutates_args=())
def _integer(number: torch.Tensor) -> int:
    return int(number)


@_integer.register_fake
def _(number: torch.Tensor) -> int:
    size: Any = torch.library.get_ctx().new_dynamic_size(min=0)
    return size  # type: ignore[no-any-return]


def integer(number: torch.Tensor | int) -> int:
    """A tensor of one number, at least 0, as an integer; in a compiled graph one that is read at every call."""
    if not isinstance(number, torch.Tensor):
        return number
    if torch.compiler.is_dynamo_compiling():  # which breaks the graph at an item()
        value: int = torch.ops.attnrb.integer.default(number)
        return value
    return int(number)


# ------------------------------------------------------------------------------------------------------ the patterns


@dataclass(frozen=True)
class _Pattern:
    """What a mask function says of a query and a key; acts as the boolean tensor that such functions return."""

    causal: bool = False
    window: int | None = None
    known: bool = True

    @property
    def device(self) -> None:
        return None

    def to(self, device: None) -> _Pattern:
        return self

    def __and__(self, other: Any) -> _Pattern:
        if not isinstance(other, _Pattern):
            return _UNKNOWN
        windows = [each.window for each in (self, other) if each.window is not None]
        return _Pattern(self.causal or other.causal, min(windows, default=None), self.known and other.known)

    __rand__ = __and__

    def __floordiv__(self, other: Any) -> _Pattern:
        return _UNKNOWN


_UNKNOWN = _Pattern(known=False)


class _Slot:
    """A slot of a query or a key, plus a number: what a mask function is called with to learn what it compares.

    Note: [Recognised patterns]
    transformers composes masks from small functions of a query's and a key's slot. Called with these in place of slots,
    a function tells its pattern: ``key <= query`` is causal, ``key > query - n`` a window of n, and an intersection is
    both. Whatever else it does with them is unknown, so it gets the general mask.
    """

    def __init__(self, of_query: bool, shift: int = 0) -> None:
        self.of_query = of_query
        self.shift = shift

    def __add__(self, number: Any) -> Any:
        return _Slot(self.of_query, self.shift + number) if isinstance(number, int) else _UNKNOWN

    def __sub__(self, number: Any) -> Any:
        return _Slot(self.of_query, self.shift - number) if isinstance(number, int) else _UNKNOWN

    def __le__(self, other: Any) -> _Pattern:
        if not isinstance(other, _Slot) or self.of_query or not other.of_query or self.shift != other.shift:
            return _UNKNOWN
        return _Pattern(causal=True)

    def __gt__(self, other: Any) -> _Pattern:
        if not isinstance(other, _Slot) or self.of_query or not other.of_query:
            return _UNKNOWN
        window = self.shift - other.shift
        return _Pattern(window=window) if window > 0 else _UNKNOWN

    def __ge__(self, other: Any) -> _Pattern:
        if isinstance(other, _Slot):
            return other.__le__(self)
        return _Pattern() if isinstance(other, int) and other + 0 <= self.shift else _UNKNOWN

    def __lt__(self, other: Any) -> _Pattern:
        return other.__gt__(self) if isinstance(other, _Slot) else _UNKNOWN

    def __floordiv__(self, number: Any) -> _Pattern:
        return _UNKNOWN

    def new_ones(self, *_: Any, **__: Any) -> _Pattern:
        return _Pattern()


def _pattern(function: Callable[..., Any]) -> _Pattern | None:
    """Recognise a pattern that `Visibility` can say in numbers; None for any other."""
    if function is masking_utils.causal_mask_function:  # nearly always
        return _Pattern(causal=True)
    forward = current_forward()
    if torch.compiler.is_compiling() and (forward is None or forward.packed):
        return None  # tensors cannot be indexed by slots that are none, and a graph cannot try
    try:
        pattern = function(0, 0, _Slot(of_query=True), _Slot(of_query=False))
    except Exception:
        return None
    return pattern if isinstance(pattern, _Pattern) and pattern.known else None


# ------------------------------------------------------------------------------------------------------- the padding


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
        return _Padding(end=torch.full((rows,), width, device=mask.device) if width < min(ends) else None)
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    whole = begins.sum(1) <= 1
    if compiling:
        torch._assert_async(whole.all(), _HOLES)
    elif not bool(whole.all()):
        return None
    start = begins.to(torch.uint8).argmax(1)
    return _Padding(start, start + mask.sum(1))


_HOLES = (
    "attention_mask: a row has padding between its tokens, which attnrb supports only outside torch.compile; pass a "
    "mask [B, 1, M, N] instead"
)


def _tokens(visibility: Visibility, queries: int) -> torch.Tensor | None:
    """Which queries sit at slots that hold tokens: bool ``[B, M]``, or None for all."""
    start, end = visibility.key_start, visibility.key_end
    if start is None or end is None or torch.compiler.is_compiling():
        return None
    assert visibility.query_offset is not None
    slots = visibility.query_offset + torch.arange(queries, device=start.device)
    return (slots >= start[:, None]) & (slots < end[:, None])


def _query_tokens(mask: torch.Tensor | None, first: int, queries: int) -> torch.Tensor | None:
    """Which queries the padding mask says are tokens: bool ``[B, M]``, or None for all."""
    if mask is None or torch.compiler.is_compiling():
        return None
    tokens = mask[:, first : first + queries]
    return torch.nn.functional.pad(tokens, (0, queries - tokens.shape[1]))
