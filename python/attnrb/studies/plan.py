"""What a study asks: its options, and the tasks that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from attnrb.evaluation.data import DataError
from attnrb.studies.instructions import instruction_items
from attnrb.studies.material import MATERIAL, StudyItem, different_items
from attnrb.studies.natural import NATURAL, natural_files, natural_items, natural_tasks
from attnrb.studies.needle import needle_items
from attnrb.studies.questions import QUESTIONS, question_files, question_items, question_tasks

__all__ = ["STUDIES", "StudyPlan", "StudyTask", "study_tasks", "without_files"]

STUDIES = ("emphasis", "rebalancing", "gains", "selection")
PRICES = ("irrelevant", "piqa")
"""Tasks whose span helps nobody."""

_ROOM = 64  # tokens that a prompt may be longer than its name says, and an answer
_SHARES = {"siqa": 0.5, "questions": 0.5, "passages": 0.2}  # of the plan's items, by the length of their prompts
_NEEDLE_TOKENS = 65_536  # that all needles of one length have together, in a plan of 500 items
_THOUGHT_SHARE = 0.12
_ANSWER_TOKENS = 12  # behind a chain of thought: room for a letter and the wording of most options, or for a number
_SHORT_NATURAL = (
    "siqa",
    "questions",
)  # natural text whose prompts are short enough to train on, or to ask hundreds of times


@dataclass(frozen=True)
class StudyPlan:
    """What a study asks.

    Attributes:
        study: one of `STUDIES`.
        quick: fewer strengths, and arms beside the main ones on a share of the items.
        items: held-out items of each task; tasks with long prompts or written answers have a share of them.
        examples: development items of each task that rank the heads.
        development: further development items of each task that the strength is chosen on.
        strengths: those to choose from.
        keep: heads of a profile.
        steps: of training, for learnt gains.
        seeds: how often gains are learnt, each time in another order.
        seed: of items and random heads.
        data: folder of the files that natural text comes from; None: no task has any.
        needles: tokens of the prompts that hold a needle; those beyond the model's context are left out.
        written: held-out items whose answer is written, and checked; 0: none.
        tokens: of a written answer at most.
        budgets: computed tokens of the chain of thought.
    """

    study: str = "emphasis"
    quick: bool = True
    items: int = 100
    examples: int = 12
    development: int = 16
    strengths: tuple[float, ...] = (8.0, 16.0)
    keep: int = 32
    steps: int = 12
    seeds: int = 1
    seed: int = 0
    data: Path | None = None
    needles: tuple[int, ...] = ()
    written: int = 0
    tokens: int = 64
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ValueError(f"study: expected one of {', '.join(STUDIES)}, got {self.study!r}")
        for name in ("items", "examples", "development", "keep", "steps", "seeds", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.written < 0 or any(budget < 0 for budget in self.budgets):
            name = "written" if self.written < 0 else "budgets"
            raise ValueError(f"{name}: expected 0 or above, got {getattr(self, name)}")
        if not self.strengths:
            raise ValueError("strengths: expected at least one, got none")
        for tokens in self.needles:
            needle_items(tokens)  # says what is wrong with a number

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that heads are ranked for: likelihoods, and a span that helps."""
        return tuple(name for name, task in study_tasks(self).items() if task.profiled)

    def to_dict(self) -> dict[str, Any]:
        """Every option, JSON-ready."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def sources(self) -> dict[str, str]:
        """The files that the items come from, with their SHA-256.

        Raises:
            DataError: one is missing or malformed.
        """
        found: dict[str, str] = {}
        for name, task in study_tasks(self).items():
            if self.data is not None and task.source is not None:
                found |= task.source(self.data, name)
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


class StudyTask(NamedTuple):
    """Items of one kind, and what is done with them."""

    make: Callable[[str, int], Iterator[StudyItem]]
    """From a split and a seed."""
    held_out: int
    """Items that are asked, if there are so many."""
    profiled: bool = True
    """Whether heads are ranked on it, and the strength chosen."""
    price: bool = False
    """Whether its span helps nobody."""
    tokens: int | None = None
    """New tokens of a written answer; None: candidates are compared."""
    budget: int | None = None
    """Computed tokens before the answer; None: it comes at once."""
    context: int = 0
    """Tokens of its prompts, where they are many."""
    source: Callable[[Path, str], dict[str, str]] | None = None
    """Files that its items come from, with their SHA-256, from the folder and the task's name."""

    def items(self, count: int, split: str, seed: int) -> tuple[StudyItem, ...]:
        """The first ``count`` different items, or all if there are fewer."""
        return different_items(self.make(split, seed), count)

    def fits(self, context: int | None) -> bool:
        """Whether its prompts fit into a model's context; None: nobody knows its length."""
        return context is None or not self.context or self.context + _ROOM <= context


