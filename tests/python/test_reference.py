"""The float64 reference itself, against examples worked by hand, PyTorch in float64, and the method's identities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attnrb import reference
from cases import Case, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Two float64 computations of one row agree to a few roundings of numbers near 1, times a few hundred terms.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def tiny(scores: list[list[float]], **visibility: Any) -> dict[str, Any]:
    """Operands whose scores are those given: one head, query i the unit vector i, key j the column j of the scores."""
    matrix = np.array(scores, dtype=np.float64)
    queries, keys = matrix.shape
    value = np.stack([np.arange(1.0, keys + 1), np.ones(keys)], axis=1)
    return {
        "query": np.eye(queries)[None, None],
        "key": matrix.T[None, None],
        "value": value[None, None],
        "scale": 1.0,
        "visibility": SimpleNamespace(**(defaults() | visibility)),
    }


def defaults() -> dict[str, Any]:
    names = ("causal", "query_offset", "window", "key_start", "key_end", "mask", "chunk")
    return dict.fromkeys(names) | {"key_offset": 0}


LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


# --- Worked out by hand.


def test_weights_of_a_causal_row() -> None:
    # exp of the last row: 1, 2, 5; sum 8. Row 1 sees 3 and 1.
    operands = tiny([[0, 9, 9], [LN3, 0, 9], [0, LN2, math.log(5)]])
    value = operands.pop("value")
    weights, lse = reference.attention_weights(**operands)
    np.testing.assert_allclose(weights[0, 0], [[1, 0, 0], [3 / 4, 1 / 4, 0], [1 / 8, 2 / 8, 5 / 8]], **CLOSE)
    np.testing.assert_allclose(lse[0, 0], [0, LN4, math.log(8)], **CLOSE)
    output = reference.weighted_values(weights, value, weights > 0)
    np.testing.assert_allclose(output[0, 0], [[1, 1], [1.25, 1], [1 / 8 + 4 / 8 + 15 / 8, 1]], **CLOSE)


def test_outliers_by_hand() -> None:
    # Weights 1/8, 2/8, 5/8 in the last row, whose own key is the last: 5/8 never counts; 1/4 is not above 1/4.
    operands = tiny([[0, 9, 9], [LN3, 0, 9], [0, LN2, math.log(5)]])
    _, _, rows = reference.source_attention(**operands, threshold=0.25)
    assert rows.indices.tolist() == [[[[-1, -1, -1], [0, -1, -1], [-1, -1, -1]]]]
    assert rows.counts.tolist() == [[[0, 1, 0]]]
    _, _, rows = reference.source_attention(**operands, threshold=0.12)
    assert rows.indices.tolist() == [[[[-1, -1, -1], [0, -1, -1], [0, 1, -1]]]]
    assert rows.counts.tolist() == [[[0, 1, 2]]]


def test_rebalancing_by_hand() -> None:
    operands = tiny([[0, 9, 9], [LN3, 0, 9], [0, LN2, math.log(5)]])
    rows = (np.array([[[[-1, -1], [0, -1], [0, 1]]]]), np.array([[[0, 1, 2]]]))
    published = reference.rebalanced_attention(**operands, outliers=rows, gain=0.5)
    # Row 1: 1.5 * 3/4 = 9/8 and 1/4; row 2: 1.5/8, 3/8, 5/8 against the values 1, 2, 3 and 1, 1, 1.
    np.testing.assert_allclose(published[0, 0], [[1, 1], [9 / 8 + 4 / 8, 11 / 8], [22.5 / 8, 9.5 / 8]], **CLOSE)
    normalised = reference.rebalanced_attention(**operands, outliers=rows, gain=0.5, normalize=True)
    np.testing.assert_allclose(normalised[0, 0], [[1, 1], [13 / 11, 1], [22.5 / 9.5, 1]], **CLOSE)


def test_slots_that_are_not_held_or_not_visible_are_skipped() -> None:
    # Keys at slots 10, 11, 12, queries at 11 and 12. Of the slots named, 9 and 13 are not held; query 0 is before 12.
    operands = tiny([[0, 0, 0], [0, 0, 0]], key_offset=10)
    rows = (np.array([[[[9, 10, 12, 13], [9, 10, 12, 13]]]]), np.array([[[4, 2]]]))
    output = reference.rebalanced_attention(**operands, outliers=rows, gain=1.0)
    np.testing.assert_allclose(output[0, 0], [[(2 * 1 + 2) / 2, 3 / 2], [(2 * 1 + 2 + 3) / 3, 4 / 3]], **CLOSE)


def test_sinks_join_the_denominator_only() -> None:
    # Scores 0, 0 and a sink of ln 2: weights 1/4, 1/4, and the sink's 1/2 goes nowhere.
    operands = tiny([[0, 0]])
    output, lse, rows = reference.source_attention(**operands, sinks=[LN2], threshold=0.2)
    np.testing.assert_allclose(output[0, 0], [[3 / 4, 1 / 2]], **CLOSE)
    np.testing.assert_allclose(lse, [[[LN4]]], **CLOSE)
    # Normalised by z = 1 + 1 * 1/4: the sink shrinks with the rest and takes no gain.
    boosted = reference.rebalanced_attention(**operands, outliers=rows, gain=1.0, normalize=True, sinks=[LN2])
    np.testing.assert_allclose(boosted[0, 0], [[(2 * 1 + 2) / 4 / 1.25, 3 / 4 / 1.25]], **CLOSE)


def test_softcap_by_hand() -> None:
    operands = tiny([[100.0, 0.0]])
    del operands["value"]
    _, lse = reference.attention_weights(**operands, softcap=1.0)
    np.testing.assert_allclose(lse, [[[math.log(math.exp(math.tanh(100.0)) + 1.0)]]], **CLOSE)


def test_received_by_hand() -> None:
    operands = tiny([[0, 9, 9], [LN3, 0, 9], [0, LN2, math.log(5)]])
    del operands["value"]
    received = reference.received_attention(**operands)
    # Key 0 is seen by three queries, key 1 by two, key 2 by one.
    np.testing.assert_allclose(received[0, 0], [(1 + 3 / 4 + 1 / 8) / 3, (1 / 4 + 2 / 8) / 2, 5 / 8], **CLOSE)


@pytest.mark.parametrize(
    ("visibility", "expected"),
    [
        ({}, ["110", "111"]),
        ({"causal": False}, ["111", "111"]),
        ({"query_offset": 0}, ["100", "110"]),
        ({"query_offset": -1}, ["000", "100"]),
        ({"query_offset": np.array([1])}, ["110", "111"]),
        ({"chunk": 2, "query_offset": 1}, ["110", "001"]),
        ({"chunk": 2, "query_offset": 1, "key_start": np.array([1])}, ["010", "011"]),
        ({"chunk": 2, "query_offset": 1, "causal": False}, ["110", "001"]),
        ({"window": 1}, ["010", "001"]),
        ({"window": 2, "causal": False}, ["111", "011"]),
        ({"key_offset": 5}, ["110", "111"]),
        ({"key_offset": 5, "query_offset": 5}, ["100", "110"]),
        ({"key_offset": 5, "key_start": [6]}, ["010", "011"]),
        ({"key_end": [2]}, ["110", "110"]),
        ({"key_start": [2], "key_end": [2]}, ["000", "000"]),
        ({"mask": np.array([[True, False, True]] * 2)}, ["101", "101"]),
        ({"mask": np.array([[True, False, True]] * 2), "causal": True}, ["100", "101"]),
    ],
)
def test_visibility_by_hand(visibility: dict[str, Any], expected: list[str]) -> None:
    seen = reference.visible(1, 1, 2, 3, SimpleNamespace(**(defaults() | visibility)))
    assert ["".join(str(int(x)) for x in row) for row in seen[0, 0]] == expected


def test_visibility_defaults() -> None:
    causal = ["100", "110", "111"]
    assert ["".join(str(int(x)) for x in row) for row in reference.visible(1, 1, 3, 3)[0, 0]] == causal
    mask = np.array([[False, True], [True, True]])
    np.testing.assert_array_equal(reference.visible(1, 1, 2, 2, mask)[0, 0], mask)


def test_own_key_by_slot() -> None:
    weights = np.full((1, 1, 2, 3), 0.3)
    assert reference.outlier_mask(weights, 0.2)[0, 0].tolist() == [[True, False, True], [True, True, False]]
    assert reference.outlier_mask(weights, 0.2, query_offset=0)[0, 0].tolist() == [
        [False, True, True],
        [True, False, True],
    ]
    assert reference.outlier_mask(weights, 0.2, query_offset=9)[0, 0].all()
    shifted = reference.outlier_mask(weights, 0.2, query_offset=9, key_offset=8)[0, 0]
    assert shifted.tolist() == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize(
    ("threshold", "keys", "capacity"),
    [(0.01, 1000, 99), (0.01, 50, 50), (0.5, 10, 1), (0.3, 10, 3), (0.9, 10, 1), (0.34, 10, 2), (0.1, 0, 0)],
)
def test_capacity(threshold: float, keys: int, capacity: int) -> None:
    assert reference.outlier_capacity(threshold, keys) == capacity


def test_gain_schedule() -> None:
    np.testing.assert_allclose(reference.gain_schedule(0.2, 5), [0, 0.15, 0.1, 0.05, 0], **CLOSE)
    np.testing.assert_allclose(reference.gain_schedule(0.2, 3, depth=31), [0, 0.2 * 30 / 31, 0.2 * 29 / 31], **CLOSE)
    np.testing.assert_allclose(reference.gain_schedule(0.3, 4, source_layer=1), [0, 0, 0.1, 0], **CLOSE)


def test_what_is_not_visible_cannot_reach_a_row() -> None:
    operands = tiny([[0, 0], [0, 0]])
    clean = reference.source_attention(**operands)[0]
    operands["key"][0, 0, 1], operands["value"][0, 0, 1] = np.nan, np.inf
    poisoned = reference.source_attention(**operands)[0]
    np.testing.assert_array_equal(poisoned[0, 0, 0], clean[0, 0, 0])
    assert np.isnan(poisoned[0, 0, 1]).all()


# --- PyTorch in float64 on the case table, and the identities of the method on the same.

identity_cases = pytest.mark.parametrize("case", sample(3), ids=lambda case: case.name)


def options(case: Case) -> tuple[Any, dict[str, Any]]:
    inputs = case.build(torch.float32)
    visibility = None if inputs.vision is None else SimpleNamespace(**(defaults() | inputs.vision))
    return inputs, {"scale": case.scale, "visibility": visibility, "softcap": case.softcap, "sinks": inputs.sinks}


@identity_cases
def test_against_torch(case: Case) -> None:
    inputs, kwargs = options(case)
    groups = case.heads // case.key_heads
    query, key, value = (x.double() for x in (inputs.query, inputs.key, inputs.value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.from_numpy(reference.visible(*query.shape[:3], key.shape[2], kwargs["visibility"]))
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (case.scale or case.width**-0.5)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if inputs.sinks is not None:
        sinks = inputs.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    if scores.shape[-1] == 0:
        scores = torch.full((*scores.shape[:3], 1), -math.inf, dtype=torch.float64)
    any_seen = seen.any(-1)
    weights = torch.where(any_seen[..., None], torch.softmax(scores, -1)[..., : seen.shape[3]], 0.0)
    lse = torch.where(any_seen, torch.logsumexp(scores, -1), -math.inf)
    output, found_lse, _ = reference.source_attention(inputs.query, inputs.key, inputs.value, **kwargs)
    # Scores of some hundreds lose as many roundings to the exponential.
    tolerance = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(output, (weights @ value).numpy(), **tolerance)
    np.testing.assert_allclose(found_lse, lse.numpy(), **tolerance)
    if not case.softcap and inputs.sinks is None and 0 not in seen.shape:
        sdpa = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=case.scale)
        np.testing.assert_allclose(output, torch.where(any_seen[..., None], sdpa, 0.0).numpy(), **tolerance)


@identity_cases
def test_rebalancing_is_a_sparse_correction(case: Case) -> None:
    """y_i = sum_j A_ij v_j + g sum_S A_ij v_j; normalised, y_i / z_i; the same weights come from the shifted LSE."""
    inputs, kwargs = options(case)
    gain = np.linspace(-0.5, 1.0, case.heads)
    weights, lse = reference.attention_weights(inputs.query, inputs.key, **kwargs)
    output, _, rows = reference.source_attention(
        inputs.query, inputs.key, inputs.value, threshold=case.threshold, **kwargs
    )
    value = np.repeat(inputs.value.double().numpy(), case.heads // case.key_heads, axis=1)
    offset = reference.resolve_visibility(case.queries, case.keys, kwargs["visibility"]).key_offset
    correction, outlier_sum = np.zeros_like(output), np.zeros(lse.shape)
    for b, h, i in np.ndindex(*lse.shape):
        js = rows.indices[b, h, i, : rows.counts[b, h, i]] - offset
        assert (weights[b, h, i, js] > case.threshold).all()
        correction[b, h, i] = gain[h] * (weights[b, h, i, js] @ value[b, h, js])
        outlier_sum[b, h, i] = weights[b, h, i, js].sum()
    published = reference.rebalanced_attention(inputs.query, inputs.key, inputs.value, rows, gain, **kwargs)
    np.testing.assert_allclose(published, output + correction, **CLOSE)

    z = 1.0 + gain[None, :, None] * outlier_sum
    normalised = reference.rebalanced_attention(
        inputs.query, inputs.key, inputs.value, rows, gain, normalize=True, **kwargs
    )
    np.testing.assert_allclose(normalised, published / z[..., None], **CLOSE)

    mask = reference.held_mask(*rows, weights > 0, offset)
    boosted, shifted = reference.rebalanced_weights(weights, lse, mask, gain, normalize=True)
    np.testing.assert_allclose(shifted, lse + np.log(z), **CLOSE)
    if inputs.sinks is None:
        sees = weights.sum(axis=3) > 0
        np.testing.assert_allclose(boosted.sum(axis=3)[sees], 1.0, **CLOSE)
        np.testing.assert_allclose(reference.rebalance(weights, mask, gain, normalize=True), boosted, **CLOSE)


@identity_cases
def test_rows_and_masks_are_inverse(case: Case) -> None:
    inputs, kwargs = options(case)
    weights, _ = reference.attention_weights(inputs.query, inputs.key, **kwargs)
    resolved = reference.resolve_visibility(case.queries, case.keys, kwargs["visibility"])
    offsets = {"query_offset": resolved.query_offset, "key_offset": resolved.key_offset}
    mask = reference.outlier_mask(weights, case.threshold, **offsets)
    capacity = reference.outlier_capacity(case.threshold, case.keys)
    assert (mask.sum(axis=3) <= capacity).all(), "no row has more outliers than the capacity"
    rows = reference.outlier_rows(mask, capacity, resolved.key_offset)
    np.testing.assert_array_equal(reference.held_mask(*rows, weights > 0, resolved.key_offset), mask)


# --- Properties.

rows_of_scores = st.lists(st.floats(-30, 30), min_size=1, max_size=40)
thresholds = st.floats(0.001, 0.999)


@settings(max_examples=200)
@given(rows_of_scores, thresholds, st.floats(-0.9, 3.0))
def test_properties_of_a_row(scores: list[float], threshold: float, gain: float) -> None:
    operands = tiny([scores])
    output, lse, rows = reference.source_attention(**operands, threshold=threshold)
    weights, _ = reference.attention_weights(operands["query"], operands["key"], scale=1.0)
    assert 0 <= rows.counts[0, 0, 0] <= reference.outlier_capacity(threshold, len(scores))
    assert len(scores) - 1 not in rows.indices[0, 0, 0]
    np.testing.assert_allclose(weights.sum(), 1.0, **CLOSE)
    assert max(scores) <= lse[0, 0, 0] + 1e-12 <= max(scores) + math.log(len(scores)) + 1e-11
    # Normalised weights sum to 1, so the column of ones in the values comes out as 1.
    normalised = reference.rebalanced_attention(**operands, outliers=rows, gain=gain, normalize=True)
    np.testing.assert_allclose(normalised[0, 0, 0, 1], 1.0, **CLOSE)
    # No gain is no change; a gain on every key, normalised, is none either.
    np.testing.assert_array_equal(reference.rebalanced_attention(**operands, outliers=rows, gain=0.0), output)
    everything = (np.arange(len(scores)).reshape(1, 1, 1, -1), np.full((1, 1, 1), len(scores)))
    boost_all = reference.rebalanced_attention(**operands, outliers=everything, gain=gain)
    np.testing.assert_allclose(boost_all, output * (1.0 + gain), **CLOSE)
    undone = reference.rebalanced_attention(**operands, outliers=everything, gain=gain, normalize=True)
    np.testing.assert_allclose(undone, output, **CLOSE)


@settings(max_examples=50)
@given(rows_of_scores, st.floats(-50, 50))
def test_scores_may_be_shifted(scores: list[float], shift: float) -> None:
    output, lse, _ = reference.source_attention(**tiny([scores]))
    shifted, shifted_lse, _ = reference.source_attention(**tiny([[s + shift for s in scores]]))
    np.testing.assert_allclose(shifted, output, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(shifted_lse, lse + shift, rtol=1e-11, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_decoding_row_by_row_is_prefill(groups: int, queries: int, before: int, random: Any) -> None:
    """Each new query finds its outliers at the source and uses them below, in the same step, as in one prefill."""
    rng = np.random.default_rng(random.randrange(2**32))
    keys = before + queries
    query, key, value = (rng.normal(size=(1, h, n, 8)) for h, n in ((2 * groups, queries), (2, keys), (2, keys)))
    output, lse, rows = reference.source_attention(query, key, value)
    below = reference.rebalanced_attention(query, key, value, rows, 0.2)
    for i in range(queries):
        stop = before + i + 1
        step = (query[:, :, i : i + 1], key[:, :, :stop], value[:, :, :stop])
        one, one_lse, one_rows = reference.source_attention(*step)
        np.testing.assert_allclose(one[:, :, 0], output[:, :, i], **CLOSE)
        np.testing.assert_allclose(one_lse[:, :, 0], lse[:, :, i], **CLOSE)
        np.testing.assert_array_equal(one_rows.counts[:, :, 0], rows.counts[:, :, i])
        np.testing.assert_allclose(
            reference.rebalanced_attention(*step, one_rows, 0.2)[:, :, 0], below[:, :, i], **CLOSE
        )
