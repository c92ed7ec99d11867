"""The gradient of `rebalance`, against autograd through its formula in float64; `outlier_mask` has none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from attnrb import functional, reference
from attnrb.ops.refusals import REFUSAL
from tolerance import error, one_rounding
from torch import Tensor

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")

ops = torch.ops.attnrb


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def formula(weights: Tensor, mask: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    """In the dtype of the weights, as eager PyTorch writes it."""
    factor = torch.where(mask, 1 + gain.to(weights.dtype).reshape(-1, 1, 1), 1.0)
    boosted = factor * weights
    total = boosted.sum(-1, keepdim=True)
    return boosted / torch.where(total == 0, 1.0, total) if normalize else boosted


@dataclass
class Problem:
    """One call, and the gradient of its output."""

    weights: Tensor
    mask: Tensor
    gain: Tensor
    upstream: Tensor
    normalize: bool

    def gradients(self, function: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the weights and the gain, with weights in `dtype`; gains are float32 at least."""
        weights = self.weights.to(dtype).detach().requires_grad_()
        gain = self.gain.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
        output = function(weights, self.mask, gain, self.normalize)
        first, second = torch.autograd.grad(output, (weights, gain), self.upstream.to(dtype))
        return first, second

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """What the rounding errors of either scale with: the same sums, of sizes."""
        weights, upstream = self.weights.double(), self.upstream.double().abs()
        factor = torch.where(self.mask, 1 + self.gain.double().reshape(-1, 1, 1), 1.0)
        total = (factor * weights).sum(-1, keepdim=True)
        total = torch.where(total == 0, 1.0, total) if self.normalize else torch.ones(())
        mean = (factor * weights * upstream).sum(-1, keepdim=True) / total if self.normalize else torch.zeros(())
        size = (upstream + mean) / total
        gain = (weights * size * self.mask).sum((0, 2, 3))
        gain = gain.sum(0, keepdim=True) if len(self.gain) == 1 else gain
        return (factor * size).amax(-1, keepdim=True), gain