def study_tasks(plan: StudyPlan, context: int | None = None) -> dict[str, StudyTask]:
    """The tasks of a plan by name, those whose span helps before the others.

    Args:
        plan: whose.
        context: the model's, in tokens; tasks with longer prompts are left out. None: none is.

    Raises:
        DataError: the folder of data is not there, or has no file for any task.
    """
    if plan.data is not None and len(without_files(plan)) == len(_known(plan)):
        raise DataError(f"data: {str(plan.data)!r} has no file for any of {', '.join(_known(plan))}")
    made = _MADE[plan.study](plan)
    fitting = {name: task for name, task in made.items() if task.fits(context)}
    return dict(sorted(fitting.items(), key=lambda pair: pair[1].price))


def _short(plan: StudyPlan) -> dict[str, StudyTask]:
    return {name: StudyTask(make, plan.items) for name, make in MATERIAL.items() if name not in PRICES}


def _known(plan: StudyPlan) -> tuple[str, ...]:
    """The tasks that a folder of data may have files for."""
    asked = {"emphasis": tuple(NATURAL), "rebalancing": tuple(QUESTIONS)}
    return asked.get(plan.study, _SHORT_NATURAL)


def without_files(plan: StudyPlan) -> tuple[str, ...]:
    """Tasks that the plan's folder of data has no file for, though it could; none without a folder."""
    if plan.data is None:
        return ()
    found = question_tasks(plan.data) if plan.study == "rebalancing" else natural_tasks(plan.data)
    return tuple(name for name in _known(plan) if name not in found)


def _with_natural(plan: StudyPlan) -> dict[str, StudyTask]:
    found = _short(plan)
    if plan.data is not None:
        for name in (name for name in natural_tasks(plan.data) if name in _SHORT_NATURAL):
            found[name] = StudyTask(partial(natural_items, plan.data, name), plan.items, source=natural_files)
    return found


def _emphasis(plan: StudyPlan) -> dict[str, StudyTask]:
    found = _short(plan)
    found |= {name: StudyTask(MATERIAL[name], plan.items, False, True) for name in PRICES if name in MATERIAL}
    if plan.data is not None:
        for name in natural_tasks(plan.data):
            price = name in PRICES
            make = partial(natural_items, plan.data, name)
            count = max(1, round(_SHARES.get(name, 1.0) * plan.items))
            found[name] = StudyTask(make, count, not price, price, source=natural_files)
    for tokens in plan.needles:
        count = max(1, round(_NEEDLE_TOKENS / tokens * plan.items / 500))
        found[f"needle {tokens}"] = StudyTask(needle_items(tokens), count, profiled=False, context=tokens)
    if plan.written:
        found["written"] = StudyTask(instruction_items, plan.written, profiled=False, tokens=plan.tokens)
    return found


def _rebalancing(plan: StudyPlan) -> dict[str, StudyTask]:
    found = _short(plan)
    if plan.data is None:
        return found
    for name in question_tasks(plan.data):
        make = partial(question_items, plan.data, name)
        if not QUESTIONS[name].written:
            found[name] = StudyTask(make, plan.items, False, source=question_files)
        for budget in plan.budgets:
            if QUESTIONS[name].thought:
                count = max(1, round(_THOUGHT_SHARE * plan.items))
                thought = partial(question_items, plan.data, name, thought=True)
                found[f"{name}, {budget} computed tokens"] = StudyTask(
                    thought, count, False, tokens=_ANSWER_TOKENS, budget=budget, source=partial(_files_of, name)
                )
    return found


def _files_of(question: str, data: Path, task: str) -> dict[str, str]:
    return question_files(data, question)


_MADE: Mapping[str, Callable[[StudyPlan], dict[str, StudyTask]]] = {
    "emphasis": _emphasis,
    "rebalancing": _rebalancing,
    "gains": _with_natural,
    "selection": _with_natural,
}
