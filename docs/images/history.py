"""Draws history.svg from bench/history: what the benches measured over time, one panel for each kind of processor.

.venv/bin/python docs/images/history.py
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench" / "python"))

Series = dict[str, list[tuple[str, float]]]


def series(kind: Path) -> Series:
    """For each bench, its results in the order of time: a label, and the geometric mean of its ratios to PyTorch."""
    from compare import YARDSTICKS, measure_of

    found: Series = defaultdict(list)
    for path in sorted(kind.glob("*.json")):
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ratios = [measure_of(case) for case in stored["cases"] if any(each in case["seconds"] for each in YARDSTICKS)]
        if ratios:
            found[stored["bench"]].append(
                (f"{stored['date'].replace('T', ' ')}\n{stored['commit']}", geometric_mean(ratios))
            )
    return found


def draw(history: Path, picture: Path) -> int:
    """One panel for each kind; how many there were."""
    kinds = {kind.name: series(kind) for kind in sorted(history.glob("*")) if kind.is_dir()}
    kinds = {name: found for name, found in kinds.items() if found}
    if not kinds:
        return 0
    matplotlib.rcParams.update({"svg.hashsalt": "attnrb", "svg.fonttype": "none", "font.size": 9})
    figure, panels = pyplot.subplots(len(kinds), 1, figsize=(8, 2.8 * len(kinds)), layout="constrained", squeeze=False)
    for panel, (name, benches) in zip(panels[:, 0], kinds.items(), strict=True):
        for bench, points in benches.items():
            panel.plot([label for label, _ in points], [ratio for _, ratio in points], "o-", markersize=4, label=bench)
        panel.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        panel.set(title=name, ylabel="time of attnrb /\ntime of PyTorch", ylim=(0, None))
        panel.legend(frameon=False, ncols=4)
        panel.grid(alpha=0.25)
    figure.savefig(picture, metadata={"Date": None})
    pyplot.close(figure)
    return len(kinds)


if __name__ == "__main__":
    if not draw(ROOT / "bench" / "history", Path(__file__).with_suffix(".svg")):
        sys.exit("bench/history has no results yet: make bench, then make bench-history")
