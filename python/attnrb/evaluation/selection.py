"""From names of tasks to tasks of the harness: those with files in the data folder, and those that it knows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrb.evaluation import mmlu
from attnrb.evaluation.data import DataError, ItemSet, read_items, task_names
from attnrb.evaluation.tasks import cot_task, direct_task

__all__ = ["Cell", "Selected", "cells_of", "select"]

_MMLU_NAMES = {
    "mmlu": tuple(mmlu.SUBJECTS),
    **{f"mmlu_{group}": members for group, members in mmlu.GROUPS.items()},
    f"mmlu_{mmlu.NON_STEM}": tuple(subject for subject, group in mmlu.SUBJECTS.items() if group != mmlu.STEM),
}


@dataclass(frozen=True)
class Cell:
    """A way to ask: the prompting, and for a chain of thought its budget."""

    prompting: str
    """``direct`` or ``cot``."""
    budget: tuple[int, int] | None = None
    """Computed tokens at least and at most; None for ``direct``."""

    @property
    def label(self) -> str:
        """For a person."""
        if self.budget is None:
            return "direct"
        low, high = self.budget
        return f"cot {high}" if low == high else f"cot {low}–{high}"


@dataclass(frozen=True)
class Selected:
    """A task that was asked for."""

    name: str
    groups: tuple[str, ...]
    """Groups whose figures it counts in, itself first."""
    build: Callable[[Cell], Any]
    """Makes the harness' task for a cell."""
    items: ItemSet | None
    """Its items, where they come from a file."""

    def about(self) -> dict[str, Any]:
        """What a report says of it, JSON-ready."""
        if self.items is None:
            return {"groups": list(self.groups), "source": "lm-evaluation-harness"}
        return {
            "groups": list(self.groups),
            "file": self.items.file,
            "sha256": self.items.sha256,
            "items_in_file": len(self.items.items),
            "note": self.items.note,
        }


def cells_of(prompting: str, budgets: Sequence[int] | None, minimum: int, maximum: int) -> tuple[Cell, ...]:
    """The cells that the options ask for.

    Args:
        prompting: ``direct``, ``cot`` or ``both``.
        budgets: numbers of computed tokens, each of which is a cell with exactly that many.
        minimum: computed tokens at least, without `budgets`.
        maximum: computed tokens at most, without `budgets`.

    Raises:
        ValueError: an option is out of range, or budgets are given for direct prompting alone.
    """
    if prompting not in ("direct", "cot", "both"):
        raise ValueError(f"prompting: expected direct, cot or both, got {prompting!r}")
    if budgets is not None and prompting == "direct":
        raise ValueError("budgets: expected --prompting cot or both, since direct prompting computes no tokens")
    if any(budget < 0 for budget in budgets or ()):
        raise ValueError(f"budgets: expected numbers of 0 or above, got {list(budgets or ())}")
    if not 0 <= minimum <= maximum:
        raise ValueError(f"min_computed: expected from 0 to the maximum of {maximum}, got {minimum}")
    cells = [] if prompting == "cot" else [Cell("direct")]
    if prompting != "direct":
        held = [(minimum, maximum)] if budgets is None else [(budget, budget) for budget in sorted(set(budgets))]
        cells += [Cell("cot", budget) for budget in held]
    return tuple(cells)


def select(
    names: Sequence[str],
    data: Path | None,
    *,
    include_path: Path | None = None,
    shots: int = 0,
    generated: bool = False,
    chat: bool = False,
) -> tuple[Selected, ...]:
    """The tasks of these names, each once, in their order.

    With a data folder, names are those of its files, ``mmlu`` for all subjects, and ``mmlu_stem``, ``mmlu_non_stem``,
    ``mmlu_humanities``, ``mmlu_social_sciences`` and ``mmlu_other``; other names, and all without a folder, are those
    of lm-evaluation-harness, which downloads their items, and of the task files in `include_path`.

    Raises:
        DataError: there is no such task, file or folder, or a file is malformed, or a download failed.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise DataError("tasks: expected at least one, got none")
    if include_path is not None and not include_path.is_dir():
        raise DataError(f"include_path: there is no folder {str(include_path)!r}")
    selected: dict[str, Selected] = {}
    known = [] if data is None else task_names(data)
    manager: Any = None
    for name in names:
        members = [f"mmlu_{subject}" for subject in _MMLU_NAMES.get(name, ())] or [name]
        if data is not None and (name in known or members[0].removeprefix("mmlu_") in mmlu.SUBJECTS):
            for member in members:
                selected.setdefault(member, _from_file(data, member, shots, generated, chat))
        else:
            manager = manager or _task_manager(include_path)
            for found in _from_harness(manager, name, known, shots, generated):
                selected.setdefault(found.name, found)
    return tuple(selected.values())


def _from_file(data: Path, name: str, shots: int, generated: bool, chat: bool) -> Selected:
    items = read_items(data, name)

    def build(cell: Cell) -> Any:
        if cell.budget is None:
            return direct_task(items, shots=shots, generated=generated)
        return cot_task(items, minimum=cell.budget[0], maximum=cell.budget[1], chat=chat)

    return Selected(name, items.groups, build, items)


def _task_manager(include_path: Path | None) -> Any:
    """The harness' index of tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path))


def _from_harness(manager: Any, name: str, known: Sequence[str], shots: int, generated: bool) -> list[Selected]:
    if name not in manager.all_tasks:
        offline = [*(["mmlu"] if any(each.startswith("mmlu_") for each in known) else []), *known]
        close = difflib.get_close_matches(name, dict.fromkeys([*offline, *manager.all_tasks]), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        files = [each for each in offline if not each.startswith("mmlu_")]
        here = f"the data folder has {', '.join(files)}, and " if files else ""
        raise DataError(f"tasks: there is no task {name!r}: {here}`lm-eval ls tasks` lists those of the harness{hint}")
    if generated:
        raise DataError(f"generated: {name} is asked as the harness does: generated answers need --data")
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise DataError(
            f"tasks: the items of {name!r} could not be loaded ({reason or type(error).__name__}); the harness "
            "downloads them: without a network, name a folder of files with --data"
        ) from error
    return [Selected(each, _harness_groups(each), _builder(task, shots), None) for each, task in tasks.items()]


def _builder(task: Any, shots: int) -> Callable[[Cell], Any]:
    if shots:  # without a number of their own, tasks keep the harness'
        task.set_config(key="num_fewshot", value=shots)

    def build(cell: Cell) -> Any:
        if cell.budget is not None:
            raise DataError(f"prompting: {task.task_name} has the harness' own prompt: a chain of thought needs --data")
        return task

    return build


def _harness_groups(name: str) -> tuple[str, ...]:
    subject = name.removeprefix("mmlu_")
    return (name, *mmlu.groups_of(subject)) if name.startswith("mmlu_") and subject in mmlu.SUBJECTS else (name,)
