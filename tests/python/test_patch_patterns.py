"""Which patterns of transformers' mask functions are recognised, with transformers' own masks as the truth."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import decisions
from attnrb.hosts.stats import PatchStats
from attnrb.hosts.transformers.attention import GEOMETRY
from attnrb.hosts.transformers.geometry import Column, from_numbers
from attnrb.hosts.transformers.masks import attention_mask, read_mask
from attnrb.hosts.transformers.patterns import Pattern, recognise
from attnrb.ops.visibility import Visibility
from test_patch_models import CONFIG, assert_close, oracle, run
from tiny_models import tiny, tokens
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

BEFORE_5_4 = "cache_position" in masking_utils.sdpa_mask.__code__.co_varnames


def visible(visibility: Visibility, batch: int, queries: int, keys: int) -> Tensor:
    """The mask ``[batch, 1, queries, keys]`` that a visibility means, by its words and one entry at a time."""
    seen = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for row in range(batch):
        start = 0 if visibility.key_start is None else int(visibility.key_start[row])
        end = 10**9 if visibility.key_end is None else int(visibility.key_end[row])
        for query in range(queries):
            for key in range(keys):
                at, to = visibility.query_offset + query, visibility.key_offset + key
                seen[row, 0, query, key] = (
                    start <= to < end
                    and (to <= at or not visibility.causal)
                    and (visibility.window is None or to > at - visibility.window)
                    and (
                        visibility.chunk is None or (to - start) // visibility.chunk == (at - start) // visibility.chunk
                    )
                    and (visibility.mask is None or bool(visibility.mask[row, 0, query, key]))
                )
    return seen


def position(first: int, queries: int) -> dict[str, Any]:
    """How this version of transformers says where the queries are."""
    if BEFORE_5_4:
        return {"cache_position": torch.arange(first, first + queries)}
    return {"q_length": queries, "q_offset": first}


def transformers_own(function: Callable[..., Any], batch: int, mask: Tensor | None, **sizes: Any) -> Tensor:
    skip = {"allow_is_causal_skip": False}
    own = masking_utils.sdpa_mask(batch_size=batch, mask_function=function, attention_mask=mask, **sizes, **skip)
    assert own is not None
    return own


def padding(rows: int, slots: int, draw: random.Random) -> Tensor | None:
    """No padding mask, or one with padding on one side or both, at times of the whole row."""
    if draw.random() < 0.3:
        return None
    mask = torch.zeros(rows, slots, dtype=torch.bool)
    for row in mask:
        left, right = sorted(draw.choices(range(slots + 1), k=2))
        row[left:right] = True
    return mask


def left_padding(mask: Tensor | None, rows: int) -> Tensor:
    """As transformers counts it for chunks."""
    if mask is None:
        return torch.zeros(rows, dtype=torch.int64)
    return (mask.cumsum(dim=-1) == torch.zeros_like(mask)).sum(dim=-1)


known = pytest.mark.parametrize(
    "make",
    [
        lambda size, left: causal_mask_function,
        lambda size, left: sliding_window_causal_mask_function(size),
        lambda size, left: chunked_causal_mask_function(size, left),
        lambda size, left: and_masks(causal_mask_function, chunked_overlay(size, left)),
        lambda size, left: and_masks(sliding_window_overlay(size + 3), sliding_window_causal_mask_function(size)),
        lambda size, left: and_masks(sliding_window_overlay(size), chunked_causal_mask_function(size + 2, left)),
        lambda size, left: sliding_window_overlay(size),
        lambda size, left: chunked_overlay(size, left),
        lambda size, left: or_masks(causal_mask_function),
        lambda size, left: sliding_window_causal_mask_function(0),
        lambda size, left: add_offsets_to_mask_function(sliding_window_causal_mask_function(size), 4, 4),
    ],
    ids=[
        *("causal", "window", "chunks", "causal and chunks", "two windows", "window and chunks", "window to all sides"),
        *("chunks to all sides", "union of one", "nothing", "both shifted"),
    ],
)


@known
def test_a_known_pattern_is_transformers_own_mask_in_numbers(make: Any) -> None:
    draw = random.Random(0)
    for _ in range(25):
        rows, queries, first = draw.randint(1, 3), draw.randint(1, 7), draw.randint(0, 6)
        offset = draw.randint(0, first)
        keys = first + queries - offset + draw.choice([0, 0, 3])  # a static cache has room for keys to come
        mask = padding(rows, offset + keys, draw)
        function = make(draw.randint(1, 6), left_padding(mask, rows))
        sizes = {"kv_length": keys, "kv_offset": offset, **position(first, queries)}
        got = attention_mask(batch_size=rows, mask_function=function, attention_mask=mask, **sizes)
        truth = transformers_own(function, rows, mask, **sizes)
        geometry = getattr(got, GEOMETRY)
        assert got.shape == (rows, 1, 1, len(Column))
        assert geometry.visibility.mask is None
        assert geometry.keys == keys
        again = read_mask(got.clone(), None, queries, keys)  # which bears no geometry
        for each in (geometry.visibility, again.visibility):
            assert torch.equal(visible(each, rows, queries, keys), truth)


@pytest.mark.skipif(BEFORE_5_4, reason="transformers has none before 5.4")
def test_attention_to_later_tokens_is_known() -> None:
    sizes = {"kv_length": 5, **position(0, 5)}
    function = masking_utils.bidirectional_mask_function
    mask = torch.tensor([[True] * 5, [False, True, True, True, False]])
    got = attention_mask(batch_size=2, mask_function=function, attention_mask=mask, **sizes)
    for geometry in (getattr(got, GEOMETRY), read_mask(got.clone(), None, 5, 5)):
        assert geometry.visibility.causal is False
        assert torch.equal(visible(geometry.visibility, 2, 5, 5), transformers_own(function, 2, mask, **sizes))


class Odd:
    """A mask function that is no function."""

    def __call__(self, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key % 2 == 1


def shadow(size: int) -> Any:
    """Looks like transformers' function of a window, and is another."""

    def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
        return kv_idx >= q_idx - size

    inner_mask.__module__ = masking_utils.__name__
    inner_mask.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
    return inner_mask


