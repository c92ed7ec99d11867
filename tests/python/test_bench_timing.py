"""Which rounds of a bench count, on a clock and a machine made up for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import REPOSITORY


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench" / "python"))
    import timing

    return timing


class Machine:
    """A clock that calls move on, by as much as they take at that time."""

    def __init__(self, slowdown: Callable[[float], float]) -> None:
        self.now = 0.0
        self._slowdown = slowdown

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self._slowdown(self.now)

        return run


def run(timing: Any, monkeypatch: pytest.MonkeyPatch, machine: Machine, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(timing.time, "perf_counter", lambda: machine.now)
    contenders = {"ours": machine.call(0.010), "theirs": machine.call(0.020)}
    times: dict[str, Any] = timing.interleaved(contenders, **options)
    return times


def test_without_a_probe_every_round_counts(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = run(timing, monkeypatch, Machine(lambda now: 2.5 if now < 1.0 else 1.0), seconds=2.0)
    assert times["ours"].dropped == 0
    assert times["ours"].fastest == pytest.approx(0.010)
    assert times["ours"].high == pytest.approx(0.025)


def test_rounds_of_a_machine_slowed_down_from_outside_are_dropped_and_counted(
    timing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(lambda now: 2.5 if now % 0.5 < 0.3 else 1.0)
    times = run(timing, monkeypatch, machine, seconds=3.0, probe=machine.call(0.001))
    for name, seconds in (("ours", 0.010), ("theirs", 0.020)):
        # A round may still be slowed down between its probes: the quartiles are what shows it.
        assert times[name].fastest == pytest.approx(seconds)
        assert times[name].median == pytest.approx(seconds)
    assert times["ours"].dropped > times["ours"].rounds / 2
    assert times["ours"].rounds == times["theirs"].rounds


def test_a_machine_that_is_never_itself_for_long_is_waited_for_and_given_up(
    timing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once, for the first probe, it was quick.
    machine = Machine(lambda now: 1.0 if now < 0.085 else 2.0)
    times = run(timing, monkeypatch, machine, seconds=1.0, least=4, probe=machine.call(0.001))
    assert machine.now >= timing.PATIENCE * 1.0
    assert times["ours"].rounds == 4
    assert times["ours"].dropped > 10


def test_the_quickest_rounds_stand_in_where_too_few_are_clean(timing: Any) -> None:
    rounds = [timing.Round({"ours": float(index)}, probe) for index, probe in enumerate((1.0, 3.0, 2.0, 5.0, 1.1))]
    assert [each.probe for each in timing.undisturbed(rounds, 2)] == [1.0, 1.1]
    assert [each.probe for each in timing.undisturbed(rounds, 3)] == [1.0, 1.1, 2.0]
