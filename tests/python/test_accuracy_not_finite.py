"""NaN and infinity in query, key or value: they reach the rows that see them, and no other row by one bit.

But where a kernel of PyTorch's computes the dense part, which is 16-bit prefill on a CUDA device, a row that such a
kernel spoiled is computed again by another, which rounds otherwise: there, the promise is that what a row does not see
has no influence beyond rounding.
"""

from __future__ import annotations

import math

import library_kernels
import numpy as np
import pytest
import torch
from attnrb import Outliers, Visibility, functional, reference
from cases import DTYPES, Case, Inputs
from conftest import CloseCalls
from test_accuracy_attention import Truth, check_outliers
from tolerance import assert_as_accurate, row_magnitude
from torch import Tensor

pytestmark = pytest.mark.emulated

GAIN = 0.3

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
poisons = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
# A prefill and the few-row kernel; the poisoned key in the middle of a tile, so that its neighbours share the tile.
sizes = pytest.mark.parametrize(
    ("queries", "keys", "bad"), [(70, 70, 37), (64, 300, 250), (9, 40, 35), (1, 100, 37)], ids=str
)


def run(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility | None) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, outlier indices and counts at the source; output below it."""
    output, lse, outliers = functional.source_attention(query, key, value, visibility=visibility)
    rebalanced = functional.rebalanced_attention(query, key, value, outliers, GAIN, visibility=visibility)
    return output, lse, *outliers, rebalanced


def operands(dtype: torch.dtype, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries * keys)
    shapes = ((1, 4, queries, 32), (1, 2, keys, 32), (1, 2, keys, 32))
    query, key, value = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def assert_equal_but_for_rounding(
    inputs: tuple[Tensor, Tensor, Tensor], results: tuple[Tensor, ...], close_calls: CloseCalls
) -> None:
    """Holds results to the truth of these inputs, with the tolerance of every other accuracy test."""
    output, lse, indices, counts, below = results
    query, key, value = inputs
    truth = Truth(Inputs(query, key, value, None, None, Case("a hidden value", threshold=0.01)))
    errors, outliers = truth.torch_errors, Outliers(indices, counts)
    assert_as_accurate(output, [], truth.output, truth.magnitude, also=errors["output"])
    assert_as_accurate(lse, [], truth.lse, np.maximum(1.0, np.abs(truth.lse)), also=errors["lse"])
    check_outliers(truth, outliers, close_calls)
    held = reference.held_mask(*outliers, truth.seen, truth.key_offset)
    weights, _ = reference.rebalanced_weights(truth.weights, truth.lse, held, GAIN)
    eager = truth.eager.boosted(value, torch.from_numpy(held), torch.full((query.shape[1],), GAIN), False)
    expected = reference.weighted_values(weights, value, truth.seen)
    assert_as_accurate(below, eager, expected, row_magnitude(weights, value), also=errors["output"])


@dtypes
@poisons
@sizes
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("kind", ["causal", "mask", "range"])
def test_poisoned_key_or_value(
    dtype: torch.dtype,
    poison: float,
    queries: int,
    keys: int,
    bad: int,
    which: str,
    kind: str,
    close_calls: CloseCalls,
) -> None:
    query, key, value = operands(dtype, queries, keys)
    seen = torch.arange(keys) <= keys - queries + torch.arange(queries)[:, None]
    visibility = None
    if kind == "mask":
        seen = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
        visibility = Visibility(mask=seen)
    elif kind == "range":
        seen = (torch.arange(keys) > bad).expand(queries, keys)
        visibility = Visibility(causal=False, key_start=torch.tensor([bad + 1]))
    clean = run(query, key, value, visibility)
    unspoiled = (query, key.clone(), value.clone())
    (key if which == "key" else value)[0, 0, bad, 5] = poison  # the first key head: query heads 0 and 1
    poisoned = run(query, key, value, visibility)

    reached = torch.zeros(4, queries, dtype=torch.bool)
    reached[:2] = seen[:, bad]
    if library_kernels.computes(dtype, queries, keys, plainly_causal=kind == "causal"):
        # Rows that were reached are left out: they become those of the clean run.
        untouched = tuple(
            torch.where(reached[None, :, :, None] if after.dim() == 4 else reached[None], before, after)
            for before, after in zip(clean, poisoned, strict=True)
        )
        assert_equal_but_for_rounding(unspoiled, untouched, close_calls)
    else:
        for before, after in zip(clean, poisoned, strict=True):
            assert torch.equal(before[0][~reached], after[0][~reached])
    if math.isnan(poison) or which == "value":
        # Not swallowed either: a NaN key spoils the whole row, a value its column.
        for output in (poisoned[0], poisoned[-1]):
            assert not output[0][reached][..., 5].isfinite().any()


@dtypes
@poisons
@sizes
def test_poisoned_query(dtype: torch.dtype, poison: float, queries: int, keys: int, bad: int) -> None:
    query, key, value = operands(dtype, queries, keys)
    clean = run(query, key, value, None)
    row = queries // 2
    query[0, 1, row, 3] = poison
    poisoned = run(query, key, value, None)
    others = torch.ones(4, queries, dtype=torch.bool)
    others[1, row] = False
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(before[0][others], after[0][others])
    if math.isnan(poison):
        assert poisoned[0][0, 1, row].isnan().all()
        assert poisoned[-1][0, 1, row].isnan().all()
        assert poisoned[3][0, 1, row] == 0, "a NaN is above no threshold"
