"""What edits mean: worked out by hand, and as identities that hold whatever computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attnrb import Edit, Outliers, Visibility, functional, reference
from attnrb.ops.attention import attention_weights
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*DTYPES, torch.float64)
LN2 = math.log(2)


def by_hand(edit: Edit | None, **options: Any) -> list[float]:
    """The weights of one query that sees three keys with weights 1/8, 2/8 and 5/8: the values are unit vectors."""
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.log(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)).view(1, 1, 3, 1)
    value = torch.eye(3, dtype=torch.float64).view(1, 1, 3, 3)
    output, _, _ = functional.attention(query, key, value, edit=edit, scale=1.0, **options)
    truth, _, _ = reference.attention(query, key, value, edit=edit, scale=1.0, **options)
    np.testing.assert_allclose(output.numpy(), truth, rtol=1e-14)
    weights = attention_weights(query, key, edit=edit, scale=1.0, **options)
    np.testing.assert_allclose(weights.numpy()[0, 0, 0], truth[0, 0, 0], rtol=1e-14)
    native = functional.attention(query.float(), key.float(), value.float(), edit=edit, scale=1.0, **options)
    np.testing.assert_allclose(native.output.numpy(), truth, rtol=1e-6)
    return [float(each) for each in truth.ravel()]


def listed(*slots: int) -> Outliers:
    return Outliers(
        torch.tensor(slots, dtype=torch.int32).view(1, 1, 1, -1), torch.full((1, 1, 1), len(slots), dtype=torch.int32)
    )


def bias(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, -1)


# Weights 1/8, 2/8, 5/8; the outlier is the key in the middle, or the last two.
BY_HAND: dict[str, tuple[Edit | None, list[float]]] = {
    "nothing": (None, [1 / 8, 2 / 8, 5 / 8]),
    "none": (Edit(listed(1), 0.5), [1 / 8, 3 / 8, 5 / 8]),
    "none, weakened": (Edit(listed(1), -1.0), [1 / 8, 0, 5 / 8]),
    # The row sums to 9/8.
    "row": (Edit(listed(1), 0.5, "row"), [1 / 9, 3 / 9, 5 / 9]),
    # The outlier takes 1/8 more, which the others give in proportion: 6/8 become 5/8.
    "rest": (Edit(listed(1), 0.5, "rest"), [5 / 48, 3 / 8, 25 / 48]),
    "rest, weakened": (Edit(listed(1), -1.0, "rest"), [1 / 6, 0, 5 / 6]),
    # Twice 7/8 is more than a row has: the formula stands, and the other key's weight turns negative.
    "rest, more than there is": (Edit(listed(1, 2), 1.0, "rest"), [-6 / 8, 4 / 8, 10 / 8]),
    "rest, nobody to share with": (Edit(listed(0, 1, 2), 1.0, "rest"), [1 / 8, 2 / 8, 5 / 8]),
    "row, everything": (Edit(listed(0, 1, 2), 1.0, "row"), [1 / 8, 2 / 8, 5 / 8]),
    "row, everything taken": (Edit(listed(0, 1, 2), -1.0, "row"), [0, 0, 0]),
    "everything, none": (Edit(gain=0.5), [3 / 16, 6 / 16, 15 / 16]),
    "everything, row": (Edit(gain=0.5, rule="row"), [1 / 8, 2 / 8, 5 / 8]),
    "everything, rest": (Edit(gain=0.5, rule="rest"), [1 / 8, 2 / 8, 5 / 8]),
    "everything, row, taken": (Edit(gain=-1.0, rule="row"), [0, 0, 0]),
    # The middle key's exponential is doubled: 1, 4, 5.
    "bias": (Edit(key_bias=bias(0, LN2)), [1 / 10, 4 / 10, 5 / 10]),
    "bias beyond the keys": (Edit(key_bias=bias(0, LN2, 0, 7, math.nan)), [1 / 10, 4 / 10, 5 / 10]),
    "bias removes": (Edit(key_bias=bias(0, 0, -math.inf)), [1 / 3, 2 / 3, 0]),
    "bias removes all": (Edit(key_bias=bias(-math.inf, -math.inf, -math.inf)), [0, 0, 0]),
    "bias for later queries": (Edit(key_bias=bias(0, LN2), first_query=3), [1 / 8, 2 / 8, 5 / 8]),
    "bias from this query on": (Edit(key_bias=bias(0, LN2), first_query=2), [1 / 10, 4 / 10, 5 / 10]),
    "bias, then none": (Edit(listed(1), 0.5, key_bias=bias(0, LN2)), [1 / 10, 6 / 10, 5 / 10]),
    "a removed outlier": (Edit(listed(1, 2), 0.5, key_bias=bias(0, 0, -math.inf)), [1 / 3, 1, 0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    edit, expected = BY_HAND[name]
    assert by_hand(edit) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        # A sink with an exponential of 8: it has half of the row, and is one of those that share.
        (None, [1 / 16, 2 / 16, 5 / 16]),
        (Edit(listed(1), 1.0), [1 / 16, 4 / 16, 5 / 16]),
        (Edit(listed(1), 1.0, "row"), [1 / 18, 4 / 18, 5 / 18]),
        (Edit(listed(1), 1.0, "rest"), [3 / 56, 4 / 16, 15 / 56]),
        (Edit(listed(0, 1, 2), 0.5, "rest"), [3 / 32, 6 / 32, 15 / 32]),
        (Edit(gain=0.5, rule="rest"), [3 / 32, 6 / 32, 15 / 32]),
        (Edit(gain=1.0, rule="row"), [2 / 24, 4 / 24, 10 / 24]),
        (Edit(key_bias=bias(0, LN2)), [1 / 18, 4 / 18, 5 / 18]),
    ],
)
def test_by_hand_with_a_sink(edit: Edit | None, expected: list[float]) -> None:
    assert by_hand(edit, sinks=torch.tensor([math.log(8.0)], dtype=torch.float64)) == pytest.approx(expected, rel=1e-12)


def test_log_sum_exp_by_hand() -> None:
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.log(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)).view(1, 1, 3, 1)

    def lse(edit: Edit | None) -> float:
        return float(functional.attention(query, key, key, edit=edit, scale=1.0).lse)

    assert lse(None) == pytest.approx(math.log(8))
    assert lse(Edit(key_bias=bias(0, LN2))) == pytest.approx(math.log(10))
    assert lse(Edit(listed(1), 0.5)) == pytest.approx(math.log(8)), "none leaves the log-sum-exp of the softmax"
    assert lse(Edit(listed(1), 0.5, "rest")) == pytest.approx(math.log(8)), "and so does rest"
    assert lse(Edit(listed(1), 0.5, "row")) == pytest.approx(math.log(9)), "row counts what the outlier gained"
    assert lse(Edit(gain=0.5, rule="row")) == pytest.approx(math.log(12))
    assert lse(Edit(listed(0, 1, 2), -1.0, "row")) == -math.inf


# ----------------------------------------------------------------------------------------------------- identities

SHAPES = {"prefill": (2, 4, 2, 70, 90), "decode": (2, 4, 2, 1, 300), "a few rows": (1, 6, 2, 5, 130)}


def operands(shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys = SHAPES[shape]
    query = 2 * torch.randn(batch, heads, queries, 40)
    key, value = torch.randn(batch, key_heads, keys, 40), torch.randn(batch, key_heads, keys, 24)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def span(shape: str, low: int, high: int) -> Outliers:
    """The same slots for every query of every head."""
    batch, heads = SHAPES[shape][:2]
    slots = torch.arange(low, high, dtype=torch.int32).expand(batch, heads, 1, -1).contiguous()
    return Outliers(slots, torch.full((batch, heads, 1), high - low, dtype=torch.int32))


def close(dtype: torch.dtype) -> dict[str, float]:
    """Two ways to compute the same: a rounding of the output in each, of numbers of size 1."""
    exact = {torch.float32: 5e-6, torch.float64: 1e-12}
    return {"rtol": 0.0, "atol": exact.get(dtype, 4 * torch.finfo(dtype).eps)}


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_is_a_bias_of_the_logarithm(shape: str, dtype: torch.dtype) -> None:
    """Gains as log-gains: the log-sum-exp and the outliers, which follow the scores, show the difference."""
    tensors = operands(shape, dtype)
    keys = SHAPES[shape][4]
    gained = functional.attention(*tensors, edit=Edit(span(shape, 5, 17), 3.0, "row"), emit=0.05)
    log_gain = torch.zeros(1, 1, keys, dtype=torch.float64)
    log_gain[..., 5:17] = math.log(4.0)
    biased = functional.attention(*tensors, edit=Edit(key_bias=log_gain), emit=0.05)
    torch.testing.assert_close(gained.output, biased.output, **close(dtype))
    # It counts what the output gained, and some instruction sets weigh bfloat16 values by bfloat16 weights: a rounding
    # of the gained mass moves the logarithm by half a unit in the last place at most.
    allowed = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gained.lse, biased.lse, rtol=0, atol=allowed)
    plain = functional.attention(*tensors, emit=0.05)
    assert torch.equal(gained.outliers.indices, plain.outliers.indices), (
        "outliers are found by weights without the gain"
    )
    assert not torch.equal(biased.outliers.indices, plain.outliers.indices), "and with the bias"


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_removing_keys_is_masking_them(shape: str, dtype: torch.dtype) -> None:
    query, key, value = operands(shape, dtype)
    _, _, _, queries, keys = SHAPES[shape]
    removed = torch.rand(keys) < 0.3
    minus = torch.where(removed, -torch.inf, 0.0).view(1, 1, -1)
    first = keys - (queries + 1) // 2
    own = torch.arange(keys - queries, keys)[:, None]
    mask = (torch.arange(keys) <= own) & ~(removed & (own >= first))
    key, value = key.clone(), value.clone()
    key[..., removed & (torch.arange(keys) > first), :] = torch.nan  # whoever might see these has them removed
    value[..., removed & (torch.arange(keys) > first), :] = torch.nan
    came = functional.attention(query, key, value, edit=Edit(key_bias=minus, first_query=first), emit=0.02)
    masked = functional.attention(query, key, value, visibility=mask, emit=0.02)
    torch.testing.assert_close(came.output, masked.output, **close(dtype))
    torch.testing.assert_close(came.lse, masked.lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("rule", ["none", "row", "rest"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_list_for_all_rows_is_that_list_for_each(shape: str, rule: str, dtype: torch.dtype) -> None:
    tensors = operands(shape, dtype)
    batch, heads, _, queries, _ = SHAPES[shape]
    shared = span(shape, 20, 40)
    each = Outliers(
        shared.indices.expand(batch, heads, queries, -1).contiguous(),
        shared.counts.expand(-1, -1, queries).contiguous(),
    )
    came, expected = (functional.attention(*tensors, edit=Edit(lists, [0.5] * heads, rule)) for lists in (shared, each))
    assert torch.equal(came.output, expected.output)
    assert torch.equal(came.lse, expected.lse)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_offsets_and_first_queries_of_each_sequence(shape: str, dtype: torch.dtype) -> None:
    """A batch computes what its sequences compute alone, bit by bit."""
    query, key, value = operands(shape, dtype)
    batch, _, _, queries, keys = SHAPES[shape]
    offsets = torch.tensor([keys - queries, (keys - queries) // 2])[:batch]
    firsts = torch.tensor([keys - 3, 7])[:batch]
    edit = {"key_bias": torch.randn(batch, 1, keys - 11)}
    together = functional.attention(
        query,
        key,
        value,
        edit=Edit(**edit, first_query=firsts),
        emit=0.02,
        visibility=Visibility(query_offset=offsets, chunk=64),
    )
    for b in range(batch):
        alone = functional.attention(
            query[b : b + 1],
            key[b : b + 1],
            value[b : b + 1],
            edit=Edit(key_bias=edit["key_bias"][b : b + 1], first_query=int(firsts[b])),
            emit=0.02,
            visibility=Visibility(query_offset=int(offsets[b]), chunk=64),
        )
        assert torch.equal(together.output[b], alone.output[0])
        assert torch.equal(together.lse[b], alone.lse[0])
        assert torch.equal(together.outliers.indices[b], alone.outliers.indices[0])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_chunks_are_a_mask_of_blocks(dtype: torch.dtype) -> None:
    query, key, value = operands("prefill", dtype)
    start = torch.tensor([0, 13])
    own = torch.arange(20, 90)[:, None]
    slots = torch.arange(90)
    same = torch.stack([(slots - int(first)) // 16 == (own - int(first)) // 16 for first in start])[:, None]
    mask = same & (slots <= own) & (slots >= start[:, None, None, None])
    came = functional.attention(query, key, value, visibility=Visibility(chunk=16, key_start=start), emit=0.02)
    masked = functional.attention(query, key, value, visibility=mask, emit=0.02)
    torch.testing.assert_close(came.output, masked.output, **close(dtype))
    assert torch.equal(came.outliers.indices, masked.outliers.indices)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_the_wrappers_are_the_op(dtype: torch.dtype) -> None:
    tensors = operands("prefill", dtype)
    output, lse, outliers = functional.source_attention(*tensors, threshold=0.02)
    same = functional.attention(*tensors, emit=0.02)
    for came, expected in zip((output, lse, *outliers), (same.output, same.lse, *same.outliers), strict=True):
        assert torch.equal(came, expected)
    for normalize, rule in ((False, "none"), (True, "row")):
        below = functional.rebalanced_attention(*tensors, outliers, 0.3, normalize=normalize)
        assert torch.equal(below, functional.attention(*tensors, edit=Edit(outliers, 0.3, rule)).output)
    assert functional.attention(*tensors).outliers is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_older_ops_have_the_same_bits(dtype: torch.dtype) -> None:
    tensors = operands("prefill", dtype)
    rest = (True, 20, 0, 0, None, None, None, 40**-0.5, 0.0, None)
    older = torch.ops.attnrb.source_attention(*tensors, 0.02, *rest)
    output, lse, outliers = functional.attention(*tensors, emit=0.02)
    for came, expected in zip((output, lse, *outliers), older, strict=True):
        assert torch.equal(came, expected)
    below = torch.ops.attnrb.rebalanced_attention(*tensors, *outliers, torch.tensor([0.3]), True, *rest)
    assert torch.equal(functional.attention(*tensors, edit=Edit(outliers, 0.3, "row")).output, below)


@pytest.mark.parametrize("dtype", DTYPES)
def test_received_attention_follows_the_bias(dtype: torch.dtype) -> None:
    query, key, _ = operands("prefill", dtype)
    bias = torch.randn(2, 1, 60)
    bias[0, 0, 5] = -torch.inf
    for first in (None, 50, torch.tensor([30, 80])):
        came = functional.received_attention(query, key, key_bias=bias, first_query=first)
        truth = functional.received_attention(query.double(), key.double(), key_bias=bias, first_query=first)
        torch.testing.assert_close(came.double(), truth, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-3)
        weights, _ = reference.attention_weights(query, key, key_bias=bias, first_query=first)
        terms = reference.biases(bias, first, weights.shape, None)
        seen = reference.visible(*weights.shape) & (terms != -np.inf)
        np.testing.assert_allclose(truth, weights.sum(2) / np.maximum(seen.sum(2), 1), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------- nothing leaks, same bits


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(tensors: tuple[Tensor, ...], key_bias: Tensor, **options: Any) -> list[Tensor]:
    """All rules forward and backward, with a bias."""
    found: list[Tensor] = []
    for rule in ("none", "row", "rest"):
        leaves = [each.detach().requires_grad_() for each in tensors]
        gain, leaf = torch.tensor([0.5, -0.5, 2.0, 0.0], requires_grad=True), key_bias.detach().requires_grad_()
        slots = torch.arange(20, 30, dtype=torch.int32).expand(2, 4, 1, -1).contiguous()
        edit = Edit((slots, torch.full((2, 4, 1), 10, dtype=torch.int32)), gain, rule, leaf, 40)
        output, lse, outliers = functional.attention(*leaves, edit=edit, emit=0.02, **options)
        loss = (output.float() ** 2).sum() + torch.where(lse.isinf(), 0.0, lse).sum()
        found += [output, lse, *outliers, *torch.autograd.grad(loss, [*leaves, gain, leaf])]
    return found


PADDED = Visibility(key_start=torch.tensor([10, 0]), key_end=torch.tensor([90, 80]), query_offset=42)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_poison_that_nobody_sees_reaches_nothing(dtype: torch.dtype) -> None:
    """In hidden keys and values, and at slots of the bias that no visible key has."""
    query, key, value = operands("prefill", dtype)
    bias = torch.randn(2, 1, 120)
    bias[0, 0, 45] = bias[1, 0, 33] = -torch.inf
    clean = everything((query, key, value), bias, visibility=PADDED)
    key, value, bias = key.clone(), value.clone(), bias.clone()
    for each in (key, value):
        each[0, :, :10] = torch.nan
        each[1, :, 80:] = torch.inf
    bias[0, 0, :10] = bias[1, 0, 80:] = bias[:, 0, 90:] = torch.nan
    for now, before in zip(everything((query, key, value), bias, visibility=PADDED), clean, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_poison_in_a_removed_key_reaches_nothing(dtype: torch.dtype) -> None:
    query, key, value = operands("prefill", dtype)
    bias = torch.randn(2, 1, 120)
    bias[:, 0, 45] = -torch.inf  # from query 40 on, and the first stands at 42
    clean = everything((query, key, value), bias, visibility=PADDED)
    for each in (key, value):
        each[:, :, 45] = torch.nan
    for now, before in zip(everything((query, key, value), bias, visibility=PADDED), clean, strict=True):
        assert torch.isfinite(now[~before.isinf()]).all()
        # Sums around the key may be taken in another order.
        size = before[~before.isinf()].detach().abs().max()
        torch.testing.assert_close(now, before, rtol=0, atol=float(4 * torch.finfo(dtype).eps * size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_the_bias_spoils_those_who_see_it(dtype: torch.dtype) -> None:
    query, key, value = operands("prefill", dtype)
    bias = torch.zeros(2, 4, 90)
    clean = functional.attention(query, key, value, edit=Edit(key_bias=bias, first_query=50))
    bias[1, 2, 60] = torch.nan
    came = functional.attention(query, key, value, edit=Edit(key_bias=bias, first_query=50))
    spoilt = torch.zeros(2, 4, 70, dtype=torch.bool)
    spoilt[1, 2, 40:] = True  # queries at slots 60 to 89
    assert came.output[spoilt].isnan().all()
    assert torch.equal(came.output[~spoilt], clean.output[~spoilt])
    assert torch.equal(came.lse.isnan(), spoilt)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_one_thread_and_more(dtype: torch.dtype) -> None:
    tensors, bias = operands("prefill", dtype), torch.randn(1, 4, 80)
    torch.set_num_threads(1)
    expected = everything(tensors, bias)
    for count in (2, 3, 2, 5):
        torch.set_num_threads(count)
        for now, before in zip(everything(tensors, bias), expected, strict=True):
            assert torch.equal(now, before)


@pytest.mark.slow
def test_gradcheck() -> None:
    torch.manual_seed(7)
    tensors = [torch.randn(2, h, n, 3, dtype=torch.float64, requires_grad=True) for h, n in ((4, 5), (2, 6), (2, 6))]
    gain = torch.tensor([0.5, -0.5, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    lists = Outliers(
        torch.tensor([1, 4], dtype=torch.int32).expand(2, 4, 1, 2).contiguous(), torch.full((2, 4, 1), 2).int()
    )
    for rule in ("none", "row", "rest"):

        def run(
            query: Tensor, key: Tensor, value: Tensor, gain: Tensor, bias: Tensor, sinks: Tensor, rule: str = rule
        ) -> Any:
            edit = Edit(lists, gain, rule, bias, torch.tensor([0, 3]))
            return functional.attention(query, key, value, edit=edit, softcap=3.0, sinks=sinks)[:2]

        assert torch.autograd.gradcheck(run, (*tensors, gain, bias, sinks))
        assert torch.autograd.gradgradcheck(run, (*tensors, gain, bias, sinks))
