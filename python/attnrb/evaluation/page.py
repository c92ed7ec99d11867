"""An evaluation as one HTML page: see `attnrb.reports.html_page`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from attnrb.evaluation.report import METHODS, headline, one_letter
from attnrb.reports.html_page import THEME_BUTTON, document, escape, json_block, plotly_source
from attnrb.reports.printable import printable

__all__ = [
    "check_installed",
    "letter_notes",
    "page",
    "percent",
    "plot",
    "sections",
    "sentence",
    "table",
    "whole_page",
]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_EXTRA = "eval"
_ACCURACY_HEAD = (
    *("model", "prompt", "questions", "right answers", "accuracy", "95 % interval"),
    *("without an answer", "computed tokens, mean"),
)


def check_installed() -> None:
    """Raise ImportError where what a page needs is missing."""
    plotly_source(_EXTRA)


def page(report: Mapping[str, Any]) -> str:
    """The page of what `Report.to_dict` gives. Raises ImportError where plotly is missing."""
    title = f"Evaluation of {printable(report['model'])}"
    lead = (
        f"{report['answers']:,} answers, {escape(report['dtype'])} on {escape(report['device'])}, "
        f"seed {report['seed']}. Plain is the model without any edit."
    )
    return whole_page(title, lead, sections(report), report["environment"]["attnrb"])


def sections(report: Mapping[str, Any]) -> list[str]:
    """The parts of the page of a report, how to repeat it last."""
    notes = {f"{name}: {about['note']}" for name, about in report["tasks"].items() if about.get("note")}
    return [
        _summary(report, [*sorted(notes), *letter_notes(report)]),
        _differences(report),
        _budgets(report),
        _accuracies(report),
        _subjects(report),
        _repeat(report),
    ]


def whole_page(title: str, lead: str, parts: Sequence[str], version: str) -> str:
    """A page around its parts; `lead` and parts are HTML, the rest is text."""
    body = f"""<header><div class="top"><div><h1>{escape(title)}</h1><p class="soft">{lead}</p></div>
{THEME_BUTTON}</div></header>
<main>
{"".join(parts)}
</main>"""
    return document(title, body, package=__package__, extra=_EXTRA, version=version)


def plot(name: str, label: str, data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], height: int) -> str:
    """A picture, named `name` on its page and `label` for who cannot see it."""
    picture = f'<div class="plot" data-spec="{name}" role="img" aria-label="{escape(label)}"></div>'
    return picture + json_block(name, {"data": data, "layout": {**layout, "height": height}})


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table of texts, whose columns from `numbers` on stand to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        parts = [
            f"<{tag}{' class=number' if place >= numbers else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{cells("th", head)}</thead><tbody>{body}</tbody></table></div>'
    )


def sentence(name: str, each: Mapping[str, Any], arm: str, label: str) -> str:
    """One difference in words."""
    low, high = each["bootstrap"]
    found = {
        "improves": "improves accuracy",
        "worsens": "worsens accuracy",
        "no difference shown": "shows no difference in accuracy",
    }[each["verdict"]]
    needed = ""
    if not each["mcnemar"]["only_plain"] and not each["mcnemar"]["only_rebalanced"]:
        needed = "; both are right on the same items, so nothing is known of how small a difference may be"
    elif each["verdict"] == "no difference shown" and each["needed_items"]:
        needed = f"; {each['needed_items']:,} items would be needed to see one of this size"
    items = f"{each['items']:,} item{'' if each['items'] == 1 else 's'}"
    return (
        f"{name}, {label}: {arm} {found}: {points(each['difference'])} [{points(low)}, {points(high)}] points, "
        f"{percent(each['plain'])} to {percent(each['rebalanced'])} of {items}, corrected p = "
        f"{each['holm']:.2g}{needed}"
    )


def letter_notes(report: Mapping[str, Any]) -> list[str]:
    """A warning for each model and way of asking whose accuracies tell of one letter rather than of the questions."""
    notes = []
    for result in report["results"]:
        groups: dict[str, list[str]] = {}
        for name, each in result["groups"].items():
            if (letter := one_letter(each)) is not None:
                groups.setdefault(letter, []).append(f"{each['answers'][letter]:,} of {each['items']:,} in {name}")
        notes += [
            f"{result['arm']}, {result['label']}, answers {letter} to nearly everything ({', '.join(counts)}), so "
            f"that these accuracies tell how often {letter} is right, and little of the questions"
            for letter, counts in groups.items()
        ]
    return notes


def points(value: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def _summary(report: Mapping[str, Any], notes: Sequence[str]) -> str:
    lines = [
        f"<li>{escape(sentence(name, each, pair['arm'], pair['label']))}</li>"
        for pair in report["differences"]
        for name, each in pair["groups"].items()
    ]
    noted = "".join(f"<p class='soft small'>{escape(note)}.</p>" for note in notes)
    details = f"<details><summary>Each in words</summary><ul>{''.join(lines)}</ul></details>" if lines else ""
    return f"""<section><h2>What was found</h2><p class="headline">{escape(headline(report["differences"]))}</p>
{details}{noted}</section>"""


def _differences(report: Mapping[str, Any]) -> str:
    pairs = report["differences"]
    rows = [_difference_row(pair, name, each) for pair in pairs for name, each in pair["groups"].items()]
    if not rows:
        return ""
    traces: list[dict[str, Any]] = []
    for arm, colour in _colours(report).items():
        found = [
            (pair["label"], name, each) for pair in pairs if pair["arm"] == arm for name, each in pair["groups"].items()
        ]
        if not found:
            continue
        differences = [100 * each["difference"] for _, _, each in found]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "orientation": "h",  # several models share a row, side by side
                "name": printable(arm),
                "x": differences,
                "y": _categories([(name, label) for label, name, _ in found]),
                "error_x": _error_bars(differences, [each["bootstrap"] for _, _, each in found]),
                "marker": {"size": 9, "color": colour},
                "hovertemplate": "%{y}: %{x:+.2f} points<extra>%{fullData.name}</extra>",
            }
        )
    lines = len(rows) // len(traces)
    layout = {
        "xaxis": {"title": {"text": "change of accuracy, percentage points"}, "zeroline": True},
        "yaxis": {"autorange": "reversed"},
        "scattermode": "group",
        "showlegend": True,
    }
    head = [
        *("tasks", "model", "prompt", "questions", "plain right", "edited right", "change, points", "95 % interval"),
        *("only plain right", "only edited right", "p (McNemar)", "p (Holm)"),
    ]
    return f"""<section><h2>Differences</h2>
