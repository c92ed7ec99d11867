"""Draws emphasis-study.svg and rebalancing-study.svg from what `attnrb study --json` stored under docs/results.

.venv/bin/python docs/images/study.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

HERE = Path(__file__).parent
GREY, BLUE, RED, LIGHT = "#888888", "#00798c", "#d1495b", "#c9c9c9"


def emphasis(report: Mapping[str, Any]) -> None:
    """Right answers of a few arms, with Wilson's intervals, a group for each task."""
    strong = f"×{report['strength']:g}"
    arms = {
        "plain": ("plain", GREY),
        f"{strong}, random heads": ("emphasis, heads drawn by chance", LIGHT),
        f"{strong}, transferred heads": ("emphasis, heads found on other tasks", BLUE),
        f"{strong}, own heads, wrong span": ("emphasis on a wrong part", RED),
    }
    found = {(each["arm"], each["task"]): each for each in report["results"]}
    tasks = [task for arm, task in found if arm == f"{strong}, random heads"]
    figure, panel = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(arms)
    for number, (arm, (label, colour)) in enumerate(arms.items()):
        mine = [(place, found[arm, task]) for place, task in enumerate(tasks) if (arm, task) in found]
        places = [place + (number - 1.5) * width for place, _ in mine]
        heights = [100 * each["accuracy"] for _, each in mine]
        spread = [[100 * abs(each["accuracy"] - each["wilson"][end]) for _, each in mine] for end in (0, 1)]
        panel.bar(places, heights, width, yerr=spread, label=label, color=colour, error_kw={"linewidth": 0.8})
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set(ylabel="right answers, %", ylim=(0, 102))
    panel.grid(alpha=0.25, axis="y")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(report, "the part that holds the answer is marked"), fontsize=9)
    figure.savefig(HERE / "emphasis-study.svg", metadata={"Date": None})


def rebalancing(report: Mapping[str, Any]) -> None:
    """Differences from the plain model on questions, with the bootstrap's intervals."""
    arms = {
        "alpha 0.2": ("alpha 0.2, as published", BLUE),
        "alpha 1": ("alpha 1", "#66aabb"),
        "alpha 1, rows normalised": ("alpha 1, rows normalised", "#aaccd5"),
        "alpha 1, sets drawn by chance (control)": ("alpha 1, keys drawn by chance (control)", GREY),
    }
    found = {(each["arm"], each["task"]): each for each in report["differences"]}
    tasks = list(dict.fromkeys(task for arm, task in found if arm == "alpha 0.2"))
    figure, panel = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(arms)
    for number, (arm, (label, colour)) in enumerate(arms.items()):
        mine = [(place, found[arm, task]) for place, task in enumerate(tasks) if (arm, task) in found]
        places = [place + (number - 1.5) * width for place, _ in mine]
        heights = [100 * each["difference"] for _, each in mine]
        spread = [[100 * abs(each["difference"] - each["bootstrap"][end]) for _, each in mine] for end in (0, 1)]
        panel.errorbar(places, heights, spread, fmt="o", color=colour, label=label, markersize=4, linewidth=1)
    panel.axhline(0.0, color="#888888", linewidth=0.8)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set(ylabel="points more than plain")
    panel.grid(alpha=0.25, axis="y")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(report, "re-balancing, nothing is marked"), fontsize=9)
    figure.savefig(HERE / "rebalancing-study.svg", metadata={"Date": None})


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
