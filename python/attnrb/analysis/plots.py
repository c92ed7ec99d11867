"""The report's figures, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnrb.analysis.report import METRICS, AttentionReport
from attnrb.reports.files import write_whole
from attnrb.reports.printable import printable
from attnrb.text.classes import TOKEN_CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_LABELLED = 60  # tokens up to which each is named on its axis
_DEPTH = ("first_key", "non_semantic", "entropy", "mean_distance", "outliers_per_row", "outlier_overlap")
_HEADS = ("first_key", "non_semantic", "entropy", "outlier_overlap")
_SHARES = ("first_key", "non_semantic", "outlier_share")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of panels that belongs to no window, so that none needs closing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plots need the package matplotlib: run `pip install 'attnrb[analysis]'`") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def check_installed() -> None:
    """Raise ImportError where matplotlib is missing."""
    _figure(1, 1, 1, 1)


def depth(report: AttentionReport, metrics: Sequence[str]) -> Figure:
    """See `AttentionReport.plot_depth`. Raises ValueError for a metric that there is not."""
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics: expected a list of names, got {metrics!r}")
    columns = min(3, len(metrics))
    figure, panels = _figure(math.ceil(len(metrics) / columns), columns, 4.2, 3.0)
    for panel in panels.flat[len(metrics) :]:
        panel.set_axis_off()
    for panel, metric in zip(panels.flat, metrics, strict=False):
        for place, run in enumerate(report.runs):
            style = "-" if place == 0 else "--"
            means = run.layer_means(metric)
            panel.plot(report.layers, means, style, marker=".", label=_literal(run.label), color=_RUN_COLOURS[place])
        panel.set_title(_wrapped(METRICS[metric]), fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        if metric in _SHARES or metric.startswith("token_class"):
            panel.yaxis.set_major_formatter(_percent())
    if len(report.runs) > 1:
        panels.flat[0].legend(frameon=False)
    return figure


def heads(report: AttentionReport, metric: str) -> Figure:
    """See `AttentionReport.plot_heads`."""
    values = [run.metric(metric) for run in report.runs]
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    height = max(2.6, 0.16 * len(report.layers) + 0.9)
    figure, panels = _figure(1, len(values), max(2.8, 0.2 * report.heads + 1.6), height)
    for panel, run, each in zip(panels.flat, report.runs, values, strict=True):
        image = panel.imshow(each, origin="lower", aspect="auto", vmin=0, vmax=top or 1, cmap="YlGnBu")
        panel.set_title(_literal(run.label), fontsize=10)
        panel.set_xlabel("head")
        panel.set_ylabel("layer")
        _label_layers(panel, report)
    figure.colorbar(image, ax=list(panels.flat), label=METRICS[metric])
    return figure


def token_classes(report: AttentionReport) -> Figure:
    """See `AttentionReport.plot_token_classes`."""
    from attnrb.analysis.page import CLASS_COLOURS

    figure, panels = _figure(1, len(report.runs), 5.2, 3.4)
    for panel, run in zip(panels.flat, report.runs, strict=True):
        below = np.zeros(len(report.layers))
        for name in TOKEN_CLASSES:
            share = run.layer_means(f"token_class.{name}")
            label = name.replace("_", " ")
            panel.bar(report.layers, share, bottom=below, width=0.9, label=label, color=CLASS_COLOURS[name])
            below += share
        panel.set_title(_literal(run.label), fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(_percent())
    panels.flat[0].set_ylabel("share of attention")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def received(report: AttentionReport, text: int) -> Figure:
    """See `AttentionReport.plot_received`. Raises ValueError where the text was not kept."""
    from matplotlib.colors import LogNorm

    from attnrb.analysis.page import visible

    if not 0 <= text < len(report.texts):
        raise ValueError(f"text: the report has the tokens of texts 0 to {len(report.texts) - 1}, got {text}")
    tokens = report.texts[text].tokens
    figure, panels = _figure(len(report.runs), 1, min(16.0, max(6.0, 0.22 * len(tokens) + 1.5)), 4.4)
    for panel, run in zip(panels.flat, report.runs, strict=True):
        values = np.nanmean(run.received[text].astype(np.float64), axis=1)
        norm = LogNorm(vmin=max(float(np.median(values)) / 4, 1e-12), vmax=max(float(values.max()), 1e-11))
        image = panel.imshow(np.maximum(values, 1e-30), origin="lower", aspect="auto", norm=norm, cmap="YlGnBu")
        panel.set_title(f"{_literal(run.label)}: attention that each token receives, mean over heads", fontsize=10)
        panel.set_ylabel("layer")
        _label_layers(panel, report)
        if len(tokens) <= _LABELLED:
            names = [_literal(visible(token.text)) for token in tokens]
            panel.set_xticks(range(len(tokens)), names, rotation=90, fontsize=7)
        else:
            panel.set_xlabel("token")
        figure.colorbar(image, ax=panel, label="received")
    return figure


def save(report: AttentionReport, folder: Path) -> list[Path]:
    """See `AttentionReport.save_plots`."""
    draw: dict[str, Callable[[], Figure]] = {
        "depth": partial(depth, report, _DEPTH),
        "token_classes": partial(token_classes, report),
        **{f"heads_{metric}": partial(heads, report, metric) for metric in _HEADS},
        **{f"received_{text + 1}": partial(received, report, text) for text in range(len(report.texts))},
    }
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    return [_save(figure(), folder / f"{name}.png") for name, figure in draw.items()]


def _save(figure: Figure, path: Path) -> Path:
    import io

    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=150)
    write_whole(path, memory.getvalue())
    return path


def _literal(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would begin a formula."""
    return printable(text).replace("$", r"\$")


def _label_layers(panel: Any, report: AttentionReport) -> None:
    step = max(1, len(report.layers) // 8)
    places = range(0, len(report.layers), step)
    panel.set_yticks(places, [str(report.layers[place]) for place in places])


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 44))
