"""An attention report as one HTML page: see `attnrb.reports.html_page`."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnrb.analysis.outlier_tokens import Sink, unusual
from attnrb.analysis.report import METRICS, AttentionReport, AttentionRun
from attnrb.analysis.rows import LARGEST, TextRows
from attnrb.analysis.words import FACTS, capital, figure, headline, ranges, unit, visible
from attnrb.reports.html_page import THEME_BUTTON, document, escape, json_block, plotly_source
from attnrb.reports.printable import printable
from attnrb.text.classes import TOKEN_CLASSES

# Colours that people with any kind of colour vision tell apart (Okabe and Ito), and that show on light and dark.
CLASS_COLOURS = dict(
    zip(TOKEN_CLASSES, ("#999999", "#cc79a7", "#e69f00", "#009e73", "#56b4e9", "#0072b2"), strict=True)
)

_MOST_BY_HEAD = 500_000  # values of single heads that a page carries unasked; beyond, it loads too slowly on a phone
_SCRIPTS = ("page", "rows", "text", "query", "charts")
_SINKS_SHOWN = 12
_EXTRA = "analysis"

_TERMS = {
    "Received attention": "The mean weight that a token receives from the queries that can see it, itself included.",
    "Expected": "What a token would receive if only its place mattered. Attention prefers what is near, and the last "
    "tokens of a text are seen from near only, so they receive much whatever they say. With v the number of queries "
    "that see a token, its like are those that v / √2 to v √2 queries see, and at least 32. Expected is read off the "
    "resistant line through ln received over ln v of these. Shades are received / expected, on a logarithmic scale, "
    "alike in all runs.",
    "Where a token looks": "A click on a token, or Enter, shows its own attention as the layer applies it: the "
    "{largest} largest weights in each head, and what all others have together. Underlined are its outliers in the "
    "source layer. Escape goes back.",
    "Non-semantic tokens": "Special tokens, whitespace and punctuation: they say nothing by themselves.",
    "Robust z-score": "How unusual received / expected is in its text, with x its logarithm: (x − median) / (1.4826 · "
    "MAD), after Iglewicz and Hoaglin. Outlier tokens exceed {z:g}.",
    "Sink": "An outlier token that takes at least 1 % of a layer's attention.",
    "First-key share": "Share of attention on the first token of the text, over all queries but the first.",
    "Entropy": "Of a query's attention, in nats: 0 where all of it is on one token.",
    "Outliers per row": "Keys other than the query's own that get more than {threshold:g} of its attention.",
    "Overlap": "Jaccard index of a layer's (query, outlier) pairs with those of layer {source}, head by head.",
    "Token classes": "special: stands for no text; whitespace: nothing but spaces, newlines and invisible characters; "
    "punctuation: punctuation and symbols; digit: numerals; function word: articles, prepositions, pronouns, "
    "conjunctions, auxiliaries; content: the rest.",
    "Re-balanced rows": "May sum to more than 1. Shares are shares of that sum; received attention is what is applied.",
}


def page(report: AttentionReport, *, served: bool = False) -> str:
    """The whole page. Raises ImportError where the extra ``analysis`` is missing.

    ``served`` says that a program answers the page's questions for single rows: see `attnrb.analysis.serve`.
    """
    title = f"Attention of {report.after.model}"
    body = f"""{_header(report)}