<p class="soft small">Right answers of the edited model less those of the plain one, with the interval of the paired
bootstrap. Only the questions that one of the two alone got right tell them apart. A difference is called one only where
its interval excludes 0 and its corrected p is below 0.05.</p>
{plot("differences", "Differences by group", traces, layout, 130 + lines * (20 + 14 * len(traces)))}
{table(head, rows, 3)}</section>"""


def _colours(report: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each model, the same in every picture; the plain one is the first."""
    arms = dict.fromkeys(result["arm"] for result in report["results"])
    return {arm: COLOURS[place % len(COLOURS)] for place, arm in enumerate(arms)}


def _categories(names: Sequence[tuple[str, str]]) -> Any:
    """An axis of groups, each split into ways of asking where there are several."""
    groups, labels = [printable(group) for group, _ in names], [printable(label) for _, label in names]
    return groups if len(set(labels)) == 1 else [groups, labels]


def _error_bars(percentages: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """From each percentage to the ends of its interval, which is of shares."""
    ends = list(zip(percentages, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * high - at for at, (_, high) in ends],
        "arrayminus": [at - 100 * low for at, (low, _) in ends],
    }


def _difference_row(pair: Mapping[str, Any], name: str, each: Mapping[str, Any]) -> list[str]:
    low, high = each["bootstrap"]
    counts = each["mcnemar"]
    return [
        name,
        pair["arm"],
        pair["label"],
        f"{each['items']:,}",
        percent(each["plain"]),
        percent(each["rebalanced"]),
        points(each["difference"]),
        f"{points(low)} to {points(high)}",
        f"{counts['only_plain']:,}",
        f"{counts['only_rebalanced']:,}",
        f"{counts['p']:.3g}",
        f"{each['holm']:.3g}",
    ]


def _budgets(report: Mapping[str, Any]) -> str:
    """Accuracy against computed tokens, where there is more than one budget."""
    thought = [each for each in report["results"] if each["prompting"] == "cot" and each["groups"]]
    if len({tuple(each["budget"]) for each in thought}) < 2:
        return ""
    pictures = []
    for number, name in enumerate(dict.fromkeys(name for each in thought for name in each["groups"])):
        traces = []
        for arm, colour in _colours(report).items():
            line = [each for each in thought if each["arm"] == arm and name in each["groups"]]
            shares = [100 * each["groups"][name]["accuracy"] for each in line]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": printable(arm),
                    "x": [each["computed_tokens"]["mean"] for each in line],
                    "y": shares,
                    "error_y": _error_bars(shares, [each["groups"][name]["wilson"] for each in line]),
                    "line": {"color": colour},
                    "hovertemplate": "%{x:.0f} tokens: %{y:.1f} %<extra>%{fullData.name}</extra>",
                }
            )
        layout = {
            "xaxis": {"title": {"text": "computed tokens, mean"}, "zeroline": False},
            "yaxis": {"title": {"text": "accuracy, %"}},
            "showlegend": True,
        }
        pictures.append(f"<h3>{escape(name)}</h3>{plot(f'budget-{number}', f'{name}: accuracy', traces, layout, 320)}")
    return f"<section><h2>Accuracy against computed tokens</h2>{''.join(pictures)}</section>"


