"""Interleaved timing: whatever slows the machine for a while slows all contenders alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds a call took: the median of all rounds, and the quartiles around it."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return Times(median, low, high, len(samples))


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5, most: int = 500
) -> dict[str, Times]:
    """Times the contenders in turn, round after round, for about so many seconds and at least so many rounds.

    Each round begins with another contender, so that none always runs on the caches its neighbour left. One round
    before the clock starts warms them up.
    """
    names = list(contenders)
    for name in names:
        contenders[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            call = contenders[name]
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: Times.of(taken) for name, taken in samples.items()}
