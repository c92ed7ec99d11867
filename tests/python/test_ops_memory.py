"""What the ops read and write: nothing beside their operands, nothing that a row cannot see, any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnrb import Outliers, Visibility, functional
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 2, 4, 2, 40, 24


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> dict[str, Tensor]:
    output, lse, outliers = functional.source_attention(query, key, value, **options)
    below = functional.rebalanced_attention(query, key, value, outliers, [0.1, 0.2, 0.3, 0.4], **options)
    received = functional.received_attention(query, key, **options)
    return {"output": output, "lse": lse, "below": below, "received": received, **outliers._asdict()}


def operands(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = 2 * torch.randn(BATCH, HEADS, queries, WIDTH)
    key = torch.randn(BATCH, KEY_HEADS, keys, WIDTH)
    value = torch.randn(BATCH, KEY_HEADS, keys, VALUE_WIDTH)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def assert_same_bits(came: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(came[name], tensor), name


# --------------------------------------------------------------------------------------------------------- layouts


def inside_sentinels(tensor: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The tensor as a window, `offset` elements in, on a buffer of NaN; and the buffer."""
    buffer = torch.full((tensor.numel() + offset + 64,), torch.nan, dtype=tensor.dtype)
    window = buffer[offset : offset + tensor.numel()].view(tensor.shape)
    window.copy_(tensor)
    return window, buffer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 77), (19, 33), (70, 70)])
def test_neither_alignment_nor_neighbours_matter(queries: int, keys: int, dtype: torch.dtype) -> None:
    tensors = operands(queries, keys, dtype)
    expected = attention(*tensors)
    for offset in (*range(18), 31, 32, 33):
        windows, buffers = zip(*(inside_sentinels(tensor, offset) for tensor in tensors), strict=True)
        before = [buffer.clone() for buffer in buffers]
        assert_same_bits(attention(*windows), expected)
        for now, then in zip(buffers, before, strict=True):
            assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))  # nothing written


