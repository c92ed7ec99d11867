"""Runs models over texts and measures the attention of every layer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from attnrb.analysis.measure import Entries, LayerSums, among, measure
from attnrb.analysis.measure_weights import measure_weights
from attnrb.analysis.outlier_tokens import DEFAULT_Z_THRESHOLD, SinkCounter
from attnrb.analysis.report import AttentionReport, AttentionRun, TextReport
from attnrb.analysis.rows import DEFAULT_DETAIL, Detail, RowCollector, RunKeys
from attnrb.hosts.session import AttentionCall
from attnrb.hosts.transformers.patch import Patch, patch
from attnrb.models import DEFAULT_MODEL_NAME
from attnrb.policies import LearnedGains, Policy, Rebalance
from attnrb.protocols import LanguageModel, LoadedTokenizer
from attnrb.studies.generation import encode
from attnrb.text.classes import TOKEN_CLASSES, Token, describe_tokens
from attnrb.text.vocabulary import check_token_ids

Floats = NDArray[np.float64]


class Progress(NamedTuple):
    """How far an analysis is: told after every layer."""

    text: int
    """Texts finished before this one."""
    texts: int | None
    """How many there are; None where they are not known beforehand."""
    tokens: int
    """Tokens of the text at hand."""
    run: str
    """What it is measured in, for example ``plain``."""
    fraction: float
    """How much of the text at hand is done, from 0 to 1, all runs together."""


def analyze(
    model: LanguageModel,
    tokenizer: LoadedTokenizer,
    texts: str | Iterable[str],
    *,
    compare: Policy | None = None,
    baseline: LanguageModel | None = None,
    threshold: float | None = None,
    source_layer: int | None = None,
    z_threshold: float = DEFAULT_Z_THRESHOLD,
    chat: bool = False,
    max_tokens: int | None = None,
    keep_texts: int = 8,
    function_words: Iterable[str] | None = None,
    names: Sequence[str] | None = None,
    model_name: str | None = None,
    baseline_name: str | None = None,
    detail: Detail = DEFAULT_DETAIL,
    keep_keys: bool = False,
    progress: Callable[[Progress], None] | bool = False,
) -> AttentionReport:
    """Measure where the attention of a model goes, in every layer and head.

    Texts are read one at a time, each in one forward without padding; nothing of size n×n is made. What is measured is
    the attention that the model applies, in float32 whatever the model computes in (Note: [Measuring attention]).

    Args:
        model: an unpatched ``transformers`` causal language model that `attnrb.patch` serves. It is left as it was.
        tokenizer: its tokenizer.
        texts: a text or several; a generator is read as it goes.
        compare: measure the model once more, re-balanced so, or with gains that were learnt.
        baseline: another model with the same tokenizer, layers and heads, such as the one that `model` was fine-tuned
            from: it is measured too, as it is.
        threshold: weight above which an entry of attention is an outlier. Default: that of `compare`, else 0.01.
        source_layer: the layer with whose outliers those of others are compared. Default: that of `compare`, else 0.
        z_threshold: robust z-score above which a token is an outlier (see `outlier_scores`). Default: 3.5.
        chat: wrap each text as a user's message in the tokenizer's chat template. Default: the text as it is.
        max_tokens: read only this many tokens of each text, and say so in the report's notes. Default: never.
        keep_texts: for how many of the texts, from the first on, the tokens and what each receives are kept. All count
            in the rest of the report. Default: 8.
        function_words: the language's closed word classes. Default: those of English.
        names: a name for each text, for the report. Default: "text 1" and so on.
        model_name: for the report. Default: the name in the model's configuration.
        baseline_name: likewise.
        detail: which single heads a page of the report shows, and what it may take for the rows of single queries.
        keep_keys: keep the queries and keys of every layer of the texts that are kept, so that
            `attnrb.analysis.serve.ReportServer` can compute the row of any query: ``L (H + Hk) D`` numbers in the
            model's dtype for each token and run. Default: no.
        progress: a function called after every layer, or True for a bar on stderr.

    Returns:
        The report, whose runs are the baseline if there is one, the plain model, and the re-balanced one if there is
        one.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, no text holds two tokens, or the baseline does not fit the model.
        Exception: whatever `attnrb.patch` raises for a model it cannot serve.
    """
    if compare is not None and not isinstance(compare, Policy):
        raise TypeError(f"compare: expected an attnrb.Policy or None, got {type(compare).__name__}")
    plain = _plain_config(compare, threshold, source_layer)
    if not 0 < z_threshold < float("inf"):
        raise ValueError(f"z_threshold: expected a finite number above 0, got {z_threshold}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens: expected at least 2, got {max_tokens}")
    if isinstance(texts, str):
        texts = [texts]
    runs = [_Run("plain", model, model_name or _name(model), plain, z_threshold)]
    if baseline is not None:
        runs[0].label = "model"
        runs.insert(0, _Run("baseline", baseline, baseline_name or _name(baseline), plain, z_threshold))
    if compare is not None:
        name = model_name or _name(model)
        label = "rebalanced" if isinstance(compare, (Rebalance, LearnedGains)) else "edited"
        runs.append(_Run(label, model, name, plain, z_threshold, edited=compare))

    kept: list[TextReport] = []
    rows = RowCollector(detail, keep_keys)
    notes: list[str] = []
    counts = np.zeros(len(TOKEN_CLASSES), dtype=np.int64)
    done = tokens_done = 0
    total = len(texts) if isinstance(texts, Sized) else None
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(_teller(progress, total))
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts: expected strings, got {type(text).__name__}")
            name = names[number] if names is not None and number < len(names) else f"text {number + 1}"
            ids = _ids(tokenizer, text, chat)
            if max_tokens is not None and len(ids) > max_tokens:
                notes.append(f"{name}: cut after {max_tokens:,} of {len(ids):,} tokens")
                ids = ids[:max_tokens]
            if len(ids) < 2:
                notes.append(f"{name}: left out, because it has fewer than two tokens")
                continue
            _note_context(model, name, len(ids), notes)
            tokens = describe_tokens(tokenizer, ids, function_words=function_words)
            classes = torch.tensor(
                [TOKEN_CLASSES.index(token.token_class) for token in tokens], dtype=torch.int64, device="cpu"
            )
            keep = len(kept) < keep_texts
            for place, run in enumerate(runs):

                def layer_done(part: float, place: int = place, run: _Run = run, number: int = number) -> None:
                    tell(Progress(number, total, len(ids), run.label, (place + part) / len(runs)))  # noqa: B023

                run.add(ids, tokens, classes, keep, layer_done, rows.collect(len(ids), place) if keep else None)
                if keep:
                    rows.run_done(run.layers, run.heads, len(runs))
            _check_shapes(runs)
            if keep:
                rows.finish(runs[0].layers, runs[0].heads)
                kept.append(TextReport(name, tokens))
            counts += np.bincount(classes.numpy(), minlength=len(TOKEN_CLASSES))
            done += 1
            tokens_done += len(ids)
    if not done:
        raise ValueError("texts: expected at least one text of two tokens or more" + "".join(f"; {n}" for n in notes))
    if len(kept) < done:
        notes.append(f"tokens are kept of the first {len(kept)} of {done:,} texts; all count in the figures")

    from attnrb import __version__

    return AttentionReport(
        version=__version__,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=runs[0].layers,
        heads=runs[0].heads,
        source_layer=runs[-1].source_layer,
        threshold=plain.threshold,
        z_threshold=float(z_threshold),
        text_count=done,
        token_count=tokens_done,
        class_counts={name: int(count) for name, count in zip(TOKEN_CLASSES, counts, strict=True)},
        texts=tuple(kept),
        runs=tuple(run.result() for run in runs),
        notes=tuple(notes),
        detail=detail,
        rows=tuple(rows.found),
        keys=tuple(rows.keys),
    )


class _Run:
    """One model, plain or re-balanced, measured over one text after the other."""

    def __init__(
        self,
        label: str,
        model: Any,
        name: str,
        config: Rebalance,
        z: float,
        *,
        edited: Policy | None = None,
    ) -> None:
        """``config`` says which outliers are looked for; ``edited`` is the policy, where there is one."""
        self.label, self.model, self.name, self.config = label, model, name, config
        self.edited = edited
        self.layers: tuple[int, ...] = ()
        self.source_layer = config.source_layer
        self.received: list[NDArray[np.float32]] = []
        self._sums: dict[int, _Sums] = {}
        self._sinks = SinkCounter(z)

    @property
    def heads(self) -> int:
        """H, the most that any layer has."""
        return max(len(sums.entropy) for sums in self._sums.values())

    def add(
        self,
        ids: Sequence[int],
        tokens: Sequence[Token],
        classes: torch.Tensor,
        keep: bool,
        layer_done: Callable[[float], None],
        keys: RunKeys | None,
    ) -> None:
        """Measure one more text, and keep of it what ``keys`` collects."""
        check_token_ids(self.model, ids)
        known = self.edited is None or isinstance(self.edited, (Rebalance, LearnedGains))
        observer = _Observer(classes, self.config, len(ids), layer_done, keys, known)
        with (
            torch.inference_mode(),
            _evaluating(self.model),
            patch(self.model, self.edited or self.config, observer=observer) as on,
        ):
            observer.total = _layer_count(on)
            try:
                on.decoder(torch.tensor([list(ids)], dtype=torch.int64, device=self.model.device), use_cache=False)
            except IndexError as error:
                raise ValueError(
                    f"texts: the model cannot read a text of {len(ids):,} tokens ({error}): cut it with max_tokens"
                ) from error
        found = observer.result()
        self.source_layer = observer.source_layer
        self.layers = tuple(sorted(found))
        broken = [layer for layer in self.layers if np.isnan(found[layer][0].entropy).any()]
        if broken:
            raise ValueError(
                f"texts: the attention of layer {broken[0]} is not finite: the model's weights are damaged, or its "
                "activations exceed the range of the dtype; try float32 (--dtype float32)"
            )
        for layer, (sums, overlap) in found.items():
            self._sums.setdefault(layer, _Sums.zero(sums)).add(sums, overlap)
        received = [found[layer][0].received for layer in self.layers]
        self._sinks.add(
            tokens,
            self.layers,
            np.stack([each.mean(0) for each in received]),
            np.stack([found[layer][0].share.mean(0) for layer in self.layers]),
        )
        if keep:
            self.received.append(_stack(received, max(len(each) for each in received)).astype(np.float32))

    def result(self) -> AttentionRun:
        sums = [self._sums[layer] for layer in self.layers]
        learned = self.edited if isinstance(self.edited, LearnedGains) else None

        def table(rows: Iterable[Floats]) -> Floats:
            return _stack(list(rows), self.heads)

        return AttentionRun(
            label=self.label,
            model=self.name,
            config=self.edited if learned is None else learned.config,
            gains=learned.matrix()[list(self.layers)].double().numpy() if learned is not None else None,
            entropy=table(each.entropy / each.queries for each in sums),
            first_key=table(each.first_key / each.later_queries for each in sums),
            mean_distance=table(each.mean_distance / each.queries for each in sums),
            outliers_per_row=table(each.outliers / each.queries for each in sums),
            outlier_overlap=table(each.overlap() for each in sums),
            outlier_share=table(each.outlier_share / each.queries for each in sums),
            token_class={
                name: table(each.token_class[place] / each.queries for each in sums)
                for place, name in enumerate(TOKEN_CLASSES)
            },
            received=tuple(self.received),
            sinks=self._sinks.sinks(self.layers),
        )


class _Overlap(NamedTuple):
    """Sizes of intersection and union of a layer's outliers with the source layer's, each ``[H]``."""

    both: Floats
    either: Floats


@dataclass
class _Sums:
    """`LayerSums` of all texts so far."""

    queries: int
    later_queries: int
    entropy: Floats
    first_key: Floats
    mean_distance: Floats
    outlier_share: Floats
    token_class: Floats
    outliers: Floats
    both: Floats
    either: Floats

    @classmethod
    def zero(cls, like: LayerSums) -> _Sums:
        heads = like.entropy.shape
        zeros = {field.name: np.zeros(heads) for field in fields(cls) if not field.name.endswith("queries")}
        return cls(0, 0, **{**zeros, "token_class": np.zeros(like.token_class.shape)})

    def add(self, sums: LayerSums, overlap: _Overlap) -> None:
        self.queries += sums.queries
        self.later_queries += sums.queries - 1
        for name in ("entropy", "first_key", "mean_distance", "outlier_share", "token_class", "outliers"):
            setattr(self, name, getattr(self, name) + getattr(sums, name))
        self.both += overlap.both
        self.either += overlap.either

    def overlap(self) -> Floats:
        """Jaccard index; NaN where neither layer has an outlier."""
        return np.divide(self.both, self.either, out=np.full_like(self.both, np.nan), where=self.either > 0)


class _Observer:
    """Measures each layer of one forward as it runs."""

    def __init__(
        self,
        classes: torch.Tensor,
        config: Rebalance,
        length: int,
        layer_done: Callable[[float], None],
        keys: RunKeys | None = None,
        by_sums: bool = True,
    ) -> None:
        """``by_sums``: the policy is one whose edits `measure` knows."""
        self.keys, self.by_sums = keys, by_sums
        self.classes, self.config, self.length, self.layer_done = classes, config, length, layer_done
        self.source_layer = config.source_layer
        self.total = 1
        self._source: Entries | None = None
        self._sums: dict[int, LayerSums] = {}
        self._overlaps: dict[int, _Overlap] = {}
        self._waiting: dict[int, Entries] = {}  # outliers of layers before the source layer

    def __call__(self, call: AttentionCall) -> None:
        if not self._sums:
            # A model that mixes attention with other layers has its source in the first one with attention.
            self.source_layer = max(self.source_layer, call.layer)
        is_source = call.layer == self.source_layer
        how = measure if self.by_sums or call.edit is None else measure_weights
        sums, own = how(call, self.classes, self.config.threshold, self._source, is_source)
        self._sums[call.layer] = sums
        if is_source:
            self._source = own
        if self.keys is not None:
            self.keys.add(call)
            self.keys.source = self._source
            self.keys.interest += np.nan_to_num(sums.on_source)
        self._waiting[call.layer] = own
        if self._source is not None:
            source = self._source.codes(self.length)
            for layer, outliers in self._waiting.items():
                heads = len(self._sums[layer].entropy)
                outliers = outliers.to(source.device)
                self._overlaps[layer] = _overlap(outliers, self._source, source, heads, self.length)
            self._waiting.clear()
        self.layer_done(min(len(self._sums) / self.total, 1.0))

    def result(self) -> dict[int, tuple[LayerSums, _Overlap]]:
        return {layer: (sums, self._overlaps[layer]) for layer, sums in self._sums.items()}


def _overlap(own: Entries, source: Entries, source_codes: torch.Tensor, heads: int, length: int) -> _Overlap:
    # Both lists ascend and hold no place twice.
    common = own.head[among(own.codes(length), source_codes)]

    def count(head: torch.Tensor) -> Floats:
        return np.asarray(torch.bincount(head, minlength=heads)[:heads].double().cpu().numpy())

    both = count(common)
    return _Overlap(both, count(own.head) + count(source.head) - both)


def _plain_config(compare: Policy | None, threshold: float | None, source_layer: int | None) -> Rebalance:
    """A configuration that changes nothing and finds the outliers asked for, or those that ``compare`` uses."""
    like = compare.config if isinstance(compare, LearnedGains) else compare
    options: dict[str, Any] = {"threshold": threshold, "source_layer": source_layer}
    for name, value in options.items():
        own = getattr(like if isinstance(like, Rebalance) else Rebalance(), name)
        if isinstance(like, Rebalance) and value is not None and value != own:
            raise ValueError(f"{name}: {value} differs from that of compare, {own}; give it in one place")
        options[name] = own if value is None else value
    return Rebalance(alpha=0.0, **options)


def _ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not text:
        return []
    ids: list[int] = encode(tokenizer, text, chat=chat)[0].tolist()
    return ids


def _name(model: Any) -> str:
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    # A hub id stays whole, of a folder's path the last part is enough, and of a folder of the cache what its file says.
    if Path(name).is_absolute() or name.count("/") > 1:
        name = re.sub(r"-[0-9a-f]{16}$", "", Path(name).name)
    return DEFAULT_MODEL_NAME if name.startswith(f"{DEFAULT_MODEL_NAME}.") else name


def _note_context(model: Any, name: str, length: int, notes: list[str]) -> None:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        notes.append(f"{name}: {length:,} tokens are more than the {context:,} that the model was made for")


def _layer_count(patched: Patch) -> int:
    return int(patched.decoder.config.get_text_config(decoder=True).num_hidden_layers)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout; each module is left in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stack(rows: Sequence[Floats], heads: int) -> Floats:
    """``[L, heads, ...]``; NaN for heads that a layer has not."""
    result = np.full((len(rows), heads, *rows[0].shape[1:]), np.nan)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return result


def _check_shapes(runs: Sequence[_Run]) -> None:
    for run in runs[1:]:
        if (run.layers, run.heads) != (runs[0].layers, runs[0].heads):
            raise ValueError(
                f"baseline: expected as many layers and heads as the model, {len(run.layers)} and {run.heads}, got "
                f"{len(runs[0].layers)} and {runs[0].heads}"
            )


@contextlib.contextmanager
def _teller(progress: Callable[[Progress], None] | bool, total: int | None) -> Iterator[Callable[[Progress], None]]:
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda _: None
    else:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        # Of texts that come one by one nobody knows how many there are.
        known = "{l_bar}{bar}| {n:.2f} of {total_fmt} texts [{elapsed}<{remaining}]"
        unknown = "{n:.2f} texts [{elapsed}]"
        with tqdm(total=total, unit="text", bar_format=unknown if total is None else known) as bar:

            def tell(now: Progress) -> None:
                bar.update(now.text + now.fraction - bar.n)

            yield tell
