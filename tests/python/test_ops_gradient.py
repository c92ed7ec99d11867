"""The gradient of `rebalance`, against autograd through its formula in float64; `outlier_mask` has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnrb import functional
from torch import Tensor


def formula(weights: Tensor, mask: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    boosted = torch.where(mask, weights * (1 + gain.reshape(-1, 1, 1)), weights)
    total = boosted.sum(-1, keepdim=True)
    return boosted / torch.where(total == 0, 1.0, total) if normalize else boosted


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_of_weights_and_gains(heads: int, normalize: bool) -> None:
    weights = torch.rand(2, 3, 4, 6).softmax(-1)
    weights[1, 2, 3] = 0.0  # a row that sees nothing
    mask, gain, upstream = torch.rand(2, 1, 4, 6) > 0.5, torch.rand(heads), torch.randn(2, 3, 4, 6)
    found: list[Any] = []
    expected: list[Any] = []
    cases: list[tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor], list[Any]]] = [
        (torch.float32, lambda w, g: functional.rebalance(w, mask, g, normalize=normalize), found),
        (torch.float64, lambda w, g: formula(w, mask, g, normalize), expected),
    ]
    for dtype, function, gradients in cases:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (weights, gain)]
        gradients += torch.autograd.grad((function(*leaves) * upstream).sum(), leaves)
    for came, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(came, truth.float())  # the default tolerance of float32


@pytest.mark.parametrize("normalize", [False, True])
def test_second_derivative(normalize: bool) -> None:
    weights, mask = torch.rand(1, 2, 3, 5).softmax(-1), torch.rand(1, 2, 3, 5) > 0.5
    upstream, direction = torch.randn(2, 1, 2, 3, 5)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = weights.to(dtype, copy=True).requires_grad_()
        gain = torch.tensor([0.3], dtype=dtype)
        if dtype == torch.float32:
            out = functional.rebalance(leaf, mask, gain, normalize=normalize)
        else:
            out = formula(leaf, mask, gain, normalize)
        (first,) = torch.autograd.grad(((out * upstream) ** 2).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad((first * direction).sum(), leaf)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)  # float32 sums of a few terms of order 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_gradient_once(dtype: torch.dtype) -> None:
    weights, mask = torch.rand(1, 2, 3, 50).softmax(-1).to(dtype), torch.rand(1, 2, 3, 50) > 0.5
    upstream = torch.randn(1, 2, 3, 50).to(dtype)
    low = weights.clone().requires_grad_()
    (came,) = torch.autograd.grad(functional.rebalance(low, mask, 0.5), low, upstream)
    assert torch.equal(came, torch.where(mask, upstream.double() * 1.5, upstream.double()).to(dtype))


def test_compiled_training_step() -> None:
    mask = torch.rand(1, 2, 3, 5) > 0.5

    def step(scores: Tensor) -> Tensor:
        return (functional.rebalance(scores.softmax(-1), mask, 0.2, normalize=True) ** 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    scores = torch.randn(1, 2, 3, 5, requires_grad=True)
    (eager,) = torch.autograd.grad(step(scores), scores)
    (came,) = torch.autograd.grad(compiled(scores), scores)
    torch.testing.assert_close(came, eager)


def test_the_mask_carries_no_gradient() -> None:
    weights = torch.rand(1, 2, 3, 5).softmax(-1).requires_grad_()
    mask = functional.outlier_mask(weights, 0.2)
    assert not mask.requires_grad
    (came,) = torch.autograd.grad(functional.rebalance(weights, mask, 0.3).sum(), weights)
    torch.testing.assert_close(came, torch.where(mask, 1.3, 1.0))
