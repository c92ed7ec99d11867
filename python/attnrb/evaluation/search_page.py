"""The page of a search: what was chosen, on held-out items, and the trials with their Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnrb.evaluation import page
from attnrb.reports.html_page import escape
from attnrb.reports.printable import printable

__all__ = ["search_page"]


def search_page(result: Mapping[str, Any]) -> str:
    """The page of what `SearchResult.to_dict` gives. Raises ImportError where plotly is missing."""
    report = result["held_out"]
    sections = page.sections(report)
    title = f"Search for {printable(report['model'])}"
    label = report["results"][-1]["arm"]
    lead = f"Chosen: <b>{escape(label)}</b>. What follows is on held-out items, which the search never saw."
    return page.whole_page(
        title, lead, [*sections[:-1], _trials(result, label), sections[-1]], report["environment"]["attnrb"]
    )


def _trials(result: Mapping[str, Any], chosen: str) -> str:
    development = result["development"]
    trials = development["trials"]
    kinds = {
        "other": [trial for trial in trials if not trial["pareto"]],
        "Pareto front": sorted((trial for trial in trials if trial["pareto"]), key=lambda trial: trial["objectives"]),
        "chosen": [trial for trial in trials if trial["label"] == chosen][:1],
    }
    styles: dict[str, dict[str, Any]] = {
        "other": {"mode": "markers", "marker": {"color": "#999999", "size": 8}},
        "Pareto front": {"mode": "lines+markers", "marker": {"color": "#0072b2", "size": 10}, "line": {"shape": "vh"}},
        "chosen": {
            "mode": "markers",
            "marker": {"color": "#d55e00", "size": 15, "symbol": "circle-open", "line": {"width": 3}},
        },
    }
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "name": kind,
            "x": [100 * trial["objectives"][0] for trial in members],
            "y": [100 * trial["objectives"][1] for trial in members],
            "text": [printable(f"{trial['number'] + 1}: {trial['label']}") for trial in members],
            "hovertemplate": "%{text}<br>%{x:.1f}, %{y:.1f}<extra></extra>",
            **styles[kind],
        }
        for kind, members in kinds.items()
    ]
    plain = development["plain"]
    traces.append(
        {
            "type": "scatter",
            "name": "plain",
            "mode": "markers",
            "x": [100 * plain[0]],
            "y": [100 * plain[1]],
            "marker": {"color": "#009e73", "size": 12, "symbol": "diamond"},
            "hovertemplate": "plain<br>%{x:.1f}, %{y:.1f}<extra></extra>",
        }
    )
    names = development["objectives"]
    layout = {
        "xaxis": {"title": {"text": f"{names[0]}, %"}},
        "yaxis": {"title": {"text": f"{names[1]}, %"}},
        "showlegend": True,
    }
    rows = [
        [
            str(trial["number"] + 1),
            trial["label"],
            str(trial["items"]),
            "yes" if trial["pareto"] else "",
            page.percent(trial["accuracy"]),
            page.percent(trial["changed"]),
        ]
        for trial in sorted(trials, key=lambda trial: (-trial["items"], -trial["accuracy"]))
    ]
    return f"""<section><h2>Trials, on the development split</h2>
<p class="soft small">The setting was chosen by these figures. Of many that are tried on the same items the best looks
better than it is, so they are not a result.</p>
{page.plot("trials", "Trials by their two objectives", traces, layout, 420)}
{page.table(["trial", "setting", "items a task", "Pareto", "accuracy", "answers changed"], rows, 2)}</section>"""
