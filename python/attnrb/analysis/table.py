"""An attention report as rows of a table, one for each run, layer and head."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnrb.analysis.report import AttentionReport, AttentionRun

__all__ = ["as_csv", "rows"]


def rows(report: AttentionReport) -> list[dict[str, Any]]:
    """See `AttentionReport.to_rows`."""
    from attnrb.analysis.report import METRICS  # which imports this module

    def figures(run: AttentionRun, place: int, head: int) -> dict[str, float | None]:
        values = {name: float(run.metric(name)[place, head]) for name in METRICS}
        return {name: None if math.isnan(value) else value for name, value in values.items()}

    return [
        {"run": run.label, "layer": layer, "head": head, **figures(run, place, head)}
        for run in report.runs
        for place, layer in enumerate(report.layers)
        for head in range(report.heads)
    ]


def as_csv(report: AttentionReport) -> str:
    """See `AttentionReport.to_csv`."""
    found = rows(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
