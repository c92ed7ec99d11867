"""Draws emphasis-study.svg and rebalancing-study.svg from what `attnrb study --json` stored under docs/results.

.venv/bin/python docs/images/study.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

HERE = Path(__file__).parent
GREY, BLUE, RED, LIGHT = "#888888", "#00798c", "#d1495b", "#c9c9c9"


Look = tuple[str, str]  # a label and a colour


def emphasis(report: Mapping[str, Any]) -> None:
    """Right answers of a few arms, with Wilson's intervals, a group for each task."""
    strong = f"×{report['strength']:g}"
    random = f"{strong}, random heads"
    arms = {
        "plain": ("plain", GREY),
        random: ("emphasis, heads drawn by chance", LIGHT),
        f"{strong}, transferred heads": ("emphasis, heads found on other tasks", BLUE),
        f"{strong}, own heads, wrong span": ("emphasis on a wrong part", RED),
    }
    panel = _groups(report["results"], arms, random, ("accuracy", "wilson"))
    panel.set(ylabel="right answers, %", ylim=(0, 102))
    _save(panel, "emphasis", _title(report, "the part that holds the answer is marked"))


def rebalancing(report: Mapping[str, Any]) -> None:
    """Differences of a few arms from the plain model, with the bootstrap's intervals, a group for each task."""
    arms = {
        "alpha 0.2": ("alpha 0.2, as published", BLUE),
        "alpha 1": ("alpha 1", "#66aabb"),
        "alpha 1, rows normalised": ("alpha 1, rows normalised", "#aaccd5"),
        "alpha 1, sets drawn by chance (control)": ("alpha 1, keys drawn by chance (control)", GREY),
    }
    panel = _groups(report["differences"], arms, "alpha 0.2", ("difference", "bootstrap"))
    panel.axhline(0.0, color=GREY, linewidth=0.8)
    panel.set(ylabel="points more than plain")
    _save(panel, "rebalancing", _title(report, "re-balancing, nothing is marked"))


def _groups(figures: Sequence[Mapping[str, Any]], arms: Mapping[str, Look], asked: str, names: tuple[str, str]) -> Any:
    """Bars of the arms, in percent with intervals, a group for each task that the arm ``asked`` is asked."""
    value, interval = names
    found = {(each["arm"], each["task"]): each for each in figures}
    tasks = [task for arm, task in found if arm == asked]
    _, panel = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(arms)
    for number, (arm, (label, colour)) in enumerate(arms.items()):
        mine = [(place, found[arm, task]) for place, task in enumerate(tasks) if (arm, task) in found]
        places = [place + (number - (len(arms) - 1) / 2) * width for place, _ in mine]
        heights = [100 * each[value] for _, each in mine]
        spread = [[100 * abs(each[value] - each[interval][end]) for _, each in mine] for end in (0, 1)]
        panel.bar(places, heights, width, yerr=spread, label=label, color=colour, error_kw={"linewidth": 0.8})
    panel.set_xticks(range(len(tasks)), [task.replace(" ", "\n", 1) for task in tasks])
    panel.grid(alpha=0.25, axis="y")
    return panel


def _save(panel: Any, name: str, title: str) -> None:
    panel.figure.legend(loc="outside lower center", ncols=4, frameon=False)
    panel.figure.suptitle(title, fontsize=9)
    panel.figure.savefig(HERE / f"{name}-study.svg", metadata={"Date": None})


def _title(report: Mapping[str, Any], what: str) -> str:
    model = Path(str(report["model"])).stem
    return f"{model}, {report['settings']['items']} held-out items a task at most; {what}; level 0.95"


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "attnrb", "svg.fonttype": "none", "font.size": 9})
    for name, draw in (("emphasis", emphasis), ("rebalancing", rebalancing)):
        file = HERE.parent / "results" / f"{name}.json"
        if file.is_file():
            draw(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