def random_problem(seed: int) -> Problem:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    heads, queries, keys = draw.randint(1, 4), draw.choice((1, 5, 40, 70)), draw.choice((1, 3, 33, 90))
    shape = (draw.randint(1, 2), heads, queries, keys)
    weights = (torch.randn(shape) * draw.choice((0.5, 3.0))).softmax(-1)
    if draw.random() < 0.3:
        weights[..., : queries // 2 + 1, :] = 0.0  # rows that see nothing
    upstream = torch.randn(shape)
    if draw.random() < 0.3:  # as the gradient of a transposed result, and of a sum
        upstream = torch.randn(*shape[:2], keys, queries).transpose(2, 3)
    elif draw.random() < 0.3:
        upstream = torch.randn(()).expand(shape)
    mask = torch.rand(draw.choice((shape, (queries, keys), (shape[0], 1, queries, keys)))) < draw.choice((0.1, 0.6))
    gain = torch.rand(draw.choice((1, heads))) - 0.3
    return Problem(weights.to(dtype), mask, gain, upstream.to(dtype), bool(seed % 2))


def ours(weights: Tensor, mask: Tensor, gain: Tensor, normalize: bool) -> Tensor:
    return functional.rebalance(weights, mask, gain, normalize=normalize)


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_gradients_are_as_accurate_as_those_of_pytorch(seed: int) -> None:
    """Note: [Earned tolerance] (tolerance.py)."""
    problem = random_problem(seed)
    dtype = problem.weights.dtype
    truth = problem.gradients(formula, torch.float64)
    own, found = problem.gradients(formula, dtype), problem.gradients(ours, dtype)
    for came, torch_own, exact, size in zip(found, own, truth, problem.magnitudes(), strict=True):
        assert came.shape == exact.shape
        earned = error(torch_own, exact.numpy(), size.numpy())
        assert error(came, exact.numpy(), size.numpy()) <= 2 * earned + one_rounding(came.dtype)


def test_a_number_and_a_tensor_as_gain_have_the_same_gradient() -> None:
    problem = random_problem(1)
    leaf = problem.weights.detach().requires_grad_()
    expected = torch.autograd.grad(ours(leaf, problem.mask, torch.tensor([0.3]), True), leaf, problem.upstream)
    found = torch.autograd.grad(ours(leaf, problem.mask, 0.3, True), leaf, problem.upstream)  # type: ignore[arg-type]
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_without_gradient_is_left_out_whatever_it_holds(dtype: torch.dtype, normalize: bool) -> None:
    weights, mask = torch.rand(2, 3, 4, 6).to(dtype), torch.rand(4, 6) > 0.5
    upstream = torch.randn(2, 3, 4, 6).to(dtype)
    upstream[:, :, 1] = 0.0
    gain = torch.rand(3)
    clean = Problem(weights, mask, gain, upstream, normalize).gradients(ours, dtype)
    poisoned = weights.clone()
    poisoned[:, :, 1] = NAN
    found = Problem(poisoned, mask, gain, upstream, normalize).gradients(ours, dtype)
    for came, expected in zip(found, clean, strict=True):
        assert torch.equal(came, expected)
    assert not found[0][:, :, 1].any()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_repeat_bit_by_bit_on_one_thread_and_two(dtype: torch.dtype) -> None:
    weights, mask = torch.rand(2, 3, 200, 50).to(dtype), torch.rand(200, 50) > 0.5
    problem = Problem(weights, mask, torch.rand(3), torch.randn(2, 3, 200, 50).to(dtype), True)
    first = None
    for repeat in range(50):
        torch.set_num_threads(1 + repeat % 2)
        found = problem.gradients(ours, dtype)
        first = first or found
        for came, expected in zip(found, first, strict=True):
            assert torch.equal(came, expected), f"repeat {repeat}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_gradient_once(dtype: torch.dtype) -> None:
    weights, mask = torch.rand(1, 2, 3, 50).softmax(-1).to(dtype), torch.rand(1, 2, 3, 50) > 0.5
    upstream = torch.randn(1, 2, 3, 50).to(dtype)
    low = weights.clone().requires_grad_()
    (came,) = torch.autograd.grad(functional.rebalance(low, mask, 0.5), low, upstream)
    assert torch.equal(came, torch.where(mask, upstream.double() * 1.5, upstream.double()).to(dtype))


# ------------------------------------------------------------------------------------------------- torch's rules


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_opcheck(direction: str, seed: int) -> None:
    problem = random_problem(seed)
    if direction == "backward":
        upstream = problem.upstream.clone(memory_format=torch.contiguous_format)
        arguments = (upstream, problem.weights, problem.mask, problem.gain, problem.normalize)
        torch.library.opcheck(ops.rebalance_backward.default, arguments)
        return
    weights, gain = problem.weights.requires_grad_(), problem.gain.requires_grad_()
    torch.library.opcheck(ops.rebalance.per_head, (weights, problem.mask, gain, problem.normalize))
    torch.library.opcheck(ops.rebalance.default, (weights, problem.mask, 0.4, problem.normalize))


def test_a_second_derivative_raises_and_says_what_to_do() -> None:
    weights = torch.rand(1, 2, 3, 5).softmax(-1).requires_grad_()
    mask = torch.rand(1, 2, 3, 5) > 0.5
    output = functional.rebalance(weights, mask, 0.3, normalize=True)
    (first,) = torch.autograd.grad((output**2).sum(), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*float64"):
        torch.autograd.grad(first.sum(), weights)


def test_float64_has_second_derivatives() -> None:
    weights = torch.rand(1, 2, 3, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    gain = torch.rand(2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.5
    for normalize in (False, True):
        assert torch.autograd.gradgradcheck(
            lambda w, g, n=normalize: functional.rebalance(w, mask, g, normalize=n), (weights, gain)
        )


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_weights_have_empty_gradients(shape: tuple[int, ...]) -> None:
    weights, gain = torch.rand(shape, requires_grad=True), torch.rand(max(shape[1], 1), requires_grad=True)
    gain = torch.rand(1, requires_grad=True) if shape[1] == 0 else gain
    output = functional.rebalance(weights, torch.ones(shape, dtype=torch.bool), gain, normalize=True)
    found = torch.autograd.grad(output.sum(), (weights, gain))
    assert found[0].shape == shape
    assert not found[1].any()


@pytest.mark.autograd
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


def test_the_backward_op_names_what_does_not_fit() -> None:
    weights, mask = torch.rand(1, 2, 3, 5), torch.ones(3, 5, dtype=torch.bool)
    gain = torch.ones(2)
    with pytest.raises(REFUSAL, match=r"grad_output: expected the shape \[B, H, M, N\] of weights = \[1, 2, 3, 5\]"):
        ops.rebalance_backward(weights[..., :4], weights, mask, gain, False)
    with pytest.raises(REFUSAL, match=r"grad_output: expected the dtype of weights, float32, got bfloat16"):
        ops.rebalance_backward(weights.bfloat16(), weights, mask, gain, False)
    with pytest.raises(REFUSAL, match=r"mask: expected a shape that broadcasts"):
        ops.rebalance_backward(weights, weights, mask[:2], gain, False)
    with pytest.raises(REFUSAL, match=r"gain: expected"):
        ops.rebalance_backward(weights, weights, mask, torch.ones(3), False)


def test_rows_of_a_generated_case_sum_as_they_should() -> None:
    """Normalised rows sum to 1 whatever the weights are, so their gradient along the weights themselves is 0."""
    for seed in range(1, 40, 2):
        problem = random_problem(seed)
        if problem.weights.dtype != torch.float32:
            continue
        gradient, _ = problem.gradients(ours, torch.float32)
        along = (gradient.double() * problem.weights.double()).sum(-1).numpy()
        size = (problem.magnitudes()[0] * problem.weights.double()).sum(-1).numpy()
        assert (np.abs(along) <= 4 * one_rounding(torch.float32) * size).all()


@pytest.mark.autograd
@pytest.mark.parametrize("normalize", [False, True])
def test_float64_is_the_formula(normalize: bool) -> None:
    """It takes the dense path, which has no native kernel to be compared with."""
    weights, mask, gain = (
        torch.rand(2, 3, 4, 6).double(),
        torch.rand(4, 6) > 0.5,
        torch.tensor([0.3, -0.2, 1.0]).double(),
    )
    weights = weights / weights.sum(-1, keepdim=True)
    expected = reference.rebalance(weights, mask, gain, normalize=normalize)
    np.testing.assert_allclose(ours(weights, mask, gain, normalize), expected, rtol=1e-12)
