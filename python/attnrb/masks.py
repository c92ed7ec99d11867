"""The masks of Hugging Face models, without an n×n matrix wherever the pattern has a structure.

transformers asks the function registered here for the mask of each kind of attention, once in a forward, and hands what
it returns to every layer. It returns a 2-D padding mask that carries what the layers need to know (`Geometry`): slots,
window, and which slots are padding. Patterns that are none of these get the general boolean mask ``[B, 1, M, N]``.

Needs transformers, so it is imported only once a model is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from attnrb.attention import GEOMETRY
from attnrb.visibility import Visibility


class Geometry(NamedTuple):
    """What a mask says, for one kind of attention in one forward."""

    visibility: Visibility
    tokens: torch.Tensor | None
    """bool ``[B, M]``: which queries are tokens rather than padding; None: all of them."""


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
        q_length, first, device = cache_position.shape[0], int(cache_position[0]), cache_position.device
    else:
        assert q_length is not None, "transformers passes q_length, or cache_position before 5.4"
        first = int(q_offset)

    pattern = _pattern(mask_function)
    padded = attention_mask is not None and not bool(attention_mask.all())
    padding = None
    if pattern is not None:
        # Causal queries look no further than their own slot.
        last = min(kv_offset + kv_length, first + q_length) if pattern.causal else kv_offset + kv_length
        padding = _padding(attention_mask, padded, last)
    if pattern is not None and padding is not None:
        if attention_mask is None:
            mask = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, kv_offset + kv_length)
        else:
            mask = attention_mask.view(attention_mask.shape)  # a tensor of our own: the caller's bears no attribute
        visibility = Visibility(
            causal=pattern.causal,
            query_offset=first,
            key_offset=kv_offset,
            window=pattern.window,
            key_start=padding.start,
            key_end=padding.end,
        )
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
    setattr(mask, GEOMETRY, Geometry(visibility, _query_tokens(attention_mask, first, q_length) if padded else None))
    return mask


def foreign_geometry(mask: torch.Tensor | None, first_slot: int | None, queries: int, keys: int) -> Geometry:
    """Read a mask that was not made here.

    Args:
        mask: what the layer got: a mask ``[B, 1 or H, M, N or more]`` that the user passed, boolean (True: visible) or
            additive (0: visible, hugely negative: not); or None, plainly causal.
        first_slot: slot of the first query; None: not known, so the last query is on the last key.
        queries: M.
        keys: N.

    Raises:
        NotImplementedError: an additive mask holds other values, for example position biases; or a mask has not four
            dimensions.
    """
    if first_slot is None:
        first_slot = keys - queries
    # A windowed layer has dropped its oldest keys; a static cache has room for keys to come.
    key_offset = max(first_slot + queries - keys, 0)
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


# ------------------------------------------------------------------------------------------------------ the patterns


class _Pattern(NamedTuple):
    causal: bool
    window: int | None


# transformers composes masks from closures. Each kind is known by its code, its parameters are in its cells.
_BOTH = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_EVERYTHING = getattr(masking_utils, "bidirectional_mask_function", None)  # since transformers 5


def _pattern(function: Callable[..., Any]) -> _Pattern | None:
    """Recognise a pattern that `Visibility` can say in numbers; None for any other."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True, window=None)
    if function is _EVERYTHING:
        return _Pattern(causal=False, window=None)
    code = getattr(function, "__code__", None)
    if code is _WINDOW:
        window = _cell(function, "sliding_window")
        return _Pattern(causal=False, window=window) if isinstance(window, int) and window > 0 else None
    if code is _BOTH:
        parts = [_pattern(part) for part in _cell(function, "mask_functions")]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        windows = [part.window for part in known if part.window is not None]
        return _Pattern(causal=any(part.causal for part in known), window=min(windows, default=None))
    return None


def _cell(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


# ------------------------------------------------------------------------------------------------------- the padding


class _Padding(NamedTuple):
    """The slots of each row that hold tokens: ``start`` up to but not ``end``; int64 ``[B]``, None: no bound."""

    start: torch.Tensor | None = None
    end: torch.Tensor | None = None


def _padding(mask: torch.Tensor | None, padded: bool, slots: int) -> _Padding | None:
    """Read a padding mask as one range of slots in each row; None where a row has holes inside.

    Args:
        mask: bool ``[B, slots]``; slots beyond its end are padding.
        padded: whether any entry is False.
        slots: one past the last slot that a query may look at.
    """
    if mask is None:
        return _Padding()
    rows, width = mask.shape
    if not padded:
        return _Padding(end=torch.full((rows,), width, device=mask.device) if width < slots else None)
    begins = torch.cat([mask[:, :1], mask[:, 1:] & ~mask[:, :-1]], dim=1)
    if bool((begins.sum(1) > 1).any()):
        return None
    start = begins.to(torch.uint8).argmax(1)
    return _Padding(start, start + mask.sum(1))


def _query_tokens(mask: torch.Tensor | None, first: int, queries: int) -> torch.Tensor | None:
    """Which queries are tokens: bool ``[B, M]``, or None for all."""
    if mask is None:
        return None
    tokens = mask[:, first : first + queries]
    return torch.nn.functional.pad(tokens, (0, queries - tokens.shape[1]))
