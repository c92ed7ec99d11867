"""A report as one HTML page that needs nothing else: styles, scripts, data and the plotting library are in it.

Everything that comes from a run is escaped, or stands in blocks of JSON that no character can end. A content security
policy allows the two scripts by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from attnrb.evaluation.report import METHODS, one_letter
from attnrb.printable import printable

__all__ = [
    "check_installed",
    "document",
    "escape",
    "letter_notes",
    "page",
    "percent",
    "plot",
    "sections",
    "sentence",
    "table",
]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INSTALL = "pip install 'attnrb[eval]'"


def check_installed() -> None:
    """Raise ImportError where what a page needs is missing."""
    _plotly()


def page(report: Mapping[str, Any]) -> str:
    """The page of what `Report.to_dict` gives. Raises ImportError where plotly is missing."""
    title = f"Evaluation of {printable(report['model'])}"
    lead = (
        f"{report['answers']:,} answers, {escape(report['dtype'])} on {escape(report['device'])}, "
        f"seed {report['seed']}. Plain is the model as it is."
    )
    return document(title, lead, sections(report), report["environment"]["attnrb"])


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


def document(title: str, lead: str, parts: Sequence[str], version: str) -> str:
    """A whole page around its parts; `lead` and parts are HTML, the rest is text."""
    here = importlib.resources.files(__package__)
    plotly, script, style = (
        _plotly(),
        here.joinpath("page.js").read_text("utf-8"),
        here.joinpath("page.css").read_text("utf-8"),
    )
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="soft">{lead}</p></header>
<main>
{"".join(parts)}
</main>
<footer class="small soft">Made by attnrb {escape(version)}. This page is complete: it loads nothing.</footer>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def plot(name: str, label: str, data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], height: int) -> str:
    """A picture, named `name` on its page and `label` for who cannot see it."""
    spec = json.dumps({"data": data, "layout": {**layout, "height": height}}, allow_nan=False)
    spec = spec.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        f'<div class="plot" data-spec="{name}" role="img" aria-label="{escape(label)}"></div>'
        f'<script type="application/json" id="{name}">{spec}</script>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table of texts, whose columns from `numbers` on stand to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        parts = [
            f"<{tag}{' class=number' if place >= numbers else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{cells("th", head)}</thead><tbody>{body}</tbody></table></div>'


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
    return (
        f"{name}, {label}: {arm} {found}: {points(each['difference'])} [{points(low)}, {points(high)}] points, "
        f"{percent(each['plain'])} to {percent(each['rebalanced'])} of {each['items']:,} items, corrected p = "
        f"{each['holm']:.2g}{needed}"
    )


def letter_notes(report: Mapping[str, Any]) -> list[str]:
    """A warning for each accuracy that tells of one letter rather than of the questions."""
    return [
        f"{name}, {result['label']}: {result['arm']} answers {letter} to {each['answers'][letter]:,} of "
        f"{each['items']:,} items, so its accuracy tells how often that is right, and little of the questions"
        for result in report["results"]
        for name, each in result["groups"].items()
        if (letter := one_letter(each)) is not None
    ]


def points(value: float) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def escape(value: object) -> str:
    """Text as HTML."""
    return html.escape(printable(str(value)))


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"the HTML report needs the package plotly: run `{_INSTALL}`") from error
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")  # which would end the script in a page


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _summary(report: Mapping[str, Any], notes: Sequence[str]) -> str:
    lines = [
        f"<li>{escape(sentence(name, each, pair['arm'], pair['label']))}</li>"
        for pair in report["differences"]
        for name, each in pair["groups"].items()
    ]
    noted = "".join(f"<p class='soft small'>{escape(note)}.</p>" for note in notes)
    found = "".join(lines) or "<li>Nothing was compared.</li>"
    return f"<section><h2>What was found</h2><ul>{found}</ul>{noted}</section>"


def _differences(report: Mapping[str, Any]) -> str:
    traces, rows = [], []
    names: list[str] = []
    for place, pair in enumerate(report["differences"]):
        label = f"{pair['arm']}, {pair['label']}"
        groups = pair["groups"]
        names += [name for name in groups if name not in names]
        differences = [100 * each["difference"] for each in groups.values()]
        bounds = [[100 * bound for bound in each["bootstrap"]] for each in groups.values()]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": printable(label),
                "x": differences,
                "y": list(groups),
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - at for at, (_, high) in zip(differences, bounds, strict=True)],
                    "arrayminus": [at - low for at, (low, _) in zip(differences, bounds, strict=True)],
                },
                "marker": {"size": 9, "color": COLOURS[place % len(COLOURS)]},
                "hovertemplate": "%{y}: %{x:+.2f} points<extra>%{fullData.name}</extra>",
            }
        )
        rows += [_difference_row(pair, name, each) for name, each in groups.items()]
    if not rows:
        return ""
    height = 110 + 24 * len(names) * len(traces) // 2 + 26 * len(names)
    layout = {
        "xaxis": {"title": {"text": "percentage points, re-balanced less plain"}, "zeroline": True},
        "yaxis": {"autorange": "reversed"},
        "scattermode": "group",
        "showlegend": True,
    }
    head = [
        "group",
        "model",
        "asked",
        "items",
        "plain",
        "re-balanced",
        "points",
        "95 %",
        "lost",
        "won",
        "McNemar p",
        "Holm p",
    ]
    return f"""<section><h2>Differences</h2>
