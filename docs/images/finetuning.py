"""Draws finetuning.svg from the reports of two studies, and prints the tables of docs/finetuning.md.

python docs/images/finetuning.py LORA/report.json GAINS/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

NAMES = {"plain": "plain", "rebalanced": "re-balanced", "gains": "learnt gains"}
COLOURS = {"plain": "#888888", "rebalanced": "#d1495b", "gains": "#00798c"}
STYLES = ("-", "--", ":", "-.")
SMOOTHED = 10  # steps whose training losses are averaged
SHORT = {
    "non_semantic": "non-semantic share, %",
    "first_key": "first-key share, %",
    "entropy": "entropy, nats",
    "outlier_overlap": "overlap with the source layer",
}


def main() -> None:
    reports = [json.loads(Path(path).read_text("utf-8")) for path in sys.argv[1:]]
    draw(reports)
    for report in reports:
        print_tables(report)


def runs_of(reports: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    return [
        (report, run, STYLES[number % len(STYLES)])
        for report in reports
        for arm in NAMES
        for number, run in enumerate(run for run in report["runs"] if run["arm"] == arm)
    ]


def draw(reports: list[dict[str, Any]]) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "attnrb", "svg.fonttype": "none", "font.size": 8})
    figure, panels = pyplot.subplots(2, 4, figsize=(12, 5.6), layout="constrained")
    training, held_out, moved, means = panels[0]
    for report, run, style in runs_of(reports):
        precision = report["study"]["precision"]
        line = {"color": COLOURS[run["arm"]], "linestyle": style}
        losses = [loss for _, loss in run["training"]]
        smooth = [sum(losses[max(0, i + 1 - SMOOTHED) : i + 1]) / min(SMOOTHED, i + 1) for i in range(len(losses))]
        training.plot(range(1, len(losses) + 1), smooth, **line, label=NAMES[run["arm"]] if style == "-" else None)
        start = report["before"]["held_out"]["plain" if run["arm"] == "plain" else "rebalanced"][precision]
        held_out.plot(*zip((0, start), *run["held_out_curve"], strict=True), **line, marker="o", markersize=3)
    training.set(title=f"training loss, mean of {SMOOTHED} steps", xlabel="step")
    held_out.set(title="held-out loss", xlabel="step")
    learnt = next((report for report in reports if report["fixed_gains"] is not None), None)
    if learnt is not None:
        run, fixed = learnt["runs"][0], learnt["fixed_gains"]
        change = [
            [after - before for after, before in zip(row, start, strict=True)]
            for row, start in zip(run["gains"], fixed, strict=True)
        ]
        limit = max(abs(value) for row in change for value in row)
        image = moved.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        figure.colorbar(image, ax=moved)
        moved.set(title="learnt less fixed gain", xlabel="head", ylabel="layer")
        for rows, colour, label in ((fixed, "#888888", "fixed"), (run["gains"], COLOURS["gains"], "learnt")):
            means.plot([sum(row) / len(row) for row in rows], color=colour, label=label)
        means.set(title="gain, mean of heads", xlabel="layer")
        means.legend(frameon=False)
    for panel, (name, label) in zip(panels[1], SHORT.items(), strict=True):
        factor = 100 if label.endswith("%") else 1
        before = reports[0]["before"]["attention"]["plain"]["layers"][name]
        panel.plot(reports[0]["layers"], scaled(before, factor), color="black", linewidth=0.8, label="before, plain")
        for report, run, style in runs_of(reports):
            after = run["attention"]["after"]["layers"][name]
            panel.plot(report["layers"], scaled(after, factor), color=COLOURS[run["arm"]], linestyle=style)
        panel.set(title=label, xlabel="layer")
    for panel in (training, held_out, means, *panels[1]):
        panel.grid(alpha=0.25)
    handles, labels = training.get_legend_handles_labels()
    more = panels[1][0].get_legend_handles_labels()
    figure.legend(handles + more[0], labels + more[1], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


def scaled(values: list[float | None], factor: float) -> list[float]:
    return [float("nan") if value is None else factor * value for value in values]


def print_tables(report: dict[str, Any]) -> None:
    before = report["before"]
    print("\n| held-out loss, nats a token | bfloat16 | float32 |\n| --- | --- | --- |")
    rows = [("before, plain", before["held_out"]["plain"])]
    rows += [("before, re-balanced, fixed gains", before["held_out"]["rebalanced"])]
    rows += [(f"after, {NAMES[run['arm']]}, seed {run['seed']}", run["held_out"]) for run in report["runs"]]
    for name, losses in rows:
        print(f"| {name} | {losses['bfloat16']:.4f} | {losses['float32']:.4f} |")
    print("\n| mean over all layers | " + " | ".join(SHORT.values()) + " |\n|" + " --- |" * (len(SHORT) + 1))
    shown = [
        ("before, plain", before["attention"]["plain"]),
        ("before, re-balanced", before["attention"]["rebalanced"]),
    ]
    shown += [(f"after, {NAMES[run['arm']]}, seed {run['seed']}", run["attention"]["after"]) for run in report["runs"]]
    for name, attention in shown:
        cells = [
            f"{attention['mean'][key] * 100:.1f}" if label.endswith("%") else f"{attention['mean'][key]:.3f}"
            for key, label in SHORT.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for run in report["runs"]:
        if run["gains"] is not None:
            change = [
                after - start
                for row, first in zip(run["gains"], report["fixed_gains"], strict=True)
                for after, start in zip(row, first, strict=True)
            ]
            print(f"\nGains moved by {min(change):+.3f} to {max(change):+.3f}, mean {sum(change) / len(change):+.4f}")


if __name__ == "__main__":
    main()
