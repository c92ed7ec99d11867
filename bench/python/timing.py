"""Interleaved timing: whatever slows the machine for a while slows all contenders alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A round counts where the probe beside it took at most this much longer than its quickest. On a shared host a core's
# tile unit slows down by a factor of 2.5 for milliseconds to minutes; a core that shares its clock by less.
SLACK = 1.15
# Rounds are waited for until the time is so many times over.
PATIENCE = 3.0


@dataclass(frozen=True)
class Times:
    """Seconds a call took in the rounds that count: the median, the quartiles around it, and the minimum."""

    median: float
    low: float
    high: float
    rounds: int
    fastest: float
    dropped: int = 0  # rounds that do not count, because the machine was slowed down from outside

    @staticmethod
    def of(samples: list[float], dropped: int = 0) -> Times:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return Times(median, low, high, len(samples), min(samples), dropped)


@dataclass(frozen=True)
class Round:
    """What the contenders took, and what the probe took before or after it, whichever was longer."""

    taken: dict[str, float]
    probe: float


def undisturbed(rounds: list[Round], least: int) -> list[Round]:
    """The rounds beside which the probe ran nearly as quickly as ever; where those are too few, the best there are."""
    quickest = min(each.probe for each in rounds)
    clean = [each for each in rounds if each.probe <= SLACK * quickest]
    return clean if len(clean) >= least else sorted(rounds, key=lambda each: each.probe)[:least]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 5,
    most: int = 500,
    probe: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Times the contenders in turn, round after round, for about so many seconds and at least so many rounds.

    Each round begins with another contender, so that none always runs on the caches its neighbour left. One round
    before the clock starts warms them up.

    The `probe` is a short call that does what bounds the contenders. It runs before and after each round; rounds beside
    which it was slow are dropped and counted (see `undisturbed`), and while too few are left more follow, for up to
    `PATIENCE` times as many seconds.
    """
    names = list(contenders)
    for call in [*contenders.values(), *([probe] if probe else [])]:
        call()
    rounds: list[Round] = []
    begun = time.perf_counter()
    for turn in range(most):
        spent = time.perf_counter() - begun
        if turn >= least and spent > seconds and (spent > PATIENCE * seconds or len(undisturbed(rounds, 0)) >= least):
            break
        shift = turn % len(names)
        before = seconds_of(probe) if probe else 0.0
        taken = {name: seconds_of(contenders[name]) for name in names[shift:] + names[:shift]}
        rounds.append(Round(taken, max(before, seconds_of(probe)) if probe else 0.0))
    kept = undisturbed(rounds, least)
    return {name: Times.of([each.taken[name] for each in kept], len(rounds) - len(kept)) for name in names}


def seconds_of(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