<p class="soft small">With the interval of the paired bootstrap. Lost and won are the items that one of the two alone
got right. A difference is called one only where its interval excludes 0 and its corrected p is below 0.05.</p>
{plot("differences", "Differences by group", traces, layout, height)}
{table(head, rows, 3)}</section>"""


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
        for place, arm in enumerate(dict.fromkeys(each["arm"] for each in thought)):
            line = [each for each in thought if each["arm"] == arm and name in each["groups"]]
            shares = [100 * each["groups"][name]["accuracy"] for each in line]
            bounds = [[100 * bound for bound in each["groups"][name]["wilson"]] for each in line]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": printable(arm),
                    "x": [each["computed_tokens"]["mean"] for each in line],
                    "y": shares,
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": [high - at for at, (_, high) in zip(shares, bounds, strict=True)],
                        "arrayminus": [at - low for at, (low, _) in zip(shares, bounds, strict=True)],
                    },
                    "line": {"color": COLOURS[place % len(COLOURS)]},
                    "hovertemplate": "%{x:.0f} tokens: %{y:.1f} %<extra>%{fullData.name}</extra>",
                }
            )
        layout = {
            "xaxis": {"title": {"text": "computed tokens, mean"}},
            "yaxis": {"title": {"text": "accuracy, %"}},
            "showlegend": True,
        }
        pictures.append(f"<h3>{escape(name)}</h3>{plot(f'budget-{number}', f'{name}: accuracy', traces, layout, 320)}")
    return f"<section><h2>Accuracy against computed tokens</h2>{''.join(pictures)}</section>"


def _accuracies(report: Mapping[str, Any]) -> str:
    traces, rows = [], []
    for place, result in enumerate(report["results"]):
        shares = [100 * each["accuracy"] for each in result["groups"].values()]
        bounds = [[100 * bound for bound in each["wilson"]] for each in result["groups"].values()]
        traces.append(
            {
                "type": "bar",
                "name": printable(f"{result['arm']}, {result['label']}"),
                "x": list(result["groups"]),
                "y": shares,
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - at for at, (_, high) in zip(shares, bounds, strict=True)],
                    "arrayminus": [at - low for at, (low, _) in zip(shares, bounds, strict=True)],
                },
                "marker": {"color": COLOURS[place % len(COLOURS)]},
                "hovertemplate": "%{x}: %{y:.1f} %<extra>%{fullData.name}</extra>",
            }
        )
        rows += [_accuracy_row(result, name, each) for name, each in result["groups"].items()]
    layout = {
        "barmode": "group",
        "yaxis": {"title": {"text": "accuracy, %"}, "rangemode": "tozero"},
        "showlegend": True,
    }
    head = ["group", "model", "asked", "items", "right", "accuracy", "95 %", "no answer", "computed tokens"]
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
        "" if tokens is None else f"{tokens:.0f}",
    ]


def _subjects(report: Mapping[str, Any]) -> str:
    rows = [
        _accuracy_row(result, name.removeprefix("mmlu_").replace("_", " "), each)
        for result in report["results"]
        for name, each in result["subjects"].items()
    ]
    if not rows:
        return ""
    head = ["subject", "model", "asked", "items", "right", "accuracy", "95 %", "no answer", "computed tokens"]
    return f"<section><details><summary>Single subjects</summary>{table(head, rows, 3)}</details></section>"


def _repeat(report: Mapping[str, Any]) -> str:
    command = shlex.join(report["environment"]["command"])
    shown = {name: report[name] for name in report if name not in ("results", "differences", "correction", "methods")}
    methods = "".join(f"<li><b>{escape(name)}</b>: {escape(what)}</li>" for name, what in METHODS.items())
    return f"""<section><h2>To repeat it</h2><pre><code>{escape(command)}</code></pre>
<details><summary>Methods</summary><ul class="small">{methods}</ul></details>
<details><summary>Settings, versions, machine, files</summary>
<pre>{escape(json.dumps(shown, indent=2, ensure_ascii=False))}</pre></details></section>"""
