"""Statistics against formulas written out here and values worked out by hand."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("statsmodels")

from attnrb.evaluation.statistics import accuracy, difference, holm, needed_items, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

Z = 1.959963984540054


@settings(max_examples=50)
@given(st.integers(1, 400), st.data())
def test_wilson(items: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, items))
    found = accuracy([True] * correct + [False] * (items - correct))
    share = correct / items
    centre = (share + Z**2 / (2 * items)) / (1 + Z**2 / items)
    half = Z / (1 + Z**2 / items) * math.sqrt(share * (1 - share) / items + Z**2 / (4 * items**2))
    assert (found.items, found.correct, found.accuracy) == (items, correct, share)
    np.testing.assert_allclose(found.wilson, (max(0, centre - half), min(1, centre + half)), atol=1e-12)


def answers(both: int, only_plain: int, only_rebalanced: int, neither: int) -> tuple[list[bool], list[bool]]:
    plain = [True] * both + [True] * only_plain + [False] * only_rebalanced + [False] * neither
    rebalanced = [True] * both + [False] * only_plain + [True] * only_rebalanced + [False] * neither
    return plain, rebalanced


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(0, 30), st.integers(0, 30), st.integers(1, 40))
def test_mcnemar_is_a_binomial_test(both: int, only_plain: int, only_rebalanced: int, neither: int) -> None:
    found = difference(*answers(both, only_plain, only_rebalanced, neither))
    discordant, smaller = only_plain + only_rebalanced, min(only_plain, only_rebalanced)
    tail = sum(math.comb(discordant, k) for k in range(smaller + 1)) / 2**discordant
    assert found.mcnemar == pytest.approx(min(1.0, 2 * tail))
    assert found.difference == pytest.approx((only_rebalanced - only_plain) / found.items)
    assert (found.only_plain, found.only_rebalanced) == (only_plain, only_rebalanced)


def test_bootstrap_is_that_of_the_paired_differences() -> None:
    plain, rebalanced = answers(200, 30, 70, 100)
    found = difference(plain, rebalanced, seed=3)
    change = np.array(rebalanced, dtype=float) - np.array(plain, dtype=float)
    half = Z * change.std() / math.sqrt(len(change))  # the bootstrap comes to this for so many items
    np.testing.assert_allclose(found.bootstrap, (change.mean() - half, change.mean() + half), atol=0.004)
    assert found == difference(plain, rebalanced, seed=3)


def test_the_pairs_matter_and_not_the_shares_alone() -> None:
    # The same two accuracies, once with few and once with many items that differ.
    few, many = difference(*answers(190, 0, 10, 0)), difference(*answers(100, 90, 100, 0))
    width = [high - low for low, high in (few.bootstrap, many.bootstrap)]
    assert few.mcnemar < 0.01 < many.mcnemar
    assert width[0] < width[1]


def test_no_difference_at_all() -> None:
    found = difference([True, False], [True, False])
    assert (found.difference, found.bootstrap, found.mcnemar, found.needed_items) == (0.0, (0.0, 0.0), 1.0, None)


def test_of_one_item_nothing_is_known() -> None:
    found = difference([False], [True])
    assert found.bootstrap == (-1.0, 1.0)
    assert verdict(found, 0.001) == "no difference shown"


def test_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="expected the 2 answers of plain, got 1"):
        difference([True, False], [True])
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_holm_is_that_of_statsmodels() -> None:
    p_values = np.random.default_rng(7).uniform(0, 0.2, 40) ** 2
    expected = importlib.import_module("statsmodels.stats.multitest").multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(holm(list(p_values)), expected, atol=1e-12)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_step_by_step(p_values: list[float]) -> None:
    order = np.argsort(p_values, kind="stable")
    expected, highest = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        expected[index] = highest
    np.testing.assert_allclose(holm(p_values), expected, atol=1e-12)


@pytest.mark.parametrize(("change", "discordant"), [(0.02, 0.1), (-0.05, 0.3), (0.2, 0.25), (0.004, 0.06)])
def test_needed_items(change: float, discordant: float) -> None:
    spread = Z * math.sqrt(discordant) + 0.8416212335729143 * math.sqrt(discordant - change**2)
    assert needed_items(change, discordant) == math.ceil(spread**2 / change**2)


def test_smaller_differences_need_more_items() -> None:
    found = [needed_items(change, 0.2) for change in (0.01, 0.02, 0.05, 0.1)]
    assert all(one is not None and other is not None and one > other for one, other in pairwise(found))


def test_needed_items_refuses() -> None:
    with pytest.raises(ValueError, match="discordant"):
        needed_items(0.1, 1.5)
    with pytest.raises(ValueError, match="difference"):
        needed_items(0.2, 0.1)
    assert needed_items(0.0, 0.1) is None
    assert needed_items(-1.0, 1.0) == 4  # all against none


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(0, 40), st.integers(0, 40), st.integers(0, 20), st.floats(0, 1))
def test_never_improves_where_the_interval_holds_zero(
    both: int, only_plain: int, only_rebalanced: int, neither: int, p: float
) -> None:
    if both + only_plain + only_rebalanced + neither == 0:
        return
    found = difference(*answers(both, only_plain, only_rebalanced, neither))
    low, high = found.bootstrap
    word = verdict(found, p)
    if low <= 0 <= high or p >= 0.05:
        assert word == "no difference shown"
    else:
        assert word == ("improves" if low > 0 else "worsens")


@pytest.mark.parametrize(("differing", "planned"), [(1, False), (9, False), (10, True), (40, True)])
def test_a_number_of_items_is_planned_from_enough_of_them(differing: int, planned: bool) -> None:
    plain, other = [True] * 100, [place >= differing for place in range(100)]
    assert (difference(plain, other).needed_items is not None) == planned
