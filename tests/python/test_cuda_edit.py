"""What options of an edit mean to each other on CUDA, bit for bit: the kernels differ, their arithmetic does not.

Against the definition they are held in C++ (tests/cuda_host/test_edited.cpp).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from library_kernels import ON_CUDA
from torch import Tensor

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not ON_CUDA, reason="says what CUDA kernels do: make test-cuda, or make test-gpu"),
]

# Decoding, a chunk behind a prefix, and what a kernel of PyTorch's computes the dense part of in 16 bits.
SHAPES = {"decode": (2, 4, 2, 1, 150), "chunk": (2, 4, 2, 37, 90), "square": (1, 4, 2, 80, 80)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
everywhere = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys = shape
    torch.manual_seed(3)
    sizes = ((batch, heads, queries, 32), (batch, key_heads, keys, 32), (batch, key_heads, keys, 32))
    query, key, value = (torch.randn(size).to(dtype) for size in sizes)
    return query, key, value


def lists(shape: tuple[int, ...], rows: int, rule: int) -> dict[str, Any]:
    batch, heads, _, _, keys = shape
    indices = torch.stack([torch.randperm(keys)[:5].sort().values for _ in range(batch * heads * rows)])
    return {
        "indices": indices.view(batch, heads, rows, 5).int(),
        "counts": torch.full((batch, heads, rows), 5, dtype=torch.int32),
        "gain": torch.linspace(-0.5, 0.9, heads),
        "rule": rule,
    }


def attend(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    results = torch.ops.attnrb.attention(*tensors, **options)
    assert isinstance(results, tuple)
    return results


def differentiate(tensors: tuple[Tensor, ...], grad_lse: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    output, lse, _, _ = attend(*tensors, **options)
    torch.manual_seed(5)
    results = torch.ops.attnrb.attention_backward(
        torch.randn(output.shape).to(output.dtype), grad_lse, *tensors, output, lse, **options
    )
    assert isinstance(results, tuple)
    return results


def assert_same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@everywhere
@in_each_dtype
@pytest.mark.parametrize("rule", [0, 1], ids=["none", "row"])
def test_one_call_finds_outliers_and_strengthens_others(shape: tuple[int, ...], dtype: torch.dtype, rule: int) -> None:
    """By the weights before they are strengthened: what two calls give."""
    tensors = operands(shape, dtype)
    edit = lists(shape, shape[3], rule)
    output, lse, indices, counts = attend(*tensors, emit=0.02, **edit)
    assert_same_bits((output, lse), attend(*tensors, **edit)[:2])
    assert_same_bits((indices, counts), attend(*tensors, emit=0.02)[2:])
    assert int(counts.sum()) > 0


@everywhere
@in_each_dtype
@pytest.mark.parametrize("rule", [0, 1, 2], ids=["none", "row", "rest"])
def test_one_list_serves_all_queries_of_a_head(shape: tuple[int, ...], dtype: torch.dtype, rule: int) -> None:
    tensors = operands(shape, dtype)
    shared = lists(shape, 1, rule)
    repeated = shared | {name: shared[name].repeat_interleave(shape[3], 2) for name in ("indices", "counts")}
    assert_same_bits(attend(*tensors, **shared), attend(*tensors, **repeated))
    assert_same_bits(differentiate(tensors, None, **shared), differentiate(tensors, None, **repeated))


@everywhere
@in_each_dtype
def test_minus_infinity_removes_as_a_mask_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, _, _, keys = shape
    tensors = operands(shape, dtype)
    mask = torch.rand(batch, heads, 1, keys) < 0.7
    bias = torch.zeros(batch, heads, keys).masked_fill(~mask[:, :, 0], -math.inf)
    masked, biased = attend(*tensors, mask=mask, emit=0.05), attend(*tensors, key_bias=bias, emit=0.05)
    assert_same_bits(masked, biased)
    for by_mask, by_bias in zip(
        differentiate(tensors, None, mask=mask), differentiate(tensors, None, key_bias=bias), strict=True
    ):
        assert by_mask.numel() == 0 or torch.equal(by_mask, by_bias)


@everywhere
def test_what_no_visible_key_uses_reaches_nothing(shape: tuple[int, ...]) -> None:
    batch, heads, _, _, keys = shape
    tensors = operands(shape, torch.float32)
    bias = torch.randn(1, heads, keys + 9)
    end = torch.full((batch,), keys - 20)
    clean = attend(*tensors, key_bias=bias, key_end=end)
    bias[:, :, keys - 20 :] = math.nan
    bias[:, :, keys + 3 :] = -math.inf
    assert_same_bits(clean, attend(*tensors, key_bias=bias, key_end=end))
    gradients = differentiate(tensors, None, key_bias=bias, key_end=end)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert gradients[4].shape == bias.shape
    assert not gradients[4][:, :, keys - 20 :].any()


@everywhere
@pytest.mark.parametrize("rule", [0, 1, 2], ids=["none", "row", "rest"])
def test_a_bias_for_all_keys_moves_the_log_sum_exp_alone(shape: tuple[int, ...], rule: int) -> None:
    """So its gradients sum to that of the log-sum-exp, for each head."""
    batch, heads, _, queries, keys = shape
    tensors = operands(shape, torch.float32)
    edit = lists(shape, queries, rule)
    bias = torch.randn(batch, heads, keys)
    grad_lse = torch.randn(batch, heads, queries)
    of_bias = differentiate(tensors, grad_lse, key_bias=bias, **edit)[4].double()
    allowed = torch.finfo(torch.float32).eps * 4 * keys * (of_bias.abs().sum(-1) + grad_lse.abs().sum(-1))
    assert bool(((of_bias.sum(-1) - grad_lse.double().sum(-1)).abs() <= allowed).all())