<main>
{_text_section(report, served)}
{_depth_section(report)}
{_class_section(report)}
{_head_section(report)}
{_sink_section(report)}
{_terms_section(report)}
</main>
<div id="tip" role="status" hidden></div>
{json_block("data", _data(report, served))}"""
    return document(
        title,
        body,
        package=__package__,
        extra=_EXTRA,
        version=report.version,
        scripts=_SCRIPTS,
        asks_server=served,
    )


def check_installed() -> None:
    """Raise ImportError where what a page needs is missing."""
    plotly_source(_EXTRA)


# ---------------------------------------------------------------------------------------------------------- the data


def _data(report: AttentionReport, served: bool) -> dict[str, Any]:
    by_head = _by_head(report)
    layers, heads = report.detail.places(report.layers, report.heads)
    rows = report.rows or (None,) * len(report.texts)
    return {
        "layers": list(report.layers),
        "heads": report.heads,
        "detail": {"layers": layers, "heads": heads, "largest": LARGEST, "served": served},
        "z_threshold": report.z_threshold,
        "metrics": {name: {"unit": unit(name)} for name in METRICS},
        "classes": [{"name": name, "colour": CLASS_COLOURS[name]} for name in TOKEN_CLASSES],
        "texts": [
            {
                "id": [token.id for token in text.tokens],
                "token": [token.text for token in text.tokens],
                "shown": [printable(token.text).replace("\n", "⏎\n") for token in text.tokens],
                "visible": [visible(token.text) for token in text.tokens],
                "token_class": [token.token_class for token in text.tokens],
                "by_head": by_head,
                "rows": _rows_data(own),
            }
            for text, own in zip(report.texts, rows, strict=True)
        ],
        "runs": [_run_data(run, (layers, heads) if by_head else None) for run in report.runs],
    }


def _rows_data(rows: TextRows | None) -> dict[str, Any] | None:
    if rows is None or not rows.queries:
        return None
    return {"queries": list(rows.queries), "runs": [packed_rows(each) for each in rows.runs]}


def packed_rows(rows: NDArray[np.uint16]) -> str:
    """What `attnrb.analysis.rows.RunKeys.pack` gives, for the page's script."""
    return base64.b64encode(rows.astype("<u2").tobytes()).decode()


def _by_head(report: AttentionReport) -> bool:
    """Whether the page carries what tokens receive in single heads: where it is little, or somebody named heads."""
    if report.detail.layers is not None or report.detail.heads is not None:
        return True
    values = sum(len(text.tokens) for text in report.texts) * len(report.layers) * report.heads * len(report.runs)
    return values <= _MOST_BY_HEAD


def _run_data(run: AttentionRun, single: tuple[list[int], list[int]] | None) -> dict[str, Any]:
    return {
        "label": printable(run.label),
        "layer_means": {name: _numbers(run.layer_means(name)) for name in METRICS},
        "by_head": {name: [_numbers(layer) for layer in run.metric(name)] for name in METRICS},
        "texts": [_received_data(received.astype(np.float64), single) for received in run.received],
    }


def _received_data(received: NDArray[np.float64], single: tuple[list[int], list[int]] | None) -> dict[str, str | None]:
    """What each token receives and its z-score; rows are the mean of all layers, then each layer.

    ``single`` names places of layers and heads that are told one by one, the mean of all layers first.
    """
    rows = np.concatenate([received.mean(0, keepdims=True), received])
    # A head that its layer has not is NaN.
    data = _with_scores("", np.nanmean(rows, axis=1))
    if single is not None:
        layers, heads = single
        data.update(_with_scores("_by_head", rows[[0, *(1 + place for place in layers)]][:, heads]))
    else:
        data.update(dict.fromkeys(("received_by_head", "z_by_head", "scale_by_head")))
    return data


def _with_scores(suffix: str, received: NDArray[np.float64]) -> dict[str, str | None]:
    scores, centre, spread = unusual(received)
    scale = np.concatenate([centre, spread], axis=-1)
    parts = {"received": received, "z": scores, "scale": scale}
    return {f"{name}{suffix}": _floats(values) for name, values in parts.items()}


def _floats(values: NDArray[np.float64]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values]


# ---------------------------------------------------------------------------------------------------------- the HTML


