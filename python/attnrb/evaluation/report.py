"""What a run found, from the answers in its file: accuracies, differences, and all that is needed to repeat it."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from attnrb.evaluation import mmlu
from attnrb.evaluation.runfile import Key
from attnrb.evaluation.runner import PLAIN, Question
from attnrb.evaluation.selection import Cell, Selected
from attnrb.evaluation.statistics import LEVEL, POWER, RESAMPLES, accuracy, difference, holm, verdict

__all__ = ["Report", "make_report", "one_letter"]

# Of groups that hold the same tasks, the first is named.
_GROUP_ORDER = (mmlu.STEM, mmlu.NON_STEM, "mmlu", *(group for group in mmlu.GROUPS if group != mmlu.STEM))

METHODS = {
    "accuracy": f"Wilson interval, level {LEVEL}",
    "difference": f"re-balanced less plain on the same items; percentile interval of the paired bootstrap, {RESAMPLES} "
    f"resamples, level {LEVEL}",
    "mcnemar": "exact, two-sided",
    "holm": "McNemar's p, corrected after Holm over every difference of this report",
    "verdict": f"improves or worsens only where the bootstrap interval excludes 0 and holm < {1 - LEVEL:g}",
    "needed_items": f"items that a study needs to see such a difference with a chance of {POWER} (level {1 - LEVEL:g})",
}


@dataclass(frozen=True)
class Report:
    """The findings of a run, JSON-ready. Fields are described in docs/evaluation.md."""

    results: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    correction: dict[str, Any]
    tasks: dict[str, Any]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Every field, with what was run first."""
        return {
            **self.about,
            "tasks": self.tasks,
            "results": self.results,
            "differences": self.differences,
            "correction": self.correction,
            "methods": METHODS,
        }

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One row for each model, way of asking and group, with the difference from plain where there is one."""
        found = {(each["arm"], each["prompting"], str(each["budget"])): each["groups"] for each in self.differences}
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for result in self.results:
            pairs = found.get((result["arm"], result["prompting"], str(result["budget"])), {})
            for kind in ("groups", "subjects"):
                for name, group in result[kind].items():
                    pair = pairs.get(name, {}) if kind == "groups" else {}
                    writer.writerow(
                        {
                            "model": self.about["model"],
                            "arm": result["arm"],
                            "config": json.dumps(result["config"]),
                            "prompting": result["prompting"],
                            "budget": "" if result["budget"] is None else "-".join(map(str, result["budget"])),
                            "group": name,
                            "items": group["items"],
                            "correct": group["correct"],
                            "accuracy": group["accuracy"],
                            "wilson_low": group["wilson"][0],
                            "wilson_high": group["wilson"][1],
                            "computed_tokens": result["computed_tokens"]["mean"],
                            "no_answer": group["no_answer"],
                            "difference": pair.get("difference", ""),
                            "bootstrap_low": pair["bootstrap"][0] if pair else "",
                            "bootstrap_high": pair["bootstrap"][1] if pair else "",
                            "mcnemar": pair["mcnemar"]["p"] if pair else "",
                            "holm": pair.get("holm", ""),
                            "verdict": pair.get("verdict", ""),
                            "needed_items": pair.get("needed_items", ""),
                            "seed": self.about["seed"],
                            "attnrb": self.about["environment"]["attnrb"],
                        }
                    )
        return text.getvalue()


_COLUMNS = (
    *("model", "arm", "config", "prompting", "budget", "group", "items", "correct", "accuracy", "wilson_low"),
    *(
        "wilson_high",
        "computed_tokens",
        "no_answer",
        "difference",
        "bootstrap_low",
        "bootstrap_high",
        "mcnemar",
        "holm",
    ),
    *("verdict", "needed_items", "seed", "attnrb"),
)


def make_report(
    records: Mapping[Key, Mapping[str, Any]],
    questions: Sequence[Question],
    selected: Sequence[Selected],
    arms: Mapping[str, dict[str, Any] | None],
    about: Mapping[str, Any],
    *,
    seed: int = 0,
) -> Report:
    """Sum up the answers to `questions`.

    Groups that hold the same items are reported once. Where a question lacks an answer of one of the models, as in a
    run that was stopped, none of its answers counts.

    Args:
        records: the answers, of the run's file.
        questions: what was asked.
        selected: the tasks.
        arms: configurations by label; None for the plain model.
        about: what was run, for the report.
        seed: of the bootstrap.
    """
    shared, subjects = _groups(selected)
    groups = {**shared, **subjects}
    results, pairs = [], []
    for cell in dict.fromkeys(question.cell for question in questions):
        asked = [question for question in questions if question.cell == cell]
        answered = [question for question in asked if all(question.key(arm) in records for arm in arms)]
        by_task: dict[str, list[Question]] = {}
        for question in answered:
            by_task.setdefault(question.task, []).append(question)
        correct: dict[str, dict[str, list[bool]]] = {}
        for arm, config in arms.items():
            kept = {
                name: [records[q.key(arm)] for task in tasks for q in by_task.get(task, ())]
                for name, tasks in groups.items()
            }
            kept = {name: answers for name, answers in kept.items() if answers}
            correct[arm] = {name: [bool(each["correct"]) for each in answers] for name, answers in kept.items()}
            every = [records[question.key(arm)] for question in answered]
            results.append(
                {
                    "arm": arm,
                    "config": config,
                    **_cell(cell),
                    "computed_tokens": _spread([each["computed_tokens"] for each in every]),
                    "extensions": sum(each.get("extensions", 0) for each in every),
                    "truncated": sum(bool(each.get("truncated")) for each in every),
                    "groups": {name: _group(kept[name]) for name in shared if name in kept},
                    "subjects": {name: _group(kept[name]) for name in subjects if name in kept},
                }
            )
        if PLAIN in arms:
            for arm in arms:
                if arm != PLAIN:
                    found = {
                        name: difference(correct[PLAIN][name], correct[arm][name], seed=seed)
                        for name in shared
                        if name in correct[arm]
                    }
                    pairs.append((arm, cell, found))
    return Report(
        results=results,
        differences=_differences(pairs),
        correction={
            "method": "holm",
            "over": [f"{arm} {cell.label} {name}" for arm, cell, found in pairs for name in found],
        },
        tasks={each.name: each.about() for each in selected},
        about=dict(about),
    )


def _differences(pairs: Sequence[tuple[str, Cell, dict[str, Any]]]) -> list[dict[str, Any]]:
    adjusted = iter(holm([each.mcnemar for _, _, found in pairs for each in found.values()]))
    differences = []
    for arm, cell, found in pairs:
        groups = {}
        for name, each in found.items():
            p = next(adjusted)
            groups[name] = {
                "items": each.items,
                "plain": each.plain,
                "rebalanced": each.rebalanced,
                "difference": each.difference,
                "bootstrap": list(each.bootstrap),
                "mcnemar": {"p": each.mcnemar, "only_plain": each.only_plain, "only_rebalanced": each.only_rebalanced},
                "holm": p,
                "verdict": verdict(each, p),
                "needed_items": each.needed_items,
            }
        differences.append({"arm": arm, **_cell(cell), "groups": groups})
    return differences


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "prompting": cell.prompting,
        "budget": None if cell.budget is None else list(cell.budget),
        "label": cell.label,
    }


def _group(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = asdict(accuracy([bool(each["correct"]) for each in answers]))
    return {
        **found,
        "wilson": list(found["wilson"]),
        "no_answer": sum(each["answer"] is None for each in answers),
        "answers": _letters(answers),
    }


def _letters(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often each letter was answered; empty where answers are no letters."""
    counts = Counter(each["answer"] for each in answers if each["answer"] is not None)
    return dict(sorted(counts.items())) if all(len(answer) == 1 and answer.isupper() for answer in counts) else {}


def one_letter(group: Mapping[str, Any]) -> str | None:
    """The letter of nine in ten answers of a group, if there is one: its accuracy then tells of that letter alone."""
    letter = max(group["answers"], key=group["answers"].__getitem__, default=None)
    return letter if letter is not None and group["answers"][letter] >= 0.9 * group["items"] else None


def _spread(values: Sequence[int]) -> dict[str, float | int | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def _groups(selected: Sequence[Selected]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Tasks of each group that is compared, in the order of a report, and single subjects of MMLU, which are not."""
    members: dict[str, list[str]] = {}
    for each in selected:
        for group in each.groups:
            members.setdefault(group, []).append(each.name)
    subjects = {name: tasks for name, tasks in members.items() if name.removeprefix("mmlu_") in mmlu.SUBJECTS}
    named: dict[tuple[str, ...], str] = {}  # the first name of a set of tasks stands for it
    for name in (*_GROUP_ORDER, *members):
        if name in members and name not in subjects:
            named.setdefault(tuple(members[name]), name)
    shared = {name: list(tasks) for tasks, name in named.items()}
    return shared, subjects
