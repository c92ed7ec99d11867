"""What an analysis found, as typed values, and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnrb.analysis.outlier_tokens import Sink, outlier_scores
from attnrb.analysis.rows import DEFAULT_DETAIL, Detail, RunKeys, TextRows
from attnrb.policies import Policy
from attnrb.reports.files import write_whole
from attnrb.text.classes import NON_SEMANTIC, TOKEN_CLASSES, Token, TokenClass

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

_FORMAT = "attnrb attention report 1"

METRICS: dict[str, str] = {
    "first_key": "share of attention on the first key",
    "non_semantic": "share of attention on special tokens, whitespace and punctuation",
    "entropy": "entropy of attention (nats)",
    "mean_distance": "mean distance of attention (tokens)",
    "outliers_per_row": "outliers per row",
    "outlier_overlap": "overlap of outliers with the source layer (Jaccard)",
    "outlier_share": "share of attention on the source layer's outliers",
    **{f"token_class.{name}": f"share of attention on {name.replace('_', ' ')} tokens" for name in TOKEN_CLASSES},
}
"""The quantities that an `AttentionRun` has for each layer and head, and what they are."""


@dataclass(frozen=True, eq=False)
class AttentionRun:
    """One model, plain or re-balanced, measured over all texts. Arrays are float64 ``[L, H]`` unless said otherwise.

    Rows of attention are taken as distributions: of re-balanced weights, which may sum to more than 1, shares are
    shares of that sum. Means are over the queries of all texts. A head that a layer has not is NaN.
    """

    label: str
    """``plain`` and ``rebalanced``; with a baseline ``baseline`` and ``model`` in place of ``plain``."""
    model: str
    """Name of the model."""
    config: Policy | None
    """How its attention was edited; None: not at all."""
    gains: Floats | None
    """The gains that were used, where they were learnt and no schedule; 0 where a layer or head has none."""
    entropy: Floats
    """Mean entropy of a query's attention, in nats. NaN where a gain of -1 or less leaves no distribution."""
    first_key: Floats
    """Mean share on key 0, over all queries but the first: see Note: [First-key share]."""
    mean_distance: Floats
    """How many tokens back attention looks, on average."""
    outliers_per_row: Floats
    """Keys other than the query's own whose weight, as the layer applies it, exceeds the threshold."""
    outlier_overlap: Floats
    """Jaccard index of these (query, key) pairs with the source layer's, head by head, all texts together. 1 in the
    source layer; NaN where neither has any."""
    outlier_share: Floats
    """Mean share on the source layer's outliers: what re-balancing strengthens. NaN before the source layer."""
    token_class: Mapping[TokenClass, Floats]
    """Mean share on the tokens of each class; the classes add up to 1."""
    received: tuple[NDArray[np.float32], ...]
    """For each kept text, float32 ``[L, H, n]``: the mean weight that each token receives from the queries that see
    it, as the layer applies it."""
    sinks: tuple[Sink, ...]
    """Tokens on which attention collapses, over all texts; the strongest first."""

    def __repr__(self) -> str:
        means = {name: self.mean(name) for name in ("first_key", "non_semantic", "entropy")}
        shown = ", ".join(f"{name}={value:.3g}" for name, value in means.items() if value is not None)
        layers, heads = self.entropy.shape
        what = f"{layers} layers x {heads} heads, {shown}, {len(self.sinks)} sinks"
        return f"AttentionRun({self.label!r}, {self.model!r}, {what})"

    @property
    def non_semantic(self) -> Floats:
        """Mean share on tokens that say nothing: special ones, whitespace and punctuation."""
        total: Floats = np.sum([self.token_class[name] for name in NON_SEMANTIC], axis=0)
        return total

    def metric(self, name: str) -> Floats:
        """One of `METRICS` by its name, ``[L, H]``. Raises ValueError for another name."""
        if name not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {name!r}")
        kind, _, token_class = name.partition(".")
        values: Floats = self.token_class[token_class] if token_class else getattr(self, kind)  # type: ignore[index]
        return values

    def mean(self, name: str) -> float | None:
        """Mean of a metric over all layers and heads; None where no layer has a value."""
        values = self.metric(name)
        return None if np.isnan(values).all() else float(np.nanmean(values))

    def layer_means(self, name: str) -> Floats:
        """Mean of a metric over the heads of each layer, ``[L]``; NaN where no head has a value."""
        values = self.metric(name)
        known = ~np.isnan(values)
        count = known.sum(axis=1)
        total = np.where(known, values, 0.0).sum(axis=1)
        means: Floats = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
        return means

    def summary(self) -> dict[str, float | None]:
        """Mean of every metric over all layers and heads."""
        return {name: self.mean(name) for name in METRICS}

    def z_scores(self, text: int = 0) -> Floats:
        """Robust z-score of what each token of a kept text receives, ``[L, H, n]``: see `outlier_scores`."""
        return outlier_scores(self.received[text].astype(np.float64))