def spread_out(tensor: Tensor, steps: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The tensor in memory ordered by `order`, every `steps`-th element along each axis, NaN in between."""
    sizes = [tensor.shape[axis] * steps[axis] for axis in order]
    memory = torch.full(sizes, torch.nan, dtype=tensor.dtype).permute([order.index(axis) for axis in range(4)])
    view = memory[tuple(slice(None, None, step) for step in steps)]
    view.copy_(tensor)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda tensor: spread_out(tensor, (1, 1, 1, 1), (0, 2, 1, 3)),
    "a slice of every row": lambda tensor: spread_out(tensor, (1, 1, 1, 2), (0, 1, 2, 3))[..., :],
    "every third row": lambda tensor: spread_out(tensor, (1, 1, 3, 1), (0, 1, 2, 3)),
    "rows innermost": lambda tensor: spread_out(tensor, (1, 1, 1, 1), (0, 1, 3, 2)),
    "all apart, batch innermost": lambda tensor: spread_out(tensor, (2, 3, 2, 3), (3, 1, 2, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (3, 300), (8, 70), (37, 150), (150, 150)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    tensors = operands(queries, keys, dtype)
    views = [LAYOUTS[layout](tensor) for tensor in tensors]
    assert not all(view.is_contiguous() for view in views)
    assert_same_bits(attention(*views), attention(*tensors))


def test_repeated_operands() -> None:
    """Strides of 0: one key and value for the whole batch, one row for all queries."""
    query, key, value = operands(5, 9, torch.float32)
    query = query[:, :, :1].expand(-1, -1, 5, -1)
    key, value = key[:1].expand(BATCH, -1, -1, -1), value[:1].expand(BATCH, -1, -1, -1)
    expected = attention(query.contiguous(), key.contiguous(), value.contiguous())
    assert_same_bits(attention(query, key, value), expected)


def test_strides_of_every_other_argument() -> None:
    query, key, value = operands(6, 11, torch.float32)
    start, end, sinks = torch.tensor([0, 2]), torch.tensor([11, 9]), torch.randn(HEADS)
    mask = torch.rand(BATCH, HEADS, 6, 11) > 0.3

    def apart(tensor: Tensor) -> Tensor:
        wide = torch.stack([tensor, torch.zeros_like(tensor)], -1)
        return wide[..., 0]

    def run(start: Tensor, end: Tensor, mask: Tensor, sinks: Tensor) -> dict[str, Tensor]:
        visibility = Visibility(causal=True, key_start=start, key_end=end, mask=mask)
        return attention(query, key, value, visibility=visibility, sinks=sinks)

    expected = run(start, end, mask, sinks)
    assert_same_bits(run(apart(start), apart(end), apart(mask), apart(sinks)), expected)
    assert_same_bits(run(start.int(), end.int(), mask.transpose(2, 3).contiguous().mT, sinks.double()), expected)

    outliers = functional.source_attention(query, key, value)[2]
    gain = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected_below = functional.rebalanced_attention(query, key, value, outliers, gain)
    loose = Outliers(apart(outliers.indices), apart(outliers.counts))
    for gains in (apart(gain), gain.tolist(), gain.double()):
        assert torch.equal(functional.rebalanced_attention(query, key, value, loose, gains), expected_below)


def test_masks_broadcast() -> None:
    query, key, value = operands(6, 11, torch.float32)
    for shape in ((11,), (6, 1), (1, 11), (HEADS, 1, 11), (BATCH, 1, 1, 11), (1, HEADS, 6, 11), (BATCH, 1, 6, 11)):
        mask = torch.rand(shape) > 0.4
        full = mask.expand(BATCH, HEADS, 6, 11).contiguous()
        assert_same_bits(
            attention(query, key, value, visibility=mask),
            attention(query, key, value, visibility=Visibility(mask=full)),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_ops_take_any_strides(dtype: torch.dtype) -> None:
    weights = torch.rand(BATCH, HEADS, 19, 45).softmax(-1).to(dtype)
    mask = functional.outlier_mask(weights, 0.02)
    assert mask.any()
    expected = functional.rebalance(weights, mask, 0.5, normalize=True)
    for layout in LAYOUTS.values():
        view = layout(weights)
        assert torch.equal(functional.outlier_mask(view, 0.02), mask)
        assert torch.equal(functional.rebalance(view, mask.mT.contiguous().mT, 0.5, normalize=True), expected)


# -------------------------------------------------------------------------------------------- what a row cannot see


POISONS = (torch.nan, torch.inf, -torch.inf)
QUERIES, KEYS = 70, 90
VISIONS: dict[str, Visibility] = {
    "causal": Visibility(),
    "window": Visibility(window=9),
    "ranges": Visibility(causal=False, key_start=torch.tensor([0, 41]), key_end=torch.tensor([60, 90])),
    "mask": Visibility(mask=torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(3)) > 0.7),
}


def seen(visibility: Visibility, queries: int = QUERIES) -> Tensor:
    """Say which keys are visible, bool [B, M, N]: the definition, key by key."""
    slots = torch.arange(KEYS)
    mine = torch.arange(KEYS - queries, KEYS)[:, None]
    found = torch.ones(BATCH, queries, KEYS, dtype=torch.bool)
    if visibility.mask is not None:
        found = found & visibility.mask
    if visibility.causal is not False and visibility.mask is None:
        found = found & (slots <= mine)
    if visibility.window is not None:
        found = found & (slots > mine - visibility.window)
    if visibility.key_start is not None:
        found = found & (slots >= visibility.key_start[:, None, None])
    if visibility.key_end is not None:
        found = found & (slots < visibility.key_end[:, None, None])
    return found


ROWS = ("output", "lse", "below", "indices", "counts")  # what has one entry for each query


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("where", ["key", "value"])
def test_poison_reaches_only_the_rows_that_see_it(where: str, vision: str, poison: float, dtype: torch.dtype) -> None:
    visibility = VISIONS[vision]
    query, key, value = operands(QUERIES, KEYS, dtype)
    clean = attention(query, key, value, visibility=visibility)
    for position in (0, 50, KEYS - 1):
        poisoned = {"query": query, "key": key, "value": value}
        poisoned[where] = poisoned[where].clone()
        poisoned[where][:, 1, position, 3] = poison  # key head 1: query heads 2 and 3
        came = attention(**poisoned, visibility=visibility)
        untouched = ~seen(visibility)[:, :, position]
        for name in ROWS:
            assert torch.equal(came[name][:, :2], clean[name][:, :2]), name
            for batch in range(BATCH):
                rows = untouched[batch]
                assert torch.equal(came[name][batch, 2:, rows], clean[name][batch, 2:, rows]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, QUERIES])
def test_nan_in_a_key_shows_in_every_row_that_sees_it(queries: int, dtype: torch.dtype) -> None:
    query, key, value = operands(queries, KEYS, dtype)
    key[:, :, 50, 3] = torch.nan
    came = attention(query, key, value)
    sees = seen(Visibility(), queries)[:, None, :, 50].expand(-1, HEADS, -1)
    assert torch.equal(came["lse"].isnan(), sees)
    assert torch.equal(came["output"].isnan().all(-1), sees)
    assert torch.equal(came["output"].isnan().any(-1), sees)
    assert torch.equal(came["below"].isnan().all(-1), sees)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_query_spoils_its_row_alone(poison: float, dtype: torch.dtype) -> None:
    query, key, value = operands(QUERIES, KEYS, dtype)
    clean = attention(query, key, value)
    query[:, 1, 30, 5] = poison
    came = attention(query, key, value)
    others = torch.ones(HEADS, QUERIES, dtype=torch.bool)
    others[1, 30] = False
    for name in ROWS:
        assert torch.equal(came[name][:, others], clean[name][:, others]), name
    assert came["output"][:, 1, 30].isnan().all()
    assert torch.equal(came["received"][:, [0, 2, 3]], clean["received"][:, [0, 2, 3]])


# ------------------------------------------------------------------------------------------------- outlier indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 45])
def test_indices_beyond_the_keys_are_skipped(queries: int, dtype: torch.dtype) -> None:
    query, key, value = operands(queries, KEYS, dtype)
    plain = functional.source_attention(query, key, value)[0]
    strays = torch.tensor([-(2**31), -(2**20), -1, KEYS, KEYS + 1, 2**20, 2**31 - 1], dtype=torch.int32)
    indices = strays.expand(BATCH, HEADS, queries, -1)
    counts = torch.full((BATCH, HEADS, queries), len(strays), dtype=torch.int32)
    for normalize in (False, True):
        below = functional.rebalanced_attention(query, key, value, (indices, counts), 0.5, normalize=normalize)
        assert torch.equal(below, plain)


@pytest.mark.parametrize("queries", [1, 45])
@pytest.mark.parametrize("count", [8, 2**31 - 1, -1, -(2**31)])
def test_counts_beyond_the_capacity_are_refused(count: int, queries: int) -> None:
    query, key, value = operands(queries, KEYS, torch.float32)
    indices = torch.arange(7, dtype=torch.int32).expand(BATCH, HEADS, queries, -1)
    counts = torch.full((BATCH, HEADS, queries), 7, dtype=torch.int32)
    functional.rebalanced_attention(query, key, value, (indices, counts), 0.5)
    counts[1, 2, queries // 2] = count
    with pytest.raises(ValueError, match=r"counts: expected numbers from 0 to C = 7"):
        functional.rebalanced_attention(query, key, value, (indices, counts), 0.5)


@pytest.mark.parametrize("queries", [1, 45])
def test_slots_that_a_layer_no_longer_holds_are_skipped(queries: int) -> None:
    """The same outliers over a cache that kept only its last keys: those it lost, and those unseen, do not count."""
    query, key, value = operands(queries, KEYS, torch.float32)
    window, kept = 20, 66
    outliers = functional.source_attention(query, key, value, threshold=0.02)[2]
    whole = Visibility(window=window)
    cut = Visibility(window=window, key_offset=KEYS - kept)
    expected = functional.rebalanced_attention(query, key, value, outliers, 0.5, visibility=whole)
    came = functional.rebalanced_attention(query, key[:, :, -kept:], value[:, :, -kept:], outliers, 0.5, visibility=cut)
    # Sums over the same keys in blocks that start elsewhere: the order of additions may differ, nothing else.
    torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-6)
    plain = functional.source_attention(query, key, value, visibility=whole)[0]
    assert not torch.allclose(expected, plain, rtol=1e-3)


def test_a_query_that_sees_nothing() -> None:
    query, key, value = operands(6, 9, torch.float32)
    visibility = Visibility(key_start=torch.tensor([6, 9]))
    for sinks in (None, torch.randn(HEADS)):
        came = attention(query, key, value, visibility=visibility, sinks=sinks)
        blind = ~seen_rows(visibility)
        assert blind.any()
        for batch in range(BATCH):
            rows = blind[batch]
            assert (came["output"][batch][:, rows] == 0).all()
            assert (came["below"][batch][:, rows] == 0).all()
            assert (came["lse"][batch][:, rows] == -torch.inf).all()
            assert (came["counts"][batch][:, rows] == 0).all()
            assert (came["indices"][batch][:, rows] == -1).all()


def seen_rows(visibility: Visibility) -> Tensor:
    """Say which of six queries over nine keys see any, bool [B, 6], for a causal visibility with key_start."""
    assert visibility.key_start is not None
    return torch.arange(3, 9) >= visibility.key_start[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_padded_throughout(dtype: torch.dtype) -> None:
    for queries, keys in ((1, 200), (45, 90)):
        indices, counts = functional.source_attention(*operands(queries, keys, dtype), threshold=0.02)[2]
        place = torch.arange(indices.shape[-1])
        held = place < counts[..., None]
        assert (indices[~held] == -1).all()
        assert (indices[held] >= 0).all()
        assert (indices[held] < keys).all()
        ascending = indices[..., 1:] > indices[..., :-1]
        assert ascending[held[..., 1:]].all()


# ------------------------------------------------------------------------------------------------- in several rounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_a_batch_that_are_not_packed_together(dtype: torch.dtype) -> None:
    """Working memory is bounded: 64 MiB of packed keys and values at a time. Equal operands, so equal results."""
    query, (key, value) = 2 * torch.randn(1, 2, 24, 256).to(dtype), torch.randn(2, 1, 1, 4000, 256).to(dtype)
    expected = functional.attention(query, key, value, emit=0.01)
    came = functional.attention(*(each.expand(20, -1, -1, -1) for each in (query, key, value)), emit=0.01)
    for tensor, one in zip((came.output, came.lse, *came.outliers), (*expected[:2], *expected.outliers), strict=True):
        assert all(torch.equal(each, one[0]) for each in tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_batch_that_are_not_added_together(dtype: torch.dtype) -> None:
    """As above, for the 128 MiB in which gradients of queries are added up."""

    def gradients(batch: int) -> list[Tensor]:
        leaves = [each.expand(batch, -1, -1, -1).detach().requires_grad_() for each in (query, key, value)]
        output = functional.attention(*leaves).output
        return list(torch.autograd.grad(output, leaves, grad_output.expand_as(output)))

    query, grad_output = torch.randn(2, 1, 4, 1024, 256).to(dtype)
    key, value = torch.randn(2, 1, 1, 20, 256).to(dtype)
    for came, one in zip(gradients(36), gradients(1), strict=True):
        assert all(torch.equal(each, one[0]) for each in came)
