"""Runs a study: the model as it is, then one training run after the other. What is finished is not done again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnrb.reports.files import write_whole

from structured.data import Blocks, Records
from structured.settings import Run, Settings

RESULT, ATTENTION = "result.json", "attention.json"
BEFORE = "before"
_KEPT_TEXTS = 2

Say = Callable[[str], None]


def study(
    settings: Settings,
    runs: Sequence[Run],
    records: Records,
    folder: Path,
    say: Say,
    tell: Any,
    finished: Callable[[], object],
) -> None:
    """Do what is not done yet. Each run's results are on disk before the next begins.

    Args:
        settings: what to train, and how.
        runs: in which order.
        records: of the data.
        folder: of the study.
        say: told what happens outside training, a line each.
        tell: told how far training is: see `structured.training.Tell`.
        finished: called after each part that is done.
    """
    loader = _Loader(settings, say)
    blocks = _tokenize(settings, records, loader)
    if not _done(folder / BEFORE):
        _before(settings, records, blocks[1], folder / BEFORE, loader, say)
        finished()
    for run in runs:
        if not _done(folder / run.name):
            _run(settings, run, records, blocks, folder / run.name, loader, say, tell)
            finished()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a study. Raises ValueError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output: {str(folder)!r} is in use by another process") from None
        yield


class _Loader:
    """Loads the model again for each run, since training changes it."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self._settings, self._say = settings, say
        self._tokenizer: Any = None
        self._unused: Any = None

    def model(self) -> Any:
        from attnrb.models import load

        model, self._unused = self._unused, None
        if model is None:
            model, self._tokenizer = load(self._settings.model, "float32", progress=self._say)
        return model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._unused = self.model()
        return self._tokenizer


def _done(folder: Path) -> bool:
    return (folder / RESULT).exists()


def _tokenize(settings: Settings, records: Records, loader: _Loader) -> tuple[Blocks, Blocks]:
    training = Blocks(loader.tokenizer, records.training, settings.length)
    return training, Blocks(loader.tokenizer, records.held_out, settings.length)


def _before(settings: Settings, records: Records, held_out: Blocks, folder: Path, loader: _Loader, say: Say) -> None:
    """Losses and attention of the model before training, plain and re-balanced."""
    model = loader.model()
    losses = {}
    for name, config in (("plain", None), ("rebalanced", settings.config)):
        say(f"Held-out loss before training, {name}")
        losses[name] = _loss(model, config, settings, held_out)
    _analyze(settings, records, folder, say, loader.tokenizer, model, compare=settings.config)
    _write(folder / RESULT, {"held_out": losses})


def _run(
    settings: Settings,
    run: Run,
    records: Records,
    blocks: tuple[Blocks, Blocks],
    folder: Path,
    loader: _Loader,
    say: Say,
    tell: Any,
) -> None:
    from structured.training import train

    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{run.name}: training")
    trained = train(loader.model(), run, settings, *blocks, folder, tell)
    applied = None if run.arm == "plain" else trained.gains or settings.config
    say(f"{run.name}: held-out loss after training")
    final = _loss(trained.model, applied, settings, blocks[1])
    baseline = None if trained.gains is not None else loader.model()
    _analyze(settings, records, folder, say, loader.tokenizer, trained.model, compare=applied, baseline=baseline)
    result = {
        "arm": run.arm,
        "seed": run.seed,
        "training": trained.losses.training,
        "held_out_curve": trained.losses.held_out,
        "held_out": final,
        "gains": None if trained.gains is None else trained.gains.matrix().tolist(),
        "seconds_since_start": time.monotonic() - started,
    }
    _write(folder / RESULT, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _loss(model: Any, applied: Any, settings: Settings, blocks: Blocks) -> dict[str, float]:
    """Of all held-out blocks, in both precisions: what was trained in, to compare with the curves, and float32."""
    from structured.training import evaluate

    losses = {}
    for precision in dict.fromkeys((settings.precision, "float32")):
        losses[precision] = evaluate(model, applied, dataclasses.replace(settings, precision=precision), blocks)
    return losses


def _analyze(
    settings: Settings, records: Records, folder: Path, say: Say, tokenizer: Any, model: Any, **others: Any
) -> None:
    """Measure where attention goes, on held-out records in texts about as long as a block."""
    if settings.analysis_texts == 0:
        return
    from attnrb.analysis import analyze

    texts = _texts(settings, records, tokenizer)

    def done(at: Any) -> None:
        if at.fraction == 1.0:
            say(f"{folder.name}: attention, text {at.text + 1} of {at.texts}")

    report = analyze(
        model,
        tokenizer,
        texts,
        threshold=getattr(settings.config, "threshold", None),
        source_layer=getattr(settings.config, "source_layer", None),
        max_tokens=settings.length,
        keep_texts=_KEPT_TEXTS,
        progress=done,
        **others,
    )
    folder.mkdir(parents=True, exist_ok=True)
    report.to_json(folder / ATTENTION)


def _texts(settings: Settings, records: Records, tokenizer: Any) -> list[str]:
    """Whole records with the end-of-text token between, as in training."""
    texts, text, length = [], "", 0
    for record in records.held_out:
        tokens = len(tokenizer(record, add_special_tokens=False)["input_ids"]) + 1
        if text and length + tokens > settings.length:
            texts.append(text)
            text, length = "", 0
        text += record + tokenizer.eos_token
        length += tokens
    texts.append(text)
    return texts[: settings.analysis_texts]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content) + "\n")