@dataclass(frozen=True)
class TextReport:
    """A text whose tokens were kept."""

    name: str
    tokens: tuple[Token, ...]

    def __repr__(self) -> str:
        return f"TextReport({self.name!r}, {len(self.tokens):,} tokens)"


@dataclass(frozen=True, eq=False)
class AttentionReport:
    """Where the attention of a model goes: what `attnrb.analysis.analyze` found.

    In a notebook it shows its means, its sinks and its first text.
    """

    version: str
    """Of attnrb."""
    dtype: str
    """That the model computed in."""
    layers: tuple[int, ...]
    """The numbers of the L layers that have attention."""
    heads: int
    """H, the most that a layer has."""
    source_layer: int
    threshold: float
    """Weight above which an entry of attention is an outlier."""
    z_threshold: float
    """Robust z-score above which a token is an outlier."""
    text_count: int
    token_count: int
    class_counts: Mapping[TokenClass, int]
    """How many tokens of each class the texts have."""
    texts: tuple[TextReport, ...]
    """The texts whose tokens were kept."""
    runs: tuple[AttentionRun, ...]
    """The baseline if there is one, the plain model, the re-balanced model if there is one."""
    notes: tuple[str, ...] = ()
    """What else a reader should know, a sentence each."""
    detail: Detail = DEFAULT_DETAIL
    """Which single heads a page shows."""
    rows: tuple[TextRows | None, ...] = ()
    """For each kept text the rows of its most interesting queries; not in JSON."""
    keys: tuple[tuple[RunKeys, ...], ...] = ()
    """For each kept text what the layers of each run kept of it, where that was asked for; not in JSON."""

    def __repr__(self) -> str:
        runs = ", ".join(run.label for run in self.runs)
        texts = f"{self.text_count:,} text{'s' if self.text_count > 1 else ''}, {self.token_count:,} tokens"
        return f"AttentionReport({self.after.model!r}, {texts}, {len(self.layers)} layers x {self.heads} heads: {runs})"

    def _repr_html_(self) -> str:
        from attnrb.analysis.summary import summary

        return summary(self)

    @property
    def before(self) -> AttentionRun:
        """The first run."""
        return self.runs[0]

    @property
    def after(self) -> AttentionRun:
        """The last run; the first one where there is but one."""
        return self.runs[-1]

    def run(self, label: str) -> AttentionRun:
        """The run of this label. Raises KeyError where there is none."""
        for run in self.runs:
            if run.label == label:
                return run
        raise KeyError(f"no run {label!r}: there are {', '.join(run.label for run in self.runs)}")

    def outlier_tokens(self, run: AttentionRun, text: int = 0) -> list[list[list[int]]]:
        """For each layer and head the positions of a kept text's outlier tokens: see `outlier_scores`."""
        scores = run.z_scores(text)
        return [[np.flatnonzero(row > self.z_threshold).tolist() for row in layer] for layer in scores]

    # ------------------------------------------------------------------------------------------------------- JSON

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: arrays as nested lists, NaN as None. Nothing is rounded."""
        return {
            "format": _FORMAT,
            "attnrb": self.version,
            "dtype": self.dtype,
            "layers": list(self.layers),
            "heads": self.heads,
            "source_layer": self.source_layer,
            "threshold": self.threshold,
            "z_threshold": self.z_threshold,
            "text_count": self.text_count,
            "token_count": self.token_count,
            "token_class_counts": dict(self.class_counts),
            "notes": list(self.notes),
            "texts": [
                {
                    "name": text.name,
                    "id": [token.id for token in text.tokens],
                    "token": [token.text for token in text.tokens],
                    "token_class": [token.token_class for token in text.tokens],
                }
                for text in self.texts
            ],
            "runs": [self._run_dict(run) for run in self.runs],
        }

    def _run_dict(self, run: AttentionRun) -> dict[str, Any]:
        return {
            "label": run.label,
            "model": run.model,
            "config": None if run.config is None else run.config.to_dict(),
            "gains": None if run.gains is None else _lists(run.gains),
            "summary": run.summary(),
            "entropy": _lists(run.entropy),
            "first_key": _lists(run.first_key),
            "mean_distance": _lists(run.mean_distance),
            "outliers_per_row": _lists(run.outliers_per_row),
            "outlier_overlap": _lists(run.outlier_overlap),
            "outlier_share": _lists(run.outlier_share),
            "token_class": {name: _lists(values) for name, values in run.token_class.items()},
            "sinks": [asdict(sink) for sink in run.sinks],
            "texts": [
                {"received": _lists(received), "outlier_tokens": self.outlier_tokens(run, place)}
                for place, received in enumerate(run.received)
            ],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As a JSON document, which is also written to `path`, whole or not at all, where one is given."""
        document = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        if path is not None:
            write_whole(Path(path), document)
        return document

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> AttentionReport:
        """The report that `to_json` wrote.

        Args:
            source: the document itself, or the path of a file.

        Raises:
            ValueError: it is no such document.
            OSError: the file cannot be read.
        """
        text = source if isinstance(source, str) and source.lstrip()[:1] == "{" else Path(source).read_text("utf-8-sig")
        try:
            document = json.loads(text)
            if document["format"] != _FORMAT:
                raise ValueError(f"its format is {document['format']!r}")
            return cls._from_dict(document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"source: this is not a report of attention that attnrb wrote: {what}") from error

    @classmethod
    def _from_dict(cls, document: Mapping[str, Any]) -> AttentionReport:
        texts = tuple(
            TextReport(
                text["name"],
                tuple(Token(*token) for token in zip(text["id"], text["token"], text["token_class"], strict=True)),
            )
            for text in document["texts"]
        )
        shape = len(document["layers"]), document["heads"]
        return cls(
            version=document["attnrb"],
            dtype=document["dtype"],
            layers=tuple(document["layers"]),
            heads=document["heads"],
            source_layer=document["source_layer"],
            threshold=document["threshold"],
            z_threshold=document["z_threshold"],
            text_count=document["text_count"],
            token_count=document["token_count"],
            class_counts=document["token_class_counts"],
            texts=texts,
            runs=tuple(_run(run, shape, texts) for run in document["runs"]),
            notes=tuple(document["notes"]),
        )

    # ------------------------------------------------------------------------------------------------------ tables

    def to_rows(self) -> list[dict[str, Any]]:
        """Every metric of each run, layer and head, by its name; None where a head has none.

        ``pandas.DataFrame(report.to_rows())`` makes a table of them.
        """
        from attnrb.analysis.table import rows

        return rows(self)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_rows` as CSV, which is also written to `path`, whole or not at all, where one is given."""
        from attnrb.analysis.table import as_csv

        document = as_csv(self)
        if path is not None:
            write_whole(Path(path), document)
        return document

    # --------------------------------------------------------------------------------------------------- pictures

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """As one self-contained page, which is also written to `path` where one is given.

        Raises:
            ImportError: the extra ``analysis`` is not installed.
        """
        from attnrb.analysis.page import page

        document = page(self)
        if path is not None:
            write_whole(Path(path), document)
        return document

    def plot_depth(self, metrics: Sequence[str] = ("first_key", "non_semantic", "entropy")) -> Figure:
        """Lines over the layers, mean over heads, a panel for each metric and a line for each run."""
        from attnrb.analysis import plots

        return plots.depth(self, metrics)

    def plot_heads(self, metric: str = "first_key") -> Figure:
        """A heat map of layers and heads for each run."""
        from attnrb.analysis import plots

        return plots.heads(self, metric)

    def plot_token_classes(self) -> Figure:
        """Attention on each class of tokens, layer by layer, a panel for each run."""
        from attnrb.analysis import plots

        return plots.token_classes(self)

    def plot_received(self, text: int = 0) -> Figure:
        """What each token of a kept text receives in each layer, mean over heads, a heat map for each run."""
        from attnrb.analysis import plots

        return plots.received(self, text)

    def save_plots(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every plot to a folder, which is made where it is missing, as PNG; their paths.

        Raises:
            ImportError: the extra ``analysis`` is not installed.
        """
        from attnrb.analysis import plots

        return plots.save(self, Path(folder))


def _run(run: Mapping[str, Any], shape: tuple[int, int], texts: Sequence[TextReport]) -> AttentionRun:
    return AttentionRun(
        label=run["label"],
        model=run["model"],
        config=None if run["config"] is None else Policy.from_dict(run["config"]),
        gains=None if run.get("gains") is None else _array(run["gains"], shape),  # older reports have none
        entropy=_array(run["entropy"], shape),
        first_key=_array(run["first_key"], shape),
        mean_distance=_array(run["mean_distance"], shape),
        outliers_per_row=_array(run["outliers_per_row"], shape),
        outlier_overlap=_array(run["outlier_overlap"], shape),
        outlier_share=_array(run["outlier_share"], shape),
        token_class={name: _array(run["token_class"][name], shape) for name in TOKEN_CLASSES},
        received=tuple(
            _array(each["received"], (*shape, len(text.tokens))).astype(np.float32)
            for each, text in zip(run["texts"], texts, strict=True)
        ),
        sinks=tuple(
            Sink(**{**sink, "positions": tuple(sink["positions"]), "layers": tuple(sink["layers"])})
            for sink in run["sinks"]
        ),
    )


def _lists(values: NDArray[Any]) -> Any:
    if values.ndim > 1:
        return [_lists(row) for row in values]
    # The shortest digits that give a float32 back are fewer than those of the same number as a float64.
    exact = values.astype(str).tolist() if values.dtype == np.float32 else values.tolist()
    return [None if math.isnan(value) else value for value in map(float, exact)]


def _array(values: Any, shape: tuple[int, ...]) -> Floats:
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    if array.shape != shape:
        raise ValueError(f"it has an array of the shape {list(array.shape)} in place of {list(shape)}")
    return array
