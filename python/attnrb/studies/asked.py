"""What the arms of a study are asked: items by task and split, and which of them an arm gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attnrb.evaluation.runfile import Key
from attnrb.studies.arms import Arm
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import StudyItem
from attnrb.studies.plan import StudyPlan, study_tasks, without_files

__all__ = ["Asked", "Question"]

DEVELOPMENT, HELD_OUT = SPLITS

_CHARACTERS_PER_TOKEN = 4
_WRITTEN_WEIGHT = 6  # work of a written token, in tokens of a prompt


class Question(NamedTuple):
    """An item that an arm is asked."""

    arm: Arm
    task: str
    split: str
    number: int
    item: StudyItem
    written: int = 0
    """New tokens at most, computed ones among them."""

    @property
    def key(self) -> Key:
        """Of the answer."""
        return Key(self.task, self.number, self.arm.name, self.split, None)

    @property
    def read(self) -> int:
        """About how many tokens the model reads."""
        # Candidates of one token need no forward of their own.
        more = sum(map(len, self.item.candidates)) if self.item.per_character else 0
        return (len(self.item.text(self.arm.form)[0]) + more) // _CHARACTERS_PER_TOKEN + 1

    @property
    def work(self) -> int:
        """About how much work an answer is, in tokens of a prompt."""
        return self.read + _WRITTEN_WEIGHT * self.written


class Asked:
    """The tasks of a plan that fit into a model's context, and their items.

    Args:
        plan: whose tasks.
        context: of the model, in tokens; None: any length fits.

    Attributes:
        tasks: by name.
        left_out: tasks that are not asked, and why.
    """

    def __init__(self, plan: StudyPlan, context: int | None) -> None:
        self.plan = plan
        self.tasks = study_tasks(plan, context)
        why = f"its prompts are longer than the model's context of {context} tokens"
        self.left_out = {name: why for name in study_tasks(plan) if name not in self.tasks}
        self.left_out |= dict.fromkeys(without_files(plan), "the folder of data has no file for it")
        self._items: dict[tuple[str, str], Sequence[StudyItem]] = {}

    @property
    def ranked(self) -> tuple[str, ...]:
        """The tasks that heads are ranked for."""
        return tuple(name for name, task in self.tasks.items() if task.profiled)

    @property
    def compared(self) -> tuple[str, ...]:
        """The tasks whose candidates are compared."""
        return tuple(name for name, task in self.tasks.items() if task.tokens is None)

    def items(self, task: str, split: str) -> Sequence[StudyItem]:
        """The items of a task; of the development ones the first rank heads, and the others choose a setting."""
        if (task, split) not in self._items:
            plan, mine = self.plan, self.tasks[task]
            count = mine.held_out if split == HELD_OUT else plan.examples + plan.development
            self._items[task, split] = mine.items(count, split, plan.seed)
        return self._items[task, split]

    def questions(self, arm: Arm, split: str, tasks: Sequence[str] | None = None) -> list[Question]:
        """What an arm is asked: of all tasks, or of some."""
        found = []
        for task in self.tasks if tasks is None else tasks:
            if arm.asks(task):
                items = list(enumerate(self.items(task, split)))
                items = items[: arm.items(len(items))] if split == HELD_OUT else items[self.plan.examples :]
                mine = self.tasks[task]
                written = (
                    0 if mine.tokens is None else mine.tokens if mine.budget is None else mine.budget + mine.tokens
                )
                found += [Question(arm, task, split, index, item, written) for index, item in items]
        return found
