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
from attnrb.evaluation.statistics import LEAST_DIFFERING, LEVEL, POWER, RESAMPLES, accuracy, difference, holm, verdict

__all__ = ["Report", "headline", "make_report", "one_letter"]

# Of groups that hold the same tasks, the first is named.
_GROUP_ORDER = (mmlu.STEM, mmlu.NON_STEM, "mmlu", *(group for group in mmlu.GROUPS if group != mmlu.STEM))

METHODS = {
    "accuracy": f"Wilson interval, level {LEVEL}",
    "difference": f"re-balanced less plain on the same items; percentile interval of the paired bootstrap, {RESAMPLES} "
    f"resamples, level {LEVEL}",
    "mcnemar": "exact, two-sided",
    "holm": "McNemar's p, corrected after Holm over every difference of this report",
    "verdict": f"improves or worsens only where the bootstrap interval excludes 0 and holm < {1 - LEVEL:g}",
    "needed_items": f"items that a study needs to see such a difference with a chance of {POWER} (level "
    f"{1 - LEVEL:g}); only where at least {LEAST_DIFFERING} items differ",
}


@dataclass(frozen=True)
class Report:
    """The findings of a run, JSON-ready. Fields are described in docs/evaluation.md.

    In a notebook it shows its headline and its differences.
    """

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

    def __repr__(self) -> str:
        return f"Report({self.about.get('model', 'a model')!r}: {headline(self.differences)})"

    def _repr_html_(self) -> str:
        from attnrb.reports.fragment import fragment, rows_table

        lines = [
            [
                *(name, pair["arm"], pair["label"], f"{each['items']:,}", f"{100 * each['plain']:.1f} %"),
                *(f"{100 * each['rebalanced']:.1f} %", f"{100 * each['difference']:+.1f}", each["verdict"]),
            ]
            for pair in self.differences
            for name, each in pair["groups"].items()
        ]
        head = ["tasks", "model", "prompt", "questions", "plain right", "edited right", "change, points", "verdict"]
        return fragment(
            f"Evaluation of {self.about.get('model', 'a model')}", headline(self.differences), rows_table(head, lines)
        )

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
        members = {name: [q for task in tasks for q in by_task.get(task, ())] for name, tasks in groups.items()}
        members = {name: group for name, group in members.items() if group}
        correct: dict[str, dict[str, list[bool]]] = {}
        for arm, config in arms.items():
            kept = {name: [records[q.key(arm)] for q in group] for name, group in members.items()}
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
                    "groups": {name: _group(kept[name], members[name]) for name in shared if name in kept},
                    "subjects": {name: _group(kept[name], members[name]) for name in subjects if name in kept},
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


def headline(differences: Sequence[Mapping[str, Any]]) -> str:
    """What was found, in a sentence: in how many comparisons, and where."""
    several = len({(pair["arm"], pair["label"]) for pair in differences}) > 1
    found: dict[str, list[str]] = {}
    for pair in differences:
        for name, each in pair["groups"].items():
            where = f"{name} ({pair['arm']}, {pair['label']})" if several else name
            found.setdefault(each["verdict"], []).append(where)
    total = sum(map(len, found.values()))
    if not total:
        return "Nothing was compared."
    what = "comparison" if several else "group"
    shown = [
        f"{words} in {len(found[verdict])} of {total} {what}{'s' if total > 1 else ''}: {', '.join(found[verdict])}"
        for verdict, words in (("improves", "Better"), ("worsens", "Worse"))
        if verdict in found
    ]
    silent = len(found.get("no difference shown", ()))
    if silent:
        shown.append(f"No difference shown in {silent} of {total} {what}{'s' if total > 1 else ''}")
    return ". ".join(shown) + "."


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


def _group(answers: Sequence[Mapping[str, Any]], questions: Sequence[Question]) -> dict[str, Any]:
    found = asdict(accuracy([bool(each["correct"]) for each in answers]))
    return {
        **found,
        "wilson": list(found["wilson"]),
        "no_answer": sum(each["answer"] is None for each in answers),
        "answers": _letters([each for each, asked in zip(answers, questions, strict=True) if _by_letter(asked)]),
    }


def _by_letter(question: Question) -> bool:
    """Whether the model answers with a letter, rather than by how likely the wording of each choice is."""
    by_likelihood = all(getattr(each, "request_type", "") == "loglikelihood" for each in question.requests)
    return bool(question.doc.get("lettered", True)) or question.cell.prompting == "cot" or not by_likelihood


def _letters(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often each letter was answered; empty where answers are no letters."""
    counts = Counter(each["answer"] for each in answers if each["answer"] is not None)
    return dict(sorted(counts.items())) if all(len(answer) == 1 and answer.isupper() for answer in counts) else {}


_LEAST_ANSWERS = 20  # of fewer, nine in ten being alike says little


def one_letter(group: Mapping[str, Any]) -> str | None:
    """The letter of nine in ten answers of a group, if there is one: its accuracy then tells of that letter alone.

    None also for a group of fewer than 20 items, and where no letters are answered.
    """
    if group["items"] < _LEAST_ANSWERS:
        return None
    letter = max(group["answers"], key=group["answers"].__getitem__, default=None)
    return letter if letter is not None and group["answers"][letter] >= 0.9 * group["items"] else None


def _spread(values: Sequence[int]) -> dict[str, float | int | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def _groups(selected: Sequence[Selected]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Tasks of each group that is compared, in the order of a report, and single subjects of MMLU, which are not.

    A subject that was asked for alone is compared, and under its own name.
    """
    members: dict[str, list[str]] = {}
    for each in selected:
        for group in each.groups:
            members.setdefault(group, []).append(each.name)
    subjects = {name: tasks for name, tasks in members.items() if name.removeprefix("mmlu_") in mmlu.SUBJECTS}
    alone = next(iter(subjects)) if len(subjects) == 1 else None
    named: dict[tuple[str, ...], str] = {}  # the first name of a set of tasks stands for it
    for name in (*_GROUP_ORDER, *members):
        if name in members and name not in subjects:
            tasks = tuple(members[name])
            named.setdefault(tasks, alone if alone is not None and tasks == (alone,) else name)
    if alone is not None:
        subjects.clear()
    shared = {name: list(tasks) for tasks, name in named.items()}
    return shared, subjects