unknown = pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: lambda batch, head, query, key: key <= query, "attnrb does not know the mask function"),
        (lambda: Odd(), "attnrb does not know the mask function Odd"),
        (lambda: partial(causal_mask_function), "attnrb does not know the mask function partial"),
        (lambda: shadow(3), "attnrb does not know the mask function"),
        (lambda: and_masks(causal_mask_function, Odd()), "attnrb does not know the mask function Odd"),
        (lambda: or_masks(causal_mask_function, sliding_window_overlay(2)), "it joins several patterns"),
        (lambda: add_offsets_to_mask_function(causal_mask_function, 1, 0), "slots are counted from elsewhere"),
        (lambda: chunked_causal_mask_function(3, torch.tensor([1, 0])), "not counted from the first token"),
        (
            lambda: and_masks(
                chunked_overlay(3, torch.zeros(2, dtype=torch.int64)), chunked_overlay(2, torch.zeros(2))
            ),
            "chunks of two kinds",
        ),
        (lambda: packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]] * 2)), "several texts share a row"),
    ],
)


@unknown
def test_any_other_pattern_gets_the_general_mask_and_says_why(make: Any, why: str) -> None:
    function, sizes = make(), {"kv_length": 5, **position(0, 5)}
    with pytest.warns(UserWarning, match=why):
        got = attention_mask(batch_size=2, mask_function=function, **sizes)
    assert got.dtype == torch.bool
    assert torch.equal(got, transformers_own(function, 2, None, **sizes))
    assert getattr(got, GEOMETRY).visibility.mask is got


def test_padding_inside_a_pattern() -> None:
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])
    function, sizes = and_masks(causal_mask_function, padding_mask_function(mask)), {"kv_length": 5, **position(0, 5)}
    got = attention_mask(batch_size=2, mask_function=function, **sizes)
    truth = transformers_own(function, 2, None, **sizes)
    assert torch.equal(visible(getattr(got, GEOMETRY).visibility, 2, 5, 5), truth)
    with pytest.warns(UserWarning, match="padding is said in two ways"):
        attention_mask(batch_size=2, mask_function=function, attention_mask=mask, **sizes)


