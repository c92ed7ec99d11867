"""Prefill whose dense part PyTorch's own kernel computes: the accuracy tests over cases that it takes, and that it did.

On a GPU, or on the emulated device, which has PyTorch's CPU kernel in the place of the GPU's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import library_kernels
import pytest
import torch
from attnrb import Visibility, functional
from cases import Case, given
from test_accuracy_attention import Truth, test_rebalanced_attention, test_source_attention  # noqa: F401 (run here too)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not library_kernels.ON_CUDA, reason="for the CUDA ops, or their emulation"),
]

# What a kernel of PyTorch's shows a profiler: its operation, or one inside.
LIBRARY_OPS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward",
    "aten::_cudnn_attention_forward",
    "aten::_efficient_attention_forward",
)
LIBRARY_BACKWARDS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_flash_attention_backward",
)

CASES = (
    Case("dense causal", heads=4, key_heads=2, queries=100, keys=100),
    Case("dense batches", batch=2, heads=6, key_heads=2, queries=131, keys=131, width=40, threshold=0.05),
    Case("dense wide", queries=64, keys=64, width=256, layout="sequence first"),
    Case("dense narrow", heads=3, key_heads=3, queries=70, keys=70, width=8, scale=0.4),
    Case("dense all keys", heads=4, key_heads=1, queries=65, keys=150, width=128, vision=given(causal=False)),
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((case, dtype), id=f"{case.name}-{str(dtype)[6:]}")
        for case in CASES
        for dtype in (torch.bfloat16, torch.float16)
    ],
)
def truth(request: pytest.FixtureRequest) -> Truth:
    case, dtype = request.param
    return Truth(case.build(dtype))


def library_ran_in(work: Callable[[], object], *, backward: bool = False) -> bool:
    """Whether a kernel of PyTorch's had a part in it."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work()
    names = LIBRARY_BACKWARDS if backward else LIBRARY_OPS
    return any(event.key in names for event in trace.key_averages())


def library_ran(dtype: torch.dtype, queries: int = 70, keys: int = 70, width: int = 32, **options: Any) -> list[bool]:
    """Whether a kernel of PyTorch's had a part in each of the two ops."""
    query = torch.randn(1, 4, queries, width).to(dtype)
    key, value = (torch.randn(1, 2, keys, width).to(dtype) for _ in range(2))
    outliers = functional.source_attention(query, key, value, **options)[2]
    return [
        library_ran_in(lambda: functional.source_attention(query, key, value, **options)),
        library_ran_in(lambda: functional.rebalanced_attention(query, key, value, outliers, 0.2, **options)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_takes_prefill_in_16_bits(dtype: torch.dtype) -> None:
    assert library_ran(dtype) == [True, True]
    assert library_ran(dtype, keys=90, visibility=Visibility(causal=False)) == [True, True]


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"queries": 3},
        {"keys": 90},
        {"visibility": Visibility(window=9)},
        {"visibility": Visibility(key_start=torch.tensor([3]))},
        {"visibility": Visibility(mask=torch.ones(70, 70, dtype=torch.bool))},
        {"softcap": 5.0},
        {"sinks": torch.zeros(4)},
        {"scale": -0.2},
        {"scale": 0.0},
        {"width": 36},
    ],
    ids=[
        "float32",
        "decoding",
        "rows of a chunk",
        "window",
        "padding",
        "mask",
        "softcap",
        "sinks",
        "negative scale",
        "no scale",
        "rows not of whole units",
    ],
)
def test_what_it_does_not_take_is_ours(options: dict[str, Any]) -> None:
    assert library_ran(**{"dtype": torch.bfloat16, **options}) == [False, False]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_tiles_that_it_leaves_in_doubt_are_computed_again(poison: float) -> None:
    """Its zero weight times a NaN that a row does not see is NaN."""
    query = torch.randn(2, 4, 200, 64).bfloat16()
    key, value = (torch.randn(2, 2, 200, 64).bfloat16() for _ in range(2))
    value[1, 0, 100, 7] = poison  # key head 0: query heads 0 and 1
    output, _, outliers = functional.source_attention(query, key, value)
    below = functional.rebalanced_attention(query, key, value, outliers, 0.2)
    for found in (output, below):
        assert found[0].isfinite().all()
        assert found[1, 2:].isfinite().all()
        assert found[1, :2, :100].isfinite().all()
        assert not found[1, :2, 100:, 7].isfinite().any()
        assert found[1, :2, :, :7].isfinite().all()


def test_what_the_user_turned_off_is_ours() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert library_ran(torch.bfloat16) == [False, False]


def test_outlier_rows_that_break_the_rules() -> None:
    """They raise where somebody asked for it, and make their rows NaN elsewhere: no more, and no less."""
    query, key, value = (torch.randn(1, 2, 70, 32).bfloat16() for _ in range(3))
    outliers = functional.source_attention(query, key, value)[2]
    right = functional.rebalanced_attention(query, key, value, outliers, 0.2)
    outliers.counts[0, 1, 60] = outliers.indices.shape[3] + 1
    if os.environ.get("ATTNRB_CUDA_CHECKS") == "1":
        with pytest.raises(ValueError, match="counts: expected numbers from 0 to C"):
            functional.rebalanced_attention(query, key, value, outliers, 0.2)
        return
    found = functional.rebalanced_attention(query, key, value, outliers, 0.2)
    broken = torch.zeros(1, 2, 70, dtype=torch.bool)
    broken[0, 1, 60] = True
    assert found[broken].isnan().all()
    assert torch.equal(found[~broken], right[~broken])
