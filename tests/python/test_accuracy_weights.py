"""The two ops on weights that stand in memory, `outlier_mask` and `rebalance`, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attnrb import functional, reference
from cases import DTYPES, LAYOUTS
from conftest import CloseCalls
from tolerance import assert_as_accurate
from torch import Tensor

pytestmark = pytest.mark.emulated

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 70), (2, 1, 65, 64), (1, 4, 7, 3), (0, 2, 3, 4), (1, 2, 0, 5), (1, 2, 5, 0)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def softmax_weights(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    weights = torch.softmax(2.0 * torch.randn(*shape, generator=generator), -1).to(dtype)
    return LAYOUTS[layout](weights)


@dtypes
@shapes
@layouts
@pytest.mark.parametrize("query_offset", [None, 0, -3, 20])
@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_outlier_mask(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    query_offset: int | None,
    threshold: float,
    close_calls: CloseCalls,
) -> None:
    weights = softmax_weights(shape, dtype, layout)
    mask = functional.outlier_mask(weights, threshold, query_offset=query_offset)
    expected = reference.outlier_mask(weights, threshold, query_offset=query_offset)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    # The weights are given, not computed: no rounding excuses a difference.
    np.testing.assert_array_equal(mask.numpy(), expected)
    close_calls.add(mask.numel(), 0, 0)


@dtypes
def test_outlier_mask_is_strict(dtype: torch.dtype) -> None:
    """At exactly the threshold an entry is no outlier, one number of the dtype above it is."""
    at = torch.full((1, 1, 1, 4), 0.25, dtype=dtype)
    above = torch.nextafter(at[..., 0], torch.ones((), dtype=dtype))
    at[..., 1] = above
    assert functional.outlier_mask(at, 0.25).tolist() == [[[[False, True, False, False]]]]


@dtypes
@shapes
@layouts
@pytest.mark.parametrize("normalize", [False, True], ids=["published", "normalised"])
@pytest.mark.parametrize("per_head", [False, True], ids=["one gain", "gain per head"])
def test_rebalance(dtype: torch.dtype, shape: tuple[int, ...], layout: str, normalize: bool, per_head: bool) -> None:
    weights = softmax_weights(shape, dtype, layout)
    mask = reference.outlier_mask(weights, 0.05)
    gain = torch.linspace(-0.5, 1.0, shape[1]) if per_head else 0.2
    result = functional.rebalance(weights, torch.from_numpy(mask), gain, normalize=normalize)
    expected = reference.rebalance(weights, mask, gain, normalize=normalize)
    assert result.dtype == dtype
    assert result.is_contiguous()
    gains = gain.view(1, -1, 1, 1) if isinstance(gain, Tensor) else gain
    eager = torch.where(torch.from_numpy(mask), weights * (1.0 + gains), weights)
    eager = (eager / eager.sum(-1, keepdim=True) if normalize else eager).to(dtype)
    assert_as_accurate(result, [eager], expected, np.abs(expected))


@pytest.mark.parametrize("axes", [(1, 1, 1, 9), (2, 1, 7, 9), (1, 3, 1, 1), (7, 9), (9,)], ids=str)
def test_rebalance_broadcasts_its_mask(axes: tuple[int, ...]) -> None:
    weights = softmax_weights((2, 3, 7, 9), torch.float32)
    mask = torch.rand(axes) < 0.5
    result = functional.rebalance(weights, mask, 0.5)
    torch.testing.assert_close(
        result, torch.where(mask, weights * 1.5, weights), rtol=2 * torch.finfo(torch.float32).eps, atol=0.0
    )


def test_a_row_that_sums_to_zero_stays() -> None:
    weights = torch.zeros(1, 1, 2, 3)
    weights[0, 0, 1] = torch.tensor([0.5, 0.25, 0.25])
    result = functional.rebalance(weights, torch.ones_like(weights, dtype=torch.bool), 0.2, normalize=True)
    torch.testing.assert_close(result, weights)