def _header(report: AttentionReport) -> str:
    runs = report.runs
    title = " against ".join(dict.fromkeys(escape(run.model) for run in reversed(runs)))
    settings = {
        "Text": f"{report.text_count:,} text{'s' if report.text_count > 1 else ''}, {report.token_count:,} tokens",
        "Model": f"{len(report.layers)} layers of {report.heads} heads, {report.dtype}",
        "Outliers": f"above {report.threshold:g}; source layer {report.source_layer}",
    }
    for run in runs:
        if run.config is not None:
            settings[_EDITED.get(run.config.name, capital(run.config.name))] = (
                run.config.label() if run.gains is None else _learnt(run.gains)
            )
    lines = "".join(
        f"<li><span class='soft'>{escape(name)}</span> <b>{escape(value)}</b></li>" for name, value in settings.items()
    )
    facts = "".join(_fact(report, name, what) for name, what in FACTS.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    notes = f'<ul class="notes small">{notes}</ul>' if notes else ""
    return f"""<header>
<div class="top"><div><p class="soft small">Where attention goes</p><h1>{title}</h1></div>
{THEME_BUTTON}</div>
<p class="headline">{escape(headline(report))}</p>
<div class="facts">{facts}</div>
<ul class="settings small">{lines}</ul>{notes}
</header>"""


_EDITED = {"rebalance": "Re-balanced", "learned_gains": "Re-balanced"}
"""What a page calls a run, by its policy."""


def _learnt(gains: NDArray[np.float64]) -> str:
    return f"gains learnt, {gains.min():.2f} to {gains.max():.2f}"


def _fact(report: AttentionReport, name: str, what: str) -> str:
    values = [figure(name, run.mean(name)) for run in dict.fromkeys((report.before, report.after))]
    value = f"<small>{values[0]} → </small>{values[1]}" if len(values) == 2 else values[0]
    return f'<div class="fact"><div class="name">{what}</div><div class="value">{value}</div></div>'


def _change_title(report: AttentionReport) -> str:
    return f"Change, {report.before.label} to {report.after.label}"


def _text_section(report: AttentionReport, served: bool) -> str:
    if not report.texts:
        return ""
    pick = ""
    if len(report.texts) > 1:
        options = "".join(
            f'<option value="{place}">{escape(text.name)} ({len(text.tokens):,} tokens)</option>'
            for place, text in enumerate(report.texts)
        )
        pick = f'<label>Text <select id="which-text">{options}</select></label>'
    which = ""
    if len(report.runs) > 1:
        labels = [*((str(place), run.label) for place, run in enumerate(report.runs)), ("change", "change")]
        buttons = "".join(
            f'<label><input type="radio" name="which" value="{value}"{" checked" if value == "0" else ""}>'
            f"<span>{escape(label)}</span></label>"
            for value, label in labels
        )
        which = (
            f'<fieldset id="which"><legend hidden>What to show</legend><div class="choice">{buttons}</div></fieldset>'
        )
    _, shown = report.detail.places(report.layers, report.heads)
    heads = "".join(f'<option value="{head}">head {head}</option>' for head in shown)
    return f"""<section aria-labelledby="text-title">
<h2 id="text-title">The text</h2>
<p class="soft small">Each token is shaded by how many times the attention it receives that tokens in its place are
expected to. Hover, tap, or use the arrow keys in the text for exact values; <kbd>n</kbd> and <kbd>p</kbd> go to the
next and previous outlier.</p>
<div class="controls screen">
<label class="wide">Layer <input type="range" id="layer" min="0" max="{len(report.layers)}" value="0" step="1">
<output id="layer-name" for="layer">all layers</output></label>
<label>Head <select id="head"><option value="-1">all heads</option>{heads}</select></label>
<span id="no-heads" class="soft small" hidden>A page this long leaves out what tokens receive in single heads;
<code>--heads</code> and <code>--layers</code> choose some, and the JSON report has all.</span>
{which}{pick}
</div>
<div class="legend"><span id="low"></span><span id="scale" class="scale level"></span><span id="high"></span>
<span class="outlined" id="mark-means">outlier token</span>
<button type="button" class="screen" id="save-received">Save data</button></div>
<div id="text" tabindex="0" role="group" aria-label="The text, shaded by received attention" dir="auto"></div>
{_query_section(report, served)}</section>"""


def _query_section(report: AttentionReport, served: bool) -> str:
    """Where one token looks; empty where there is a row of no token."""
    kept = [rows for rows in report.rows if rows is not None and rows.queries]
    if not kept and not served:
        return ""
    every = served or all(
        rows is not None and len(rows.queries) == len(text.tokens)
        for rows, text in zip(report.rows, report.texts, strict=True)
    )
    count = max((len(rows.queries) for rows in kept), default=0)
    some = (
        ""
        if every
        else f" This file has the rows of {count} tokens, dotted in the text: the last, and those with most "
        "attention on outliers of the source layer. <kbd>]</kbd> and <kbd>[</kbd> go from one to the next. "
        "<code>attnrb analyze --serve</code> has all."
    )
    runs = "".join(f'<th class="number">{escape(run.label)}</th>' for run in report.runs)
    change = '<th class="number">change</th>' if len(report.runs) > 1 else ""
    missing = (
        "The program that served this page does not answer."
        if served
        else ("This file does not have the row of this token. Dotted tokens have one; attnrb analyze --serve has all.")
    )
    return f"""<p class="soft small" id="query-hint">Click a token, or press Enter on it, to see where it
looks.{some}</p>
<div id="query" hidden aria-live="polite">
<div class="controls screen"><h3>Where <code id="query-name"></code> looks</h3>
<span class="soft small" id="query-place"></span>
<button type="button" id="query-back">Back to what tokens receive</button></div>
<p class="soft small" id="query-missing" data-words="{escape(missing)}" hidden></p>
<div id="query-there" class="plots"><div><p class="small" id="query-what"></p><div class="scroll" tabindex="0"><table>
<thead><tr><th>token</th><th class="number">position</th>{runs}{change}</tr></thead>
<tbody id="query-keys"></tbody></table></div></div>
<div><h3>The largest weight of each head</h3><p class="soft small">A click goes to that layer and head.</p>
<div class="plot tall" id="query-heads" role="img"
aria-label="Largest weight of this token in each layer and head"></div>
</div></div></div>
"""


def _run_legend(report: AttentionReport) -> str:
    if len(report.runs) == 1:
        return ""
    items = "".join(
        f'<span><span class="swatch" style="background:var(--run-{place})"></span>{escape(run.label)}</span>'
        for place, run in enumerate(report.runs)
    )
    return f'<div class="legend">{items}</div>'


def _depth_section(report: AttentionReport) -> str:
    plots = "".join(
        f'<div><h3>{what}</h3><div class="plot depth" data-metric="{name}" role="img" '
        f'aria-label="{escape(METRICS[name])}, by layer"></div></div>'
        for name, what in FACTS.items()
    )
    bars = f" The bars below are the {escape(_change_title(report).lower())}." if len(report.runs) > 1 else ""
    return f"""<section><h2>Over the layers</h2><p class="soft small">Means over the heads of each layer.{bars}</p>
{_run_legend(report)}<div class="plots">{plots}</div></section>"""


def _class_section(report: AttentionReport) -> str:
    legend = "".join(
        f'<span><span class="swatch" style="background:{CLASS_COLOURS[name]}"></span>{name.replace("_", " ")}</span>'
        for name in TOKEN_CLASSES
    )
    plots = "".join(
        f'<div><h3>{escape(capital(run.label))}</h3><div class="plot classes" data-run="{place}" role="img" '
        'aria-label="Share of attention on each class of tokens, by layer"></div></div>'
        for place, run in enumerate(report.runs)
    )
    if len(report.runs) > 1:
        plots += (
            f"<div><h3>{escape(_change_title(report))}</h3>"
            '<div class="plot classes" data-run="change" role="img" '
            'aria-label="Change of the share of each class of tokens, by layer"></div></div>'
        )
    head = "".join(f'<th class="number">attention, {escape(run.label)}</th>' for run in report.runs)
    rows = "".join(
        f'<tr><td>{name.replace("_", " ")}</td><td class="number">{report.class_counts[name]:,}</td>'
        f'<td class="number">{100 * report.class_counts[name] / report.token_count:.1f} %</td>'
        + "".join(f'<td class="number">{figure("share", run.mean(f"token_class.{name}"))}</td>' for run in report.runs)
        + "</tr>"
        for name in TOKEN_CLASSES
    )
    return f"""<section><h2>Classes of tokens</h2><p class="soft small">Which share of attention goes to which class, in
each layer, and over all layers beside the class's share of the tokens.</p>
<div class="legend">{legend}</div><div class="plots">{plots}</div>
<div class="scroll"><table>
<thead><tr><th>class</th><th class="number">tokens</th><th class="number">of all</th>{head}</tr></thead>
<tbody>{rows}</tbody></table></div></section>"""


def _head_section(report: AttentionReport) -> str:
    options = "".join(f'<option value="{name}">{escape(what)}</option>' for name, what in METRICS.items())
    labels = [(str(place), capital(run.label)) for place, run in enumerate(report.runs)]
    if len(labels) > 1:
        labels.append(("change", _change_title(report)))
    plots = "".join(
        f'<div><h3>{escape(label)}</h3><div class="plot tall head-map" data-run="{value}" role="img" '
        'aria-label="Heat map of layers and heads"></div></div>'
        for value, label in labels
    )
    return f"""<section><h2>Layers and heads</h2>
<div class="controls screen"><label>Quantity <select id="metric">{options}</select></label></div>
<div class="plots heads">{plots}</div></section>"""


def _sink_section(report: AttentionReport) -> str:
    tables = "".join(_sink_table(report, place, run) for place, run in enumerate(report.runs))
    return f"""<section><h2>Sinks</h2><p class="soft small">Tokens on which attention collapses: outliers that take at
least 1 % of a layer's attention. The first token of a text is counted apart.</p>{tables}</section>"""


def _sink_table(report: AttentionReport, place: int, run: AttentionRun) -> str:
    caption = f"<caption>{escape(capital(run.label))}</caption>" if len(report.runs) > 1 else ""
    if not run.sinks:
        return f"<p>{escape(capital(run.label))}: none.</p>"
    rows = "".join(_sink_row(sink, place, hidden=number >= _SINKS_SHOWN) for number, sink in enumerate(run.sinks))
    more = ""
    if len(run.sinks) > _SINKS_SHOWN:
        more = f'<button type="button" class="more screen" data-run="{place}">Show all {len(run.sinks)}</button>'
    return f"""<div class="scroll"><table>{caption}<thead><tr><th>token</th><th>layers</th>
<th class="number">peak share</th><th class="number">at layer</th><th>class</th><th class="number">places</th>
<th>position</th><th class="number">z-score</th></tr></thead><tbody>{rows}</tbody></table></div>{more}"""


def _sink_row(sink: Sink, place: int, *, hidden: bool) -> str:
    where = "first" if sink.is_first else ", ".join(map(str, sink.positions[:4]))
    if not sink.is_first and len(sink.positions) > 4:
        where += ", …"
    attributes = f' class="more" data-run="{place}" hidden' if hidden else ""
    return f"""<tr{attributes}><td class="token"><code>{escape(visible(sink.text))}</code></td>
<td class="layers">{ranges(sink.layers)}</td><td class="number">{100 * sink.peak_share:.1f} %</td>
<td class="number">{sink.peak_layer}</td><td>{sink.token_class.replace("_", " ")}</td>
<td class="number">{sink.count:,}</td><td>{where}</td><td class="number">{sink.z_score:.1f}</td></tr>"""


def _terms_section(report: AttentionReport) -> str:
    numbers = {
        "largest": LARGEST,
        "z": report.z_threshold,
        "threshold": report.threshold,
        "source": report.source_layer,
    }
    terms = "".join(f"<dt>{name}</dt><dd>{escape(what.format(**numbers))}</dd>" for name, what in _TERMS.items())
    return f"""<section><details open><summary>What the words mean</summary>
<dl class="terms small">{terms}</dl></details></section>"""
