"""Accuracies with intervals, and paired differences with a test, an interval and a verdict.

The same items are answered by both models, so their answers come in pairs, and only items on which the two differ say
anything about the difference. Accuracies have Wilson intervals, differences McNemar's exact test (a binomial test over
the items that one model alone got right) and a percentile interval of the paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Accuracy", "Difference", "accuracy", "difference", "holm", "needed_items", "verdict"]

LEVEL = 0.95
"""Level of every interval; 1 - LEVEL is the level of every test."""
POWER = 0.8
"""Chance to see a true difference that `needed_items` plans for."""
LEAST_DIFFERING = 10
"""Items that have to differ before `needed_items` is planned from them: with k of them, how often the models differ is
known to about 1 / √k of itself, and from fewer a number of items would be read off noise."""
RESAMPLES = 10_000
"""Resamples of the bootstrap."""


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers."""

    items: int
    correct: int
    accuracy: float
    wilson: tuple[float, float]
    """Wilson interval."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of the re-balanced model less that of the plain one, over the same items."""

    items: int
    plain: float
    rebalanced: float
    difference: float
    bootstrap: tuple[float, float]
    """Percentile interval of the paired bootstrap."""
    only_plain: int
    """Items that the plain model alone got right."""
    only_rebalanced: int
    """Items that the re-balanced model alone got right."""
    mcnemar: float
    """p of the exact McNemar test."""
    needed_items: int | None
    """See `needed_items`; None also where fewer than `LEAST_DIFFERING` items differ."""


def accuracy(correct: Sequence[bool]) -> Accuracy:
    """Share of right answers among one or more, with its Wilson interval.

    Raises:
        ValueError: there are no answers.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not len(correct):
        raise ValueError("correct: expected at least one answer, got none")
    count, items = int(np.sum(correct)), len(correct)
    low, high = proportion_confint(count, items, alpha=1 - LEVEL, method="wilson")
    return Accuracy(items, count, count / items, (float(low), float(high)))


def difference(plain: Sequence[bool], rebalanced: Sequence[bool], *, seed: int = 0) -> Difference:
    """Compare two models on the same items, in the same order.

    Args:
        plain: which items the plain model got right.
        rebalanced: which the re-balanced model got right.
        seed: of the bootstrap.

    Raises:
        ValueError: the two have different lengths, or none.
    """
    from scipy.stats import bootstrap
    from statsmodels.stats.contingency_tables import mcnemar

    if len(plain) != len(rebalanced) or not len(plain):
        raise ValueError(f"rebalanced: expected the {len(plain)} answers of plain, got {len(rebalanced)}")
    one, other = np.asarray(plain, dtype=bool), np.asarray(rebalanced, dtype=bool)
    change = other.astype(np.int8) - one.astype(np.int8)
    only_plain, only_rebalanced = int(np.sum(change < 0)), int(np.sum(change > 0))
    if len(change) == 1:  # of one item there is nothing to resample
        low, high = -1.0, 1.0
    elif only_plain or only_rebalanced:
        # Pairs are resampled whole, so their differences may be. In batches, which bounds memory.
        interval = bootstrap(
            (change,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, 10_000_000 // len(change)),
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    else:
        low = high = 0.0
    both, neither = int(np.sum(one & other)), int(np.sum(~one & ~other))
    p = float(mcnemar([[both, only_plain], [only_rebalanced, neither]], exact=True).pvalue)
    return Difference(
        items=len(change),
        plain=float(one.mean()),
        rebalanced=float(other.mean()),
        difference=float(change.mean()),
        bootstrap=(low, high),
        only_plain=only_plain,
        only_rebalanced=only_rebalanced,
        mcnemar=min(1.0, p),
        needed_items=needed_items(float(change.mean()), float(np.mean(change != 0)))
        if only_plain + only_rebalanced >= LEAST_DIFFERING
        else None,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for there being several of them: Holm's step-down method (Scand. J. Statist. 6, 1979)."""
    # Not statsmodels' multipletests: each call of it collects garbage, 0.4 s where a model is in memory.
    ordered = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=float)[ordered] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[ordered] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(p) for p in adjusted]


def needed_items(difference: float, discordant: float) -> int | None:
    """How many items a study needs to see such a difference, at the level and power of this module.

    The paired differences of single items have mean d and variance p - d², where p is the share of items on which the
    models differ, and variance p where there is no difference; this is the size of McNemar's two-sided test (Connor,
    Biometrics 43, 1987).

    Args:
        difference: d, in accuracy, from -1 to 1.
        discordant: p, from 0 to 1.

    Returns:
        The number, or None where there is no difference to see.

    Raises:
        ValueError: an argument is out of range, or the share is smaller than the difference.
    """
    from statsmodels.stats.power import normal_sample_size_one_tail

    if not 0.0 <= discordant <= 1.0:
        raise ValueError(f"discordant: expected a share from 0 to 1, got {discordant}")
    if abs(difference) > discordant + 1e-12:
        raise ValueError(f"difference: expected at most the share of items that differ, {discordant}, got {difference}")
    if difference == 0.0:
        return None
    size = normal_sample_size_one_tail(
        abs(difference),
        POWER,
        (1 - LEVEL) / 2,
        std_null=math.sqrt(discordant),
        std_alternative=math.sqrt(max(0.0, discordant - difference**2)),
    )
    return math.ceil(float(size))


def verdict(result: Difference, adjusted_p: float) -> str:
    """``improves``, ``worsens`` or ``no difference shown``.

    The first two only where the bootstrap interval excludes 0 and so does the test after its correction.
    """
    low, high = result.bootstrap
    if adjusted_p < 1 - LEVEL and low > 0:
        return "improves"
    if adjusted_p < 1 - LEVEL and high < 0:
        return "worsens"
    return "no difference shown"
