"""Gradients whose dense part PyTorch's flash backward computes: as accurate as any others, where outliers join it.

On a GPU, or on the emulated device, which has PyTorch's CPU kernel in the place of the GPU's.
"""

from __future__ import annotations

import math
import os
import random

import library_kernels
import pytest
import torch
from attnrb import Outliers, Visibility, functional, reference
from cases import LAYOUTS
from gradient_oracle import Problem
from test_dense_part import library_ran_in
from test_training_accuracy import REPEATS, own_error, run
from tolerance import error, one_rounding
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not library_kernels.ON_CUDA, reason="for the CUDA ops, or their emulation"),
]


def dense_problem(seed: int, repeat: int = 0) -> tuple[Problem, Outliers | None]:
    """A problem that the library takes. A `repeat` has other numbers in the same shapes."""
    draw = random.Random(seed)
    torch.manual_seed(seed + 10_000 * repeat)
    kind, dtype = ("source", "rebalanced", "normalised")[seed % 3], (torch.bfloat16, torch.float16)[seed // 3 % 2]
    batch, key_heads, groups = draw.randint(1, 2), draw.randint(1, 2), draw.choice((1, 2, 3))
    heads, queries, width = key_heads * groups, draw.choice((64, 70, 131)), draw.choice((8, 40, 64, 72, 128, 136))
    causal = draw.random() < 0.7
    keys = queries if causal else draw.choice((20, 64, 150))
    lay_out = LAYOUTS[draw.choice(("contiguous", "sequence first"))]
    query = lay_out((torch.randn(batch, heads, queries, width) * draw.choice((0.5, 1.0, 2.0))).to(dtype))
    key, value = (lay_out(torch.randn(batch, key_heads, keys, width).to(dtype)) for _ in range(2))
    upstream = lay_out(torch.randn(batch, heads, queries, width).to(dtype))
    options = {"scale": None, "visibility": None, "softcap": None, "sinks": None}
    if not causal:
        options["visibility"] = Visibility(causal=False)
    if kind == "source":
        return Problem(kind, query, key, value, options, upstream), None
    with torch.no_grad():
        outliers = functional.source_attention(query, key, value, threshold=draw.choice((0.01, 0.05)), **options)[2]
    problem = Problem("rebalanced", query, key, value, options, upstream, normalize=kind == "normalised")
    problem.held = torch.from_numpy(reference.held_mask(*outliers, problem.seen.numpy(), 0))
    problem.gain = torch.rand(heads) - 0.3
    return problem, outliers


@pytest.mark.parametrize("seed", range(36))
def test_gradients_of_both_parts_are_as_accurate_as_those_of_pytorch(seed: int) -> None:
    problem, outliers = dense_problem(seed)
    found: dict[str, Tensor] = {}
    assert library_ran_in(lambda: found.update(run(problem, outliers)), backward=True)
    truth, magnitudes = problem.dense(torch.float64)
    earned = max(own_error(dense_problem(seed, repeat)[0]) for repeat in range(REPEATS))
    assert math.isfinite(earned)
    for name, came in found.items():
        assert torch.isfinite(came).all(), name
        off = error(came, truth[name].numpy(), magnitudes[name].numpy())
        allowed = 2 * earned + one_rounding(came.dtype)
        assert off <= allowed, f"{name}: error {off:.3g}, allowed {allowed:.3g} (PyTorch's own {earned:.3g})"


def gradients(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, outliers: Outliers, gain: Tensor
) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in (query, key, value, gain)]
    output = functional.rebalanced_attention(*leaves[:3], outliers, leaves[3], normalize=True)
    return list(torch.autograd.grad([output], leaves, [upstream]))


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor, Outliers, Tensor]:
    torch.manual_seed(3)
    query, upstream = (torch.randn(2, 4, 130, 64).to(dtype) for _ in range(2))
    key, value = (torch.randn(2, 2, 130, 64).to(dtype) for _ in range(2))
    outliers = functional.source_attention(query, key, value)[2]
    return query, key, value, upstream, outliers, torch.tensor([0.2, -0.3, 0.0, 1.0])


def test_values_that_are_hidden_stay_hidden() -> None:
    """The library lets them through, as the zero weight of a row times a NaN; our kernels compute those tiles again."""
    query, key, value, upstream, outliers, gain = operands()
    clean = gradients(query, key, value, upstream, outliers, gain)
    value[1, 0, 100, 7] = math.nan  # key head 0: query heads 0 and 1, queries from 100 on
    spoilt = gradients(query, key, value, upstream, outliers, gain)
    assert not spoilt[0][1, :2, 100:].isfinite().any()
    before, after = clean[0], spoilt[0]
    assert torch.equal(before[0], after[0])
    untouched = after[1, :2, :100].float() - before[1, :2, :100].float()
    assert untouched.abs().max() <= 4 * one_rounding(before.dtype) * before[1, :2, :100].float().abs().max()
    assert torch.equal(before[1, 2:], after[1, 2:])
    # Key head 1 has nothing to do with it.
    for which in (1, 2):
        assert torch.equal(clean[which][1, 1], spoilt[which][1, 1])
        assert torch.equal(clean[which][0], spoilt[which][0])


def test_outlier_rows_that_break_the_rules_spoil_what_they_reach() -> None:
    query, key, value, upstream, outliers, gain = operands()
    output = functional.rebalanced_attention(query, key, value, outliers, gain, normalize=True)
    outliers.counts[0, 1, 60] = outliers.indices.shape[3] + 1
    lse = torch.zeros(2, 4, 130)
    call = torch.ops.attnrb.attention_backward
    arguments = (upstream, None, query, key, value, output, lse, *outliers, gain, 1)
    if os.environ.get("ATTNRB_CUDA_CHECKS") == "1":
        with pytest.raises(ValueError, match="counts: expected numbers from 0 to C"):
            call(*arguments, query_offset=0, scale=0.125)
        return
    found = call(*arguments, query_offset=0, scale=0.125)
    assert found[0][0, 1, 60].isnan().all()
    assert found[1][0, 0, :61].isnan().all()
    assert found[0][1].isfinite().all()
    assert found[1][1].isfinite().all()


def test_equal_inputs_give_equal_bits() -> None:
    """But for the library's own atomics, which it leaves out where torch is told so."""
    problem = operands(torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(*problem), gradients(*problem)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("why", ["gradient of the log-sum-exp", "too wide", "turned off"])
def test_what_it_does_not_take_is_ours(why: str) -> None:
    width = 200 if why == "too wide" else 64
    leaves = [torch.randn(1, 2, 70, width).bfloat16().requires_grad_() for _ in range(3)]

    def backward() -> None:
        output, lse, _ = functional.source_attention(*leaves)
        loss = output.float().sum() + (lse.sum() if why == "gradient of the log-sum-exp" else 0.0)
        loss.backward()

    with sdpa_kernel(SDPBackend.MATH if why == "turned off" else SDPBackend.FLASH_ATTENTION):
        assert not library_ran_in(backward, backward=True)
