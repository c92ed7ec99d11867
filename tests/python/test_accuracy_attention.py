"""Every attention op against the float64 reference, over the case table and every dtype (Note: [Earned tolerance])."""

from __future__ import annotations

import os
import zlib

import library_kernels
import numpy as np
import pytest
import torch
from attnrb import functional, reference
from attnrb.ops.outliers import Outliers
from cases import DTYPES, Inputs, sample, table
from conftest import CloseCalls
from numpy.typing import NDArray
from tolerance import Eager, assert_as_accurate, error, one_rounding, row_magnitude
from torch import Tensor

pytestmark = pytest.mark.emulated

# Instruction sets below the best one run a part of the table (test_accuracy_instruction_sets.py sets this).
CASES = table() if "ATTNRB_TEST_SAMPLE" not in os.environ else sample(int(os.environ["ATTNRB_TEST_SAMPLE"]))


class Truth:
    """The reference's weights of a case and PyTorch's errors on it, computed once for all that is checked."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.options = inputs, inputs.options
        self.weights, self.lse = reference.attention_weights(inputs.query, inputs.key, **self.options)
        batch, heads, queries, keys = self.weights.shape
        visibility = self.options["visibility"]
        self.seen = reference.visible(batch, heads, queries, keys, visibility)
        resolved = reference.resolve_visibility(queries, keys, visibility)
        self.query_offset, self.key_offset = resolved.query_offset, resolved.key_offset
        self.output = reference.weighted_values(self.weights, inputs.value, self.seen)
        self.magnitude = row_magnitude(self.weights, inputs.value)
        # An absolute error of a log-sum-exp is a relative one of every weight, so it is measured against 1, or against
        # its own size where that is larger and its last digit is worth more.
        self.seeing = self.seen.any(axis=3)
        self.true_lse = self.lse[self.seeing]
        self.lse_magnitude = np.maximum(1.0, np.abs(self.true_lse))
        self.received = reference.received_attention(inputs.query, inputs.key, **self.options)
        # A key's share is measured against the largest one of its head.
        self.received_magnitude = self.received.max(axis=2, keepdims=True, initial=0.0)
        self.eager = Eager(inputs.query, inputs.key, **self.options)
        self.torch_errors = self._torch_errors()

    def _torch_errors(self) -> dict[str, float]:
        value = self.inputs.value
        outputs = [self.eager.output(value), *self.eager.sdpa(value)]
        lse = [self.eager.lse, *self._library_lse()]
        return {
            "output": max(error(output, self.output, self.magnitude) for output in outputs),
            "lse": max(error(each[torch.from_numpy(self.seeing)], self.true_lse, self.lse_magnitude) for each in lse),
            "received": error(self.eager.received(), self.received, self.received_magnitude),
        }

    def _library_lse(self) -> list[Tensor]:
        """That of PyTorch's kernel, where it is what the op on the emulated device hands on."""
        query, key, value = self.inputs.query, self.inputs.key, self.inputs.value
        plain = self.inputs.vision is None and not self.options["softcap"] and self.options["sinks"] is None
        taken = library_kernels.computes(query.dtype, query.shape[2], key.shape[2], plainly_causal=plain)
        if not (library_kernels.EMULATED and taken and query.shape[3] == value.shape[3]):
            return []
        return [library_kernels.emulated_lse(query, key, value, self.options["scale"])]

    def add_draws(self, draws: int) -> None:
        """Takes PyTorch's errors over more draws of the same case."""
        for draw in range(1, draws + 1):
            other = Truth(self.inputs.case.build(self.inputs.query.dtype, draw))
            self.torch_errors = {
                name: max(found, other.torch_errors[name]) for name, found in self.torch_errors.items()
            }


FEW_ROWS = 64


# Module scope makes pytest run all tests of one case together, so that its truth is computed once.
@pytest.fixture(
    scope="module",
    params=[pytest.param((case, dtype), id=f"{case.name}-{str(dtype)[6:]}") for case in CASES for dtype in DTYPES],
)
def truth(request: pytest.FixtureRequest) -> Truth:
    case, dtype = request.param
    truth = Truth(case.build(dtype))
    if truth.seeing.sum() < FEW_ROWS:  # a row that sees no key has no error
        truth.add_draws(4)
    return truth


def close_to_threshold(weights: NDArray[np.float64], threshold: float, dtype: torch.dtype) -> NDArray[np.bool_]:
    """Entries that rounding may put on either side: within 1e-5 of the threshold, relatively, or one of the dtype."""
    margin = 1e-5 if dtype == torch.float32 else one_rounding(dtype)
    return np.asarray(np.abs(weights - threshold) <= margin * threshold)


