"""Search for the re-balancing that suits a model, on a development split, and report on items that it never saw.

Note: [Two splits]
Of many settings that are tried on the same items, the best looks better there than it is. So each task's items are
shuffled and split: settings are compared on the development items alone, and what is reported is the one chosen, on the
held-out items. Figures of the development split are shown with the trials, and are not a result.

Note: [Successive halving]
Most settings are bad, which a few items show. With a factor f, all settings are tried on a few of the development items
of each task, the best of each f go on to f times as many, and so on until the last ones are compared on all (Jamieson
and Talwalkar, arXiv 1502.07943). The sampler learns from the first round.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnrb.evaluation import mmlu
from attnrb.evaluation.data import DataError
from attnrb.evaluation.grid import about_run, begin, open_run
from attnrb.evaluation.plan import TaskPlan
from attnrb.evaluation.report import Report, make_report
from attnrb.evaluation.runfile import RunFile
from attnrb.evaluation.runner import PLAIN, Progress, Question, arm_label, prepare, run
from attnrb.evaluation.selection import Cell, Selected
from attnrb.policies import Policy, Rebalance

__all__ = ["SearchPlan", "SearchResult", "Trial", "halving_rounds", "search"]

_LEAST_ITEMS = 4  # of each task in the first round: fewer tell nothing


@dataclass(frozen=True)
class SearchPlan(TaskPlan):
    """What to search, and where.

    Attributes:
        evaluations: settings to try, the default one first.
        development: development items of each task, each subject of MMLU.
        held_out: held-out items of each. Default: all others.
        alpha: bounds of the strength.
        threshold: bounds of the threshold, tried on a logarithmic scale.
        most_source_layer: highest source layer. Default: a quarter of the model's layers.
        policy: the policy whose ``ranges`` are searched. Default: re-balancing, over the four options above.
        ranges: for options of ``policy`` their bounds, as ``(name, low, high)``; whole numbers where both bounds are.
        candidates: policies of any kind, learnt gains among them, that are tried before the others.
        halving: the factor of Note: [Successive halving], at least 2; None tries every setting on all items.
    """

    command = "search"
    growing = (
        "evaluations",
        "development",
        "held_out",
        "alpha",
        "threshold",
        "most_source_layer",
        "candidates",
        "halving",
    )

    evaluations: int = 20
    development: int = 20
    held_out: int | None = None
    alpha: tuple[float, float] = (0.0, 1.0)
    threshold: tuple[float, float] = (0.002, 0.1)
    most_source_layer: int | None = None
    policy: Policy | None = None
    ranges: tuple[tuple[str, float, float], ...] = ()
    candidates: tuple[Policy, ...] = ()
    halving: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(evaluations=1, development=1, held_out=1, halving=2)
        for name in ("alpha", "threshold"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name}: expected a lower and a higher bound, got {low:g} and {high:g}")
        Rebalance(alpha=self.alpha[0], threshold=self.threshold[0])
        Rebalance(alpha=self.alpha[1], threshold=self.threshold[1])
        if bool(self.ranges) != (self.policy is not None):
            raise ValueError("ranges: expected together with the policy whose options they bound")
        for name, low, high in self.ranges:
            if not low < high:
                raise ValueError(f"ranges: expected a lower and a higher bound of {name}, got {low:g} and {high:g}")
            for bound in (low, high):  # the policy says what is wrong with a name or a bound
                _with_options(self.policy, {name: bound})


@dataclass(frozen=True)
class Trial:
    """A setting that was tried on the development split."""

    number: int
    config: Policy
    label: str
    accuracy: float
    """Of all development items."""
    changed: float
    """Share of development items whose answer is not the plain model's."""
    objectives: tuple[float, float]
    pareto: bool
    """Whether no other trial on as many items is as good in both objectives and better in one."""
    items: int
    """Development items of each task that all this is of."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        return {**vars(self), "config": self.config.to_dict(), "objectives": list(self.objectives)}


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    chosen: Policy
    trials: tuple[Trial, ...]
    objectives: tuple[str, str]
    """What the two objectives of a trial are; more is better."""
    plain: tuple[float, float]
    """Objectives of the plain model."""
    held_out: Report
    """The chosen setting against the plain model, on held-out items."""

    def __repr__(self) -> str:
        return f"SearchResult({self.chosen!r} of {len(self.trials)} trials; held out: {self.held_out!r})"

    def _repr_html_(self) -> str:
        return self.held_out._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-ready."""
        return {
            "chosen": self.chosen.to_dict(),
            "held_out": self.held_out.to_dict(),
            "development": {
                "note": "the setting was chosen by these figures, which are therefore not a result",
                "objectives": list(self.objectives),
                "plain": list(self.plain),
                "trials": [trial.to_dict() for trial in self.trials],
            },
        }

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def search(
    lm: Any,
    plan: SearchPlan,
    run_file: Path,
    *,
    model: str,
    selected: Sequence[Selected] | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
    step: Callable[[str], None] | None = None,
) -> SearchResult | None:
    """Search, or go on with a search: see Note: [Two splits].

    The sampler is Optuna's TPE, for two objectives: accuracy outside STEM and in it, where the tasks have both, else
    accuracy and the share of answers that stay the same. The setting of the highest accuracy on all development items
    is chosen, and of equals the one that changes fewer answers. Asked again with the same seed, it tries the same
    settings, whose finished items are in the file.

    Args:
        lm: an `attnrb.hosts.lm_eval.model.AttnrbLM`, made with ``plain=True``.
        plan: what to do.
        run_file: the file of finished items. Where it exists, the search continues.
        model: the model's name, for the report.
        selected: the plan's tasks, where they are read already.
        progress: called as items are finished; True shows a bar.
        step: called with a short line before each step that may take seconds.

    Returns:
        The result; None in all processes but the first of a run in several.

    Raises:
        DataError: a task does not exist, its file is missing or malformed, or it has too few items.
        RunFileError: the run's file cannot be used or written.
        ValueError: an option is out of range.
    """
    import optuna

    say = step or (lambda _: None)
    start = time.perf_counter()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    selected = begin(lm, plan, selected, say)
    for candidate in plan.candidates:  # one that does not fit the model fails before hours of work
        with lm.rebalanced(candidate):
            pass
    development, held_out = _splits(lm, selected, plan)
    layers = int(lm.model.config.get_text_config().num_hidden_layers)
    most_source = layers // 4 if plan.most_source_layer is None else plan.most_source_layer
    if not 0 <= most_source < layers - 1:
        raise ValueError(f"most_source_layer: this model has layers 0 to {layers - 1}, got {most_source}")

    sampler = optuna.samplers.TPESampler(seed=plan.seed, n_startup_trials=min(10, max(3, plan.evaluations // 3)))
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    if plan.policy is None:
        study.enqueue_trial(
            {"alpha": 0.2, "threshold": 0.01, "source_layer": 0, "one_end": 1, "other_end": layers - 1},
            skip_if_exists=True,
        )
    rounds = halving_rounds(plan.development, plan.halving)
    with open_run(lm, run_file, plan) as file:

        def measured(config: Policy, items: int) -> _Measured:
            questions = _first(development, items)
            _run_all(lm, questions, {PLAIN: None, arm_label(config): config}, file, progress)
            return _Measured(config, items, *_measure(questions, selected)(file, arm_label(config)))

        found: list[_Measured] = []
        settings = len(plan.candidates) + plan.evaluations
        for number in range(settings):
            trial = None if number < len(plan.candidates) else study.ask()
            config = plan.candidates[number] if trial is None else _config(trial, plan, layers, most_source)
            say(f"Trial {number + 1} of {settings}: {arm_label(config)}")
            found.append(measured(config, rounds[0]))
            if trial is not None:
                study.tell(trial, list(found[-1].objectives))
        left = list(range(settings))
        for items in rounds[1:]:
            left = _best(left, found)[: -(-len(left) // (plan.halving or 1))]
            for number in left:
                say(f"{items} items: {arm_label(found[number].config)}")
                found[number] = measured(found[number].config, items)
        _run_all(lm, development, {PLAIN: None}, file, progress)
        chosen = found[_best(left, found)[0]].config
        measure = _measure(development, selected)
        plain = measure(file, PLAIN)[2]
        say(f"Held-out items: {arm_label(chosen)}")
        arms: dict[str, Policy | None] = {PLAIN: None, arm_label(chosen): chosen}
        _run_all(lm, held_out, arms, file, progress)
        if lm.rank:
            return None
        configs = {label: None if each is None else each.to_dict() for label, each in arms.items()}
        about = about_run(lm, plan, file, model=model, answers=len(held_out) * len(arms), start=start)
        report = make_report(file.records, held_out, selected, configs, about, seed=plan.seed)
    return SearchResult(chosen, _trials(found), _objectives(selected), plain, report)


class _Measured(NamedTuple):
    """A setting, and what came of it."""

    config: Policy
    items: int
    accuracy: float
    changed: float
    objectives: tuple[float, float]


def halving_rounds(items: int, factor: int | None) -> tuple[int, ...]:
    """Development items of each task in each round, the last one with all: see Note: [Successive halving]."""
    rounds = [items]
    while factor is not None and rounds[0] // factor >= _LEAST_ITEMS:
        rounds.insert(0, rounds[0] // factor)
    return tuple(rounds)


def _best(numbers: Sequence[int], found: Sequence[_Measured]) -> list[int]:
    """The numbers of some settings, those with the highest accuracy first; of equals the ones that change less."""
    return sorted(numbers, key=lambda number: (-found[number].accuracy, found[number].changed, number))


def _first(questions: Sequence[Question], items: int) -> list[Question]:
    """The first items of each task."""
    seen: dict[str, int] = {}
    first = []
    for question in questions:
        seen[question.task] = seen.get(question.task, 0) + 1
        if seen[question.task] <= items:
            first.append(question)
    return first


def _run_all(
    lm: Any,
    questions: Sequence[Question],
    arms: Mapping[str, Policy | None],
    file: RunFile,
    progress: Callable[[Progress], None] | bool | None,
) -> None:
    run(lm, questions, arms, file, progress=progress)
    if lm.world_size > 1:  # every process needs what all have found, to try the same settings
        lm.barrier()
        file.reread()


def _splits(lm: Any, selected: Sequence[Selected], plan: SearchPlan) -> tuple[list[Question], list[Question]]:
    development: dict[str, list[int]] = {}
    held_out: dict[str, list[int]] = {}
    for each in selected:
        size = len(each.build(Cell("direct")).eval_docs)
        if size <= plan.development:
            raise DataError(
                f"development: {each.name} has {size} items, which leaves none held out beside {plan.development}"
            )
        places = list(range(size))
        random.Random(f"{plan.seed} {each.name}").shuffle(places)
        development[each.name] = places[: plan.development]
        rest = places[plan.development :]
        held_out[each.name] = rest[: plan.held_out]
    cells = [Cell("direct")]
    return (
        prepare(lm, selected, cells, items=development, chat=plan.chat),
        prepare(lm, selected, cells, items=held_out, chat=plan.chat),
    )


def _with_options(policy: Policy | None, options: Mapping[str, Any]) -> Policy:
    """A policy with some of its options changed."""
    assert policy is not None
    return Policy.from_dict({**policy.to_dict(), **options})


def _config(trial: Any, plan: SearchPlan, layers: int, most_source: int) -> Policy:
    if plan.ranges:
        options: dict[str, float] = {}
        for name, low, high in plan.ranges:
            if isinstance(low, int) and isinstance(high, int):
                options[name] = trial.suggest_int(name, low, high)
            else:
                options[name] = float(f"{trial.suggest_float(name, low, high):.3g}")
        return _with_options(plan.policy, options)
    # Rounded, so that a label tells two settings apart.
    alpha = round(trial.suggest_float("alpha", *plan.alpha), 3)
    threshold = float(f"{trial.suggest_float('threshold', *plan.threshold, log=True):.2g}")
    source = trial.suggest_int("source_layer", 0, most_source)
    ends = sorted((trial.suggest_int("one_end", 1, layers - 1), trial.suggest_int("other_end", 1, layers - 1)))
    first, last = max(source + 1, ends[0]), max(source + 1, ends[1])
    every = first == source + 1 and last == layers - 1
    return Rebalance(
        alpha=alpha, threshold=threshold, source_layer=source, layers=None if every else tuple(range(first, last + 1))
    )


def _objectives(selected: Sequence[Selected]) -> tuple[str, str]:
    groups = {group for each in selected for group in each.groups}
    if {mmlu.STEM, mmlu.NON_STEM} <= groups:
        return ("accuracy, non_stem", "accuracy, stem")
    return ("accuracy", "share of answers unchanged")


def _measure(
    questions: Sequence[Question], selected: Sequence[Selected]
) -> Callable[[RunFile, str], tuple[float, float, tuple[float, float]]]:
    """What a trial is measured by: accuracy, share of answers changed, and the two objectives."""
    groups = {each.name: each.groups for each in selected}
    by_group = _objectives(selected)[0] != "accuracy"

    def measure(file: RunFile, arm: str) -> tuple[float, float, tuple[float, float]]:
        records = [(question, file.records[question.key(arm)]) for question in questions]
        accuracy = float(np.mean([record["correct"] for _, record in records]))
        changed = float(np.mean([record["answer"] != file.records[q.key(PLAIN)]["answer"] for q, record in records]))
        if not by_group:
            return accuracy, changed, (accuracy, 1.0 - changed)
        shares = [
            float(np.mean([record["correct"] for question, record in records if group in groups[question.task]]))
            for group in (mmlu.NON_STEM, mmlu.STEM)
        ]
        return accuracy, changed, (shares[0], shares[1])

    return measure


def _trials(found: Sequence[_Measured]) -> tuple[Trial, ...]:
    def dominated(one: _Measured) -> bool:
        alike = [each.objectives for each in found if each.items == one.items and each.objectives != one.objectives]
        return any(other[0] >= one.objectives[0] and other[1] >= one.objectives[1] for other in alike)

    return tuple(
        Trial(
            number,
            each.config,
            arm_label(each.config),
            each.accuracy,
            each.changed,
            each.objectives,
            not dominated(each),
            each.items,
        )
        for number, each in enumerate(found)
    )
