"""Progress of a study: a bar with losses and the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attnrb.cli.console import LINE_SECONDS, duration, errors
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


@contextmanager
def training_progress() -> Iterator[tuple[Any, Any]]:
    """Yields what to tell of a step outside training, and of training: see `structured.training.Tell`."""
    console = errors()
    clock = _Clock()
    if not console.is_terminal:
        last = [-LINE_SECONDS]
        ended: set[tuple[str, bool]] = set()

        def line(run: str, step: int, steps: int, loss: float | None, held_out: float | None) -> None:
            left = clock.left(run, step, steps)
            end = (run, held_out is not None)  # the last step comes several times, with more losses each time
            if time.monotonic() - last[0] >= LINE_SECONDS or (step == steps and end not in ended):
                last[0] = time.monotonic()
                if step == steps:
                    ended.add(end)
                console.print(Text(f"{run}: step {step} of {steps}, {_losses(loss, held_out)}{left}"), soft_wrap=True)

        yield lambda text: console.print(Text(text), soft_wrap=True), line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Starting", total=None, state="")

        def say(text: str) -> None:
            bar.update(task, description=text, total=None, completed=0, state="")

        def show(run: str, step: int, steps: int, loss: float | None, held_out: float | None) -> None:
            state = f"{step} of {steps}, {_losses(loss, held_out)}{clock.left(run, step, steps)}"
            bar.update(task, description=run, total=steps, completed=step, state=state)

        yield say, show


class _Clock:
    """The time that a run still takes, from the steps that this process has seen."""

    def __init__(self) -> None:
        self._run = ""
        self._start = (0.0, 0)

    def left(self, run: str, step: int, steps: int) -> str:
        now = time.monotonic()
        if run != self._run:
            self._run, self._start = run, (now, step)
        began, first = self._start
        return f", {duration((now - began) / (step - first) * (steps - step))} left" if first < step < steps else ""


def _losses(loss: float | None, held_out: float | None) -> str:
    text = "" if loss is None else f"loss {loss:.3f}"
    return text if held_out is None else f"{text}, held out {held_out:.3f}"