def check_outliers(truth: Truth, outliers: Outliers, close_calls: CloseCalls) -> None:
    threshold, dtype = truth.inputs.case.threshold, truth.inputs.query.dtype
    batch, heads, queries, keys = truth.weights.shape
    capacity = reference.outlier_capacity(threshold, keys)
    indices, counts = outliers.indices.numpy(), outliers.counts.numpy()
    assert (indices.shape, indices.dtype) == ((batch, heads, queries, capacity), np.int32)
    assert (counts.shape, counts.dtype) == ((batch, heads, queries), np.int32)
    assert ((counts >= 0) & (counts <= capacity)).all()

    filled = np.arange(capacity) < counts[..., None]
    assert (indices[~filled] == -1).all(), "what lies beyond a row's count is -1"
    assert np.isin(indices[filled], truth.key_offset + np.arange(keys)).all(), "an outlier is a key held here"
    assert (np.diff(indices, axis=3)[filled[..., 1:]] > 0).all(), "slots ascend strictly"

    expected = reference.outlier_mask(
        truth.weights, threshold, query_offset=truth.query_offset, key_offset=truth.key_offset
    )
    found = reference.held_mask(indices, counts, np.ones_like(expected), truth.key_offset)
    own = truth.key_offset + np.arange(keys) == truth.query_offset + np.arange(queries)[:, None]
    assert not (found & own).any(), "a query's own key is never its outlier"
    assert not (found & ~truth.seen).any(), "an outlier is visible"
    close = close_to_threshold(truth.weights, threshold, dtype) & truth.seen & ~own
    different = found != expected
    assert not (different & ~close).any(), (
        f"{np.argwhere(different & ~close)[:5].tolist()} differ, far from the threshold"
    )
    close_calls.add(int((truth.seen & ~own).sum()), int(close.sum()), int(different.sum()))


def test_source_attention(truth: Truth, close_calls: CloseCalls) -> None:
    inputs = truth.inputs
    output, lse, outliers = functional.source_attention(
        inputs.query, inputs.key, inputs.value, threshold=inputs.case.threshold, **truth.options
    )
    assert (output.dtype, lse.dtype) == (inputs.query.dtype, torch.float32)
    own = truth.torch_errors
    assert_as_accurate(output, [], truth.output, truth.magnitude, also=own["output"])
    assert np.isneginf(lse.numpy()[~truth.seeing]).all(), "a row that sees no key has log-sum-exp -inf"
    assert_as_accurate(lse[torch.from_numpy(truth.seeing)], [], truth.true_lse, truth.lse_magnitude, also=own["lse"])
    check_outliers(truth, outliers, close_calls)


def outliers_of_another_layer(truth: Truth) -> Outliers:
    """Random rows of slots, as a layer of another window would hand them on: some not held here, some not visible.

    Some rows are full, some empty; the query's own key may be among them; what lies beyond a count is arbitrary.
    """
    batch, heads, queries, keys = truth.weights.shape
    generator = np.random.default_rng(zlib.crc32(truth.inputs.case.name.encode()))
    slots = np.arange(max(0, truth.key_offset - 20), truth.key_offset + keys + 20)
    capacity = min(24, len(slots))
    # Sorted draws plus 0, 1, 2, ... ascend strictly.
    picks = generator.integers(0, len(slots) - capacity + 1, (batch, heads, queries, capacity))
    indices = slots[np.sort(picks, axis=3) + np.arange(capacity)].astype(np.int32)
    counts = generator.integers(0, capacity + 1, (batch, heads, queries), dtype=np.int32)
    counts[generator.random(counts.shape) < 0.2] = 0
    counts[generator.random(counts.shape) < 0.2] = capacity
    return Outliers(torch.from_numpy(indices), torch.from_numpy(counts))


def gains_of(heads: int) -> Tensor:
    """One gain per head, from a weakening one to a doubling one, zero among them."""
    return torch.tensor([0.2, 0.0, 1.0, -0.5, 0.0625])[torch.arange(heads) % 5]


@pytest.mark.parametrize("normalize", [False, True], ids=["published", "normalised"])
def test_rebalanced_attention(truth: Truth, normalize: bool) -> None:
    inputs = truth.inputs
    heads, gain = inputs.query.shape[1], gains_of(inputs.query.shape[1])
    mask = reference.outlier_mask(
        truth.weights, inputs.case.threshold, query_offset=truth.query_offset, key_offset=truth.key_offset
    )
    capacity = reference.outlier_capacity(inputs.case.threshold, truth.weights.shape[3])
    own = Outliers(*map(torch.from_numpy, reference.outlier_rows(mask, capacity, truth.key_offset)))
    for outliers, factor in ((own, 0.1), (outliers_of_another_layer(truth), gain)):
        output = functional.rebalanced_attention(
            inputs.query, inputs.key, inputs.value, outliers, factor, normalize=normalize, **truth.options
        )
        held = reference.held_mask(*outliers, truth.seen, truth.key_offset)
        weights, _ = reference.rebalanced_weights(truth.weights, truth.lse, held, factor, normalize=normalize)
        gains = factor if isinstance(factor, Tensor) else torch.full((heads,), factor)
        eager = truth.eager.boosted(inputs.value, torch.from_numpy(held), gains, normalize)
        expected = reference.weighted_values(weights, inputs.value, truth.seen)
        magnitude = row_magnitude(weights, inputs.value)
        assert output.dtype == inputs.query.dtype
        # PyTorch's fused kernels know no re-balancing, but their rounding is that of the same sums.
        assert_as_accurate(output, eager, expected, magnitude, also=truth.torch_errors["output"])


def test_received_attention(truth: Truth) -> None:
    received = functional.received_attention(truth.inputs.query, truth.inputs.key, **truth.options)
    assert received.dtype == torch.float32
    own = truth.torch_errors["received"]
    assert_as_accurate(received, [], truth.received, truth.received_magnitude, also=own)
