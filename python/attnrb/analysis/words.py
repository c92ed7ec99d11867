"""How a report's figures and tokens are written, on pages, in notebooks and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attnrb.analysis.report import AttentionReport
from attnrb.reports.printable import printable

FACTS = {
    "first_key": "First-key share",
    "non_semantic": "On non-semantic tokens",
    "entropy": "Entropy (nats)",
    "mean_distance": "Mean distance (tokens)",
    "outliers_per_row": "Outliers per row",
    "outlier_overlap": "Overlap with source layer",
}


def unit(metric: str) -> str:
    return {"entropy": "nats", "mean_distance": "tokens", "outliers_per_row": "", "outlier_overlap": ""}.get(
        metric, "share"
    )


def figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if unit(name) == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def headline(report: AttentionReport) -> str:
    """What was found, in a sentence or two."""
    before, after = report.before, report.after
    first, silent = before.mean("first_key") or 0.0, before.mean("non_semantic") or 0.0
    words = (
        f"{capital(before.label)}, {100 * first:.1f} % of attention goes to the first token and {100 * silent:.1f} % "
        "to tokens that say nothing."
    )
    if before is after:
        return words
    moved = signed(100 * ((after.mean("first_key") or 0.0) - first), 1)
    spread = (after.mean("entropy") or 0.0) - (before.mean("entropy") or 0.0)
    how = "as spread out as before" if abs(spread) < 0.005 else f"{'less' if spread < 0 else 'more'} spread out"
    return (
        f"{words} {capital(after.label)}, the first token's share changes by {moved} points, and attention is {how} "
        f"({signed(spread, 2)} nats)."
    )


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def visible(text: str) -> str:
    """A token's text on one line, with its spaces and newlines to be seen; a long run of one of them is counted."""
    line = printable(text).replace("\n", "⏎").replace(" ", "␣")
    return re.sub(r"([⏎␣])\1{4,}", lambda run: f"{run[1]}×{len(run[0])}", line)


def ranges(layers: Sequence[int]) -> str:
    """Ascending numbers as ranges, like 3–10, 12."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return ", ".join("–".join(map(str, part)) for part in parts)