def _accuracies(report: Mapping[str, Any]) -> str:
    traces, rows = [], []
    for arm, colour in _colours(report).items():
        results = [result for result in report["results"] if result["arm"] == arm]
        found = [(result["label"], name, each) for result in results for name, each in result["groups"].items()]
        shares = [100 * each["accuracy"] for _, _, each in found]
        traces.append(
            {
                "type": "bar",
                "name": printable(arm),
                "x": _categories([(name, label) for label, name, _ in found]),
                "y": shares,
                "error_y": _error_bars(shares, [each["wilson"] for _, _, each in found]),
                "marker": {"color": colour},
                "hovertemplate": "%{x}: %{y:.1f} %<extra>%{fullData.name}</extra>",
            }
        )
        rows += [_accuracy_row(result, name, each) for result in results for name, each in result["groups"].items()]
    layout = {
        "barmode": "group",
        "yaxis": {"title": {"text": "accuracy, %"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    head = ["tasks", *_ACCURACY_HEAD]
    return f"""<section><h2>Accuracies</h2><p class="soft small">With Wilson intervals.</p>
{plot("accuracies", "Accuracies by group", traces, layout, 380)}
{table(head, rows, 3)}</section>"""


def _accuracy_row(result: Mapping[str, Any], name: str, each: Mapping[str, Any]) -> list[str]:
    low, high = each["wilson"]
    tokens = result["computed_tokens"]["mean"]
    return [
        name,
        result["arm"],
        result["label"],
        f"{each['items']:,}",
        f"{each['correct']:,}",
        percent(each["accuracy"]),
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{each['no_answer']:,}",
        "" if tokens is None or result["budget"] is None else f"{tokens:.0f}",
    ]


def _subjects(report: Mapping[str, Any]) -> str:
    rows = [
        _accuracy_row(result, name.removeprefix("mmlu_").replace("_", " "), each)
        for result in report["results"]
        for name, each in result["subjects"].items()
    ]
    if not rows:
        return ""
    head = ["subject", *_ACCURACY_HEAD]
    return f"<section><details><summary>Single subjects</summary>{table(head, rows, 3)}</details></section>"


def _repeat(report: Mapping[str, Any]) -> str:
    command = shlex.join(report["environment"]["command"])
    shown = {name: report[name] for name in report if name not in ("results", "differences", "correction", "methods")}
    methods = "".join(f"<li><b>{escape(name)}</b>: {escape(what)}</li>" for name, what in METHODS.items())
    return f"""<section><h2>To repeat it</h2><pre><code>{escape(command)}</code></pre>
<details><summary>Methods</summary><ul class="small">{methods}</ul></details>
<details><summary>Settings, versions, machine, files</summary>
<pre>{escape(json.dumps(shown, indent=2, ensure_ascii=False))}</pre></details></section>"""
