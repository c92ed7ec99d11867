"""What a study found, from the files of its finished runs: as JSON, and through `structured.page` as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from attnrb import Rebalance
from attnrb.analysis import AttentionReport, AttentionRun
from attnrb.reports.files import write_whole

from structured.page import page
from structured.settings import ARMS
from structured.study import ATTENTION, BEFORE, RESULT

_FORMAT = "attnrb fine-tuning report 1"

MEASURES = {
    "non_semantic": "share of attention on special tokens, whitespace and punctuation",
    "first_key": "share of attention on the first key",
    "entropy": "entropy of attention (nats)",
    "outlier_overlap": "overlap of outliers with the source layer's (Jaccard)",
}
"""What is told of every layer, before and after."""


def write_report(folder: Path) -> Path:
    """Write ``report.json`` and ``report.html`` of what is finished so far; the path of the page."""
    report = collect(folder)
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    target = folder / "report.html"
    write_whole(target, page(report))
    return target


def collect(folder: Path) -> dict[str, Any]:
    """The report of a study, JSON-ready. Losses are nats a token; lists of layers have a number for each, or null."""
    study = json.loads((folder / "study.json").read_text("utf-8"))
    before = json.loads((folder / BEFORE / RESULT).read_text("utf-8"))
    start = _attention(folder / BEFORE)
    runs = [_run(path.parent, start) for path in sorted(folder.glob(f"*/{RESULT}")) if path.parent.name != BEFORE]
    runs.sort(key=lambda run: (run["seed"], run["arm"]))
    return {
        "format": _FORMAT,
        "study": study,
        "measures": MEASURES,
        "layers": _layers(folder / BEFORE),
        "before": {"held_out": before["held_out"], "attention": start},
        "runs": runs,
        "differences": differences(runs, before["held_out"]),
        "fixed_gains": _fixed_gains(study, runs),
    }


def differences(runs: Sequence[dict[str, Any]], before: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out losses in float32 against each other: after minus before, and arm against arm of the same seed."""
    found: list[dict[str, Any]] = []

    def add(what: str, against: str, values: Sequence[float]) -> None:
        if values:
            mean, least, most = fmean(values), min(values), max(values)
            found.append(
                {"what": what, "against": against, "seeds": len(values), "mean": mean, "min": least, "max": most}
            )

    by_arm: dict[str, dict[int, float]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run["held_out"]["float32"]
    for arm, losses in by_arm.items():
        for name in ("rebalanced", "plain") if arm == "gains" else (arm,):
            against = {"plain": "plain, before training", "rebalanced": "fixed gains, before training"}[name]
            add(arm, against, [loss - before[name]["float32"] for loss in losses.values()])
    plain, rebalanced = (by_arm.get(arm, {}) for arm in ARMS)
    add("rebalanced", "plain, after training", [rebalanced[seed] - plain[seed] for seed in rebalanced if seed in plain])
    return found


def _run(folder: Path, start: dict[str, Any] | None) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / RESULT).read_text("utf-8"))
    attention = _attention(folder)
    if attention is not None and start is not None:
        kept = "plain" if result["arm"] == "plain" else "rebalanced"
        after = attention["rebalanced" if kept == "rebalanced" else "model"]
        result["attention"] = {"before": start[kept], "after": after, "after_as_plain": attention.get("model")}
    else:
        result["attention"] = None
    return result


def _attention(folder: Path) -> dict[str, Any] | None:
    """For each run of an analysis the means over heads, layer by layer."""
    if not (folder / ATTENTION).exists():
        return None
    return {run.label: _means(run) for run in AttentionReport.from_json(folder / ATTENTION).runs}


def _means(run: AttentionRun) -> dict[str, Any]:
    layers = {name: [None if value != value else value for value in run.layer_means(name)] for name in MEASURES}
    return {"layers": layers, "mean": {name: run.mean(name) for name in MEASURES}}


def _layers(folder: Path) -> list[int]:
    return list(AttentionReport.from_json(folder / ATTENTION).layers) if (folder / ATTENTION).exists() else []


def _fixed_gains(study: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[list[float]] | None:
    """The schedule that learnt gains started from, ``[L, H]``."""
    learnt = next((run["gains"] for run in runs if run["gains"] is not None), None)
    if learnt is None:
        return None
    heads = len(learnt[0])
    schedule = Rebalance.from_dict(study["config"]).layer_gains(len(learnt), heads)
    return [[0.0] * heads if gains is None else list(gains) for gains in schedule]
