"""Operands whose elements lie more than 2^31 apart, on a GPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

import os

import pytest
import torch
from attnrb import functional
from torch import Tensor

REASON = "torch finds no CUDA device (ATTNRB_REQUIRE_CUDA=1 makes this a failure)"
FAR = 2**31 + 2**20


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        if os.environ.get("ATTNRB_REQUIRE_CUDA") == "1":
            pytest.fail(REASON)
        pytest.skip(REASON)


def far_apart(tensor: Tensor, axis: int) -> Tensor:
    """An equal tensor, in 4 GB of its own, whose first and last element along the axis are more than 2^31 apart."""
    strides = list(torch.empty([1 if i == axis else size for i, size in enumerate(tensor.shape)]).stride())
    strides[axis] = -(-FAR // (tensor.shape[axis] - 1) // 8) * 8 + 8
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    view = torch.empty(elements, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, strides)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_32_bits(axis: int) -> None:
    shapes = ((2, 4, 70, 64), (2, 2, 130, 64), (2, 2, 130, 64))
    near = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    output, lse, outliers = functional.source_attention(*near)
    below = functional.rebalanced_attention(*near, outliers, 0.3)
    received = functional.received_attention(near[0], near[1])

    far = [far_apart(tensor, axis) for tensor in near]
    far_output, far_lse, far_outliers = functional.source_attention(*far)
    far_below = functional.rebalanced_attention(*far, far_outliers, 0.3)
    assert torch.equal(far_outliers.indices, outliers.indices)
    for result, right in (
        (far_output, output),
        (far_lse, lse),
        (far_below, below),
        (functional.received_attention(far[0], far[1]), received),
    ):
        torch.testing.assert_close(result, right, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_32_bits_of_the_backward(axis: int) -> None:
    shapes = ((2, 4, 70, 64), (2, 2, 130, 64), (2, 2, 130, 64))
    near = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    outliers = functional.source_attention(*near)[2]
    upstream = torch.randn(2, 4, 70, 64, device="cuda", dtype=torch.bfloat16)

    def gradients(operands: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [operand.requires_grad_() for operand in operands]
        output = functional.rebalanced_attention(leaves[0], leaves[1], leaves[2], outliers, 0.3)
        return torch.autograd.grad(output, leaves, upstream)

    expected = gradients(near, upstream)
    far = gradients([far_apart(tensor.detach(), axis) for tensor in near], far_apart(upstream, axis))
    for result, right in zip(far, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0.0, atol=0.0)
