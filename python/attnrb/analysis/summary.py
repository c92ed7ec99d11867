"""What a report shows of itself in a notebook."""

from __future__ import annotations

import numpy as np

from attnrb.analysis.outlier_tokens import unusual
from attnrb.analysis.report import AttentionReport
from attnrb.analysis.words import FACTS, figure, headline, ranges, visible
from attnrb.reports.fragment import fragment, rows_table, shaded
from attnrb.reports.printable import printable

__all__ = ["summary"]

_TOKENS = 300
_SINKS = 5


def summary(report: AttentionReport) -> str:
    """HTML without a script: the means, the strongest sinks, and the first text, shaded as on the page."""
    runs = report.runs
    title = f"Attention of {report.after.model}: {report.token_count:,} tokens"
    means = [[what, *(figure(name, run.mean(name)) for run in runs)] for name, what in FACTS.items()]
    sinks = [
        [visible(sink.text), ranges(sink.layers), f"{100 * sink.peak_share:.1f} %", str(sink.peak_layer)]
        for sink in report.before.sinks[:_SINKS]
    ]
    parts = [rows_table(["mean of all layers and heads", *(run.label for run in runs)], means)]
    if sinks:
        parts.append(rows_table(["sink", "layers", "peak share", "at layer"], sinks))
    if report.texts:
        parts.append(_text(report))
    return fragment(title, headline(report), *parts)


def _text(report: AttentionReport) -> str:
    tokens = report.texts[0].tokens[:_TOKENS]
    received = np.nanmean(report.before.received[0].astype(np.float64), axis=(0, 1))
    scores, centre, spread = unusual(received)
    logarithms = scores * spread + centre
    most = max(float(logarithms.max()), 0.01)
    pieces = [
        (printable(token.text), float(np.clip(logarithms[place] / most, 0, 1)), scores[place] > report.z_threshold)
        for place, token in enumerate(tokens)
    ]
    rest = len(report.texts[0].tokens) - len(tokens)
    more = f"<p>and {rest:,} tokens more; to_html has all</p>" if rest else ""
    return f"{shaded(pieces)}{more}"
