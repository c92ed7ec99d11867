"""The report's figures, drawn by matplotlib."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnrb.analysis.outlier_tokens import expected_attention
from attnrb.analysis.report import METRICS, AttentionReport
from attnrb.analysis.words import unit, visible
from attnrb.reports.files import write_whole
from attnrb.reports.printable import printable
from attnrb.text.classes import TOKEN_CLASSES, TokenClass

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

_RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_LABELLED = 60  # tokens up to which each is named on its axis
_DEPTH = ("first_key", "non_semantic", "entropy", "mean_distance", "outliers_per_row", "outlier_overlap")
_HEADS = ("first_key", "non_semantic", "entropy", "outlier_overlap")


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of panels that belongs to no window, so that none needs closing. A notebook shows it without magic."""
    try:
        figure = _figure_class()(figsize=(width * columns, height * rows), layout="constrained")
    except ImportError as error:
        raise ImportError("the plots need the package matplotlib: run `pip install 'attnrb[analysis]'`") from error
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@functools.cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a cell may end in, whether pyplot was imported or not."""

        def _repr_png_(self) -> bytes:
            return _png(self)

    return Shown


def check_installed() -> None:
    """Raise ImportError where matplotlib is missing."""
    _figure(1, 1, 1, 1)


def depth(report: AttentionReport, metrics: Sequence[str]) -> Figure:
    """See `AttentionReport.plot_depth`. Raises ValueError for a metric that there is not."""
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics: expected a list of names, got {metrics!r}")
    columns, many = min(3, len(metrics)), len(report.runs) > 1
    rows = math.ceil(len(metrics) / columns)
    # Under each panel what changes, where lines may coincide.
    ratios = {"height_ratios": [3, 1] * rows} if many else {}
    figure, panels = _figure(rows * (2 if many else 1), columns, 4.2, 2.0 if many else 3.0, **ratios)
    for panel in panels.flat:
        panel.set_axis_off()
    for place, metric in enumerate(metrics):
        row, column = divmod(place, columns)
        panel = panels[2 * row if many else row, column]
        _lines(panel, report, metric)
        if many:
            _change_bars(panels[2 * row + 1, column], report, metric)
            panel.set_xlabel("")
    if many:
        panels.flat[0].legend(frameon=False)
    return figure


def _lines(panel: Any, report: AttentionReport, metric: str) -> None:
    panel.set_axis_on()
    for place, run in enumerate(report.runs):
        style = "-" if place == 0 else "--"
        means = run.layer_means(metric)
        panel.plot(report.layers, means, style, marker=".", label=run.label, color=_RUN_COLOURS[place])
    panel.set_title(_wrapped(METRICS[metric]), fontsize=10)
    panel.set_xlabel("layer")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25)
    if unit(metric) == "share":
        panel.yaxis.set_major_formatter(_percent())


def _change_bars(panel: Any, report: AttentionReport, metric: str) -> None:
    panel.set_axis_on()
    change = report.after.layer_means(metric) - report.before.layer_means(metric)
    panel.bar(report.layers, change, color=_RUN_COLOURS[len(report.runs) - 1], width=0.8)
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_xlabel("layer")
    panel.set_ylabel("change", fontsize=8)
    panel.tick_params(labelsize=8)
    if unit(metric) == "share":
        panel.yaxis.set_major_formatter(_percent(decimals=1))


def heads(report: AttentionReport, metric: str) -> Figure:
    """See `AttentionReport.plot_heads`. Runs have one scale; the last panel is the change."""
    values = [run.metric(metric) for run in report.runs]
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    height = max(2.6, 0.16 * len(report.layers) + 0.9)
    many = len(values) > 1
    figure, panels = _figure(1, len(values) + many, max(2.8, 0.2 * report.heads + 1.6), height)
    for panel, run, each in zip(panels.flat, report.runs, values, strict=False):
        image = panel.imshow(each, origin="lower", aspect="auto", vmin=0, vmax=top or 1, cmap="YlGnBu")
        _name_heads(panel, report, run.label)
    figure.colorbar(image, ax=list(panels.flat[: len(values)]), label=METRICS[metric])
    if many:
        change = values[-1] - values[0]
        image = panels.flat[-1].imshow(change, origin="lower", aspect="auto", **_around_zero(change))
        _name_heads(panels.flat[-1], report, _change_title(report))
        figure.colorbar(image, ax=panels.flat[-1], label="change")
    return figure


def _name_heads(panel: Any, report: AttentionReport, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("head")
    panel.set_ylabel("layer")
    _label_layers(panel, report)


def token_classes(report: AttentionReport) -> Figure:
    """See `AttentionReport.plot_token_classes`. The last panel is the change, where there are several runs."""
    many = len(report.runs) > 1
    figure, panels = _figure(1, len(report.runs) + many, 5.2, 3.4)
    for panel, run in zip(panels.flat, report.runs, strict=False):
        _stack(panel, report, {name: run.layer_means(f"token_class.{name}") for name in TOKEN_CLASSES})
        panel.set_title(run.label, fontsize=10)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(_percent())
    if many:
        metrics = {name: f"token_class.{name}" for name in TOKEN_CLASSES}
        change = {name: report.after.layer_means(m) - report.before.layer_means(m) for name, m in metrics.items()}
        _stack(panels.flat[-1], report, change)
        panels.flat[-1].axhline(0, color="black", linewidth=0.6)
        panels.flat[-1].set_title(_change_title(report), fontsize=10)
        panels.flat[-1].yaxis.set_major_formatter(_percent(decimals=1))
    panels.flat[0].set_ylabel("share of attention")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _stack(panel: Any, report: AttentionReport, shares: Mapping[TokenClass, Floats]) -> None:
    """Bars on each other: what is above 0 upwards, what is below downwards."""
    from attnrb.analysis.page import CLASS_COLOURS

    above, below = np.zeros(len(report.layers)), np.zeros(len(report.layers))
    for name, share in shares.items():
        bottom = np.where(share >= 0, above, below)
        label = name.replace("_", " ")
        panel.bar(report.layers, share, bottom=bottom, width=0.9, label=label, color=CLASS_COLOURS[name])
        above += np.maximum(share, 0)
        below += np.minimum(share, 0)
    panel.set_xlabel("layer")


def received(report: AttentionReport, text: int) -> Figure:
    """See `AttentionReport.plot_received`. Raises ValueError where the text was not kept."""
    from matplotlib.colors import LogNorm

    if not 0 <= text < len(report.texts):
        raise ValueError(f"text: the report has the tokens of texts 0 to {len(report.texts) - 1}, got {text}")
    tokens, many = report.texts[text].tokens, len(report.runs) > 1
    width = min(16.0, max(6.0, 0.22 * len(tokens) + 1.5))
    figure, panels = _figure(len(report.runs) + many, 1, width, 4.4)
    values = [np.nanmean(run.received[text].astype(np.float64), axis=1) for run in report.runs]
    times = [each / expected_attention(each) for each in values]
    # Runs have one scale, which begins at what is expected.
    norm = LogNorm(vmin=1.0, vmax=max(1.1, *(float(each.max()) for each in times)))
    for panel, run, each in zip(panels.flat, report.runs, times, strict=False):
        image = panel.imshow(np.maximum(each, 1e-30), origin="lower", aspect="auto", norm=norm, cmap="YlGnBu")
        panel.set_title(f"{run.label}: attention that each token receives, mean over heads", fontsize=10)
        figure.colorbar(image, ax=panel, label="times what is expected")
    if many:
        change = np.log2(np.maximum(values[-1], 1e-30) / np.maximum(values[0], 1e-30))
        image = panels.flat[-1].imshow(change, origin="lower", aspect="auto", **_around_zero(change))
        panels.flat[-1].set_title(_change_title(report), fontsize=10)
        figure.colorbar(image, ax=panels.flat[-1], label="octaves")
    for panel in panels.flat:
        panel.set_ylabel("layer")
        _label_layers(panel, report)
        if len(tokens) <= _LABELLED:
            # A dollar sign would begin a formula.
            names = [visible(token.text).replace("$", r"\$") for token in tokens]
            panel.set_xticks(range(len(tokens)), names, rotation=90, fontsize=7)
        else:
            panel.set_xlabel("token")
    return figure


def _change_title(report: AttentionReport) -> str:
    return f"change, {report.before.label} to {report.after.label}"


def _around_zero(change: Floats) -> dict[str, Any]:
    """The colours of a difference: less is blue, more is orange."""
    from matplotlib.colors import LinearSegmentedColormap

    most = float(np.nanmax(np.abs(change))) if np.isfinite(change).any() else 0.0
    colours = LinearSegmentedColormap.from_list("change", ["#2166ac", "#ffffff", "#b35806"])
    return {"vmin": -(most or 1.0), "vmax": most or 1.0, "cmap": colours}


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
    write_whole(path, _png(figure, dpi=150))
    return path


def _png(figure: Figure, dpi: int = 100) -> bytes:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=dpi)
    return memory.getvalue()


def _literal(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would begin a formula."""
    return printable(text).replace("$", r"\$")


def _label_layers(panel: Any, report: AttentionReport) -> None:
    step = max(1, len(report.layers) // 8)
    places = range(0, len(report.layers), step)
    panel.set_yticks(places, [str(report.layers[place]) for place in places])


def _percent(decimals: int = 0) -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=decimals)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 44))