@pytest.mark.skipif(not hasattr(masking_utils, "blockwise_overlay"), reason="this version of transformers has none")
@pytest.mark.parametrize("images", [False, True])
def test_blocks_that_see_themselves(images: bool) -> None:
    """Overlays for images cost nothing in a text without images."""
    blocks = torch.full((2, 5), -1)
    blocks[0, 1:3] = 0 if images else -1
    function = or_masks(causal_mask_function, masking_utils.blockwise_overlay(blocks))
    pattern = recognise(and_masks(function, sliding_window_overlay(4)), {}, packed=False)
    expected = "tokens of an image or another block see each other" if images else Pattern(causal=True, window=4)
    assert pattern == expected


def test_one_text_in_a_row_is_no_packing() -> None:
    function = and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(2, 5, dtype=torch.int64)))
    assert recognise(function, {}, packed=True) == Pattern(causal=True)


# ------------------------------------------------------------------------------------------------------------ models


def watched(model: Any, ids: Tensor, **inputs: Any) -> tuple[list[Visibility], PatchStats, Tensor]:
    """What each layer's queries may see, the counts, and the logits."""
    seen: list[Visibility] = []
    with (
        torch.no_grad(),
        attnrb.patch(model, CONFIG, observer=lambda call: seen.append(call.scores["visibility"])) as p,
    ):
        logits = model(ids, **inputs).logits
    return seen, p.stats, logits


@pytest.mark.parametrize("left", [0, 5, 11])
def test_chunks_are_one_number(left: int) -> None:
    """Attention in chunks builds no matrix of all queries and keys, with padding on the left too."""
    model, ids = tiny("llama4_text"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        seen, stats, logits = watched(model, ids, attention_mask=mask)
    kinds = model.config.layer_types
    assert "chunked_attention" in kinds
    assert [visibility.chunk for visibility in seen] == [8 if kind == "chunked_attention" else None for kind in kinds]
    assert all(visibility.mask is None for visibility in seen)
    assert stats.general_masks == 0
    with torch.no_grad(), oracle("llama4_text").attached(model):
        truth = model(ids, attention_mask=mask).logits
    assert_close(logits[mask.bool()], truth[mask.bool()])


def test_a_general_mask_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny("gemma3_text"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 3:5] = 0
    message = "a mask of all queries and keys, whose memory grows with both, because a row has padding between"
    caplog.set_level(logging.INFO, "attnrb")
    decisions.forget()
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        model(ids)
        assert patched.stats.general_masks == 0
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model(ids, attention_mask=mask)
            model(ids, attention_mask=mask)
    assert [message in str(each.message) for each in said] == [True]
    told = [each.getMessage() for each in caplog.records if "general_mask" in each.getMessage()]
    assert len(told) == 1
    assert "because a row has padding between its tokens" in told[0]
    assert patched.stats.general_masks == 4, "two forwards with windowed and full layers"
    assert patched.stats.to_dict()["general_masks"] == 4


def test_a_users_own_mask_is_none_of_attnrbs() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())
    assert patched.stats.general_masks == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integers_in_four_dimensions_are_no_mask(name: str, dtype: torch.dtype) -> None:
    """As transformers' own attention has it; columns as many as attnrb's own, as one decoding step would have."""
    model, ids = tiny(name), tokens(2, 9)
    for shape in ((2, 1, 9, 9), (2, 1, 1, len(Column))):
        with pytest.raises(TypeError, match=r"attention_mask: expected a mask .* that is boolean .*, got a tensor"):
            run(model, ids, attention_mask=torch.ones(shape, dtype=dtype))


def test_three_dimensions_are_no_mask() -> None:
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, slots\].*got a tensor .*\(2, 9, 9\)"):
        run(tiny("llama"), tokens(2, 9), attention_mask=torch.ones(2, 9, 9))


def test_numbers_with_another_mark_are_refused() -> None:
    mask = attention_mask(batch_size=2, kv_length=4, **position(0, 4)).clone()
    assert from_numbers(mask, 4).visibility.causal
    mask[1, 0, 0, Column.MARK] -= 1  # an older order of columns
    with pytest.raises(TypeError, match="attention_mask: expected a mask"):
        from_numbers(mask, 4)
