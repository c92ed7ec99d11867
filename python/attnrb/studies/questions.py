"""Questions of public data sets for the study of re-balancing, read from files of the user's own.

Choices are compared by the likelihood of their texts, per character, behind the question alone. Small models answer
such a question better than one that lists its options by letter, where they name one letter throughout. With a chain of
thought the options are listed, and the answer is read from what the model writes: see `attnrb.evaluation.prompts`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attnrb.evaluation import mmlu
from attnrb.evaluation.data import DataError, Item, read_items
from attnrb.evaluation.extraction import extract_choice, extract_number
from attnrb.evaluation.prompts import chain_of_thought
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import StudyItem, WrittenItem
from attnrb.studies.natural import present
from attnrb.text.mark import mark, spans
from attnrb.text.marked import Marked

__all__ = ["QUESTIONS", "ThoughtItem", "question_files", "question_items", "question_tasks"]

_DEVELOPMENT_SHARE = 0.4
_LONGEST = 700  # characters of a question: a few in MMLU have pages, which would cost as much as all others
_OPEN, _CLOSE = "⟦", "⟧"


class _Source(NamedTuple):
    """Where questions come from."""

    tasks: tuple[str, ...]
    """As `attnrb.evaluation.data.read_items` names them."""
    chance: float
    """What guessing gets right."""
    written: bool = False
    """Whether answers are numbers, which are written in any case."""
    thought: bool = False
    """Whether it is asked with a chain of thought as well."""


QUESTIONS: Mapping[str, _Source] = {
    "piqa": _Source(("piqa",), 1 / 2),
    "siqa": _Source(("siqa",), 1 / 2, thought=True),
    "mmlu stem": _Source(tuple(f"mmlu_{each}" for each in mmlu.GROUPS[mmlu.STEM]), 1 / 4),
    "mmlu non-stem": _Source(
        tuple(f"mmlu_{each}" for each, group in mmlu.SUBJECTS.items() if group != mmlu.STEM), 1 / 4
    ),
    "gsm8k": _Source(("gsm8k",), 1 / 50, written=True, thought=True),
}


@dataclass(frozen=True)
class ThoughtItem(WrittenItem):
    """A question that is thought about. Its one candidate is the right letter or number."""

    choices: tuple[str, ...] = ()
    """Texts of the options; empty where the answer is a number."""

    def judge(self, text: str) -> bool:
        """Whether the answer's line gives the right one."""
        line = text.strip().split("\n")[0]
        found = extract_choice(line, self.choices) if self.choices else extract_number(line)
        return found.answer == self.candidates[0]

    def prompt(self, tokenizer: Any, form: str = "as it is", span: str = "none") -> Marked:
        """The prompt's tokens, in the tokenizer's chat template if it has one."""
        text, _ = self.text(form, span)
        if not getattr(tokenizer, "chat_template", None):
            return spans(tokenizer, f"{text}\n\nAnalysis:", [])
        return mark(tokenizer, [{"role": "user", "content": text}], open=_OPEN, close=_CLOSE)


def _in_split(item: Item, split: str) -> bool:
    drawn = int(hashlib.sha256(item.question.encode()).hexdigest()[:8], 16) / 2**32
    return (drawn < _DEVELOPMENT_SHARE) == (split == SPLITS[0])


def question_tasks(data: Path) -> tuple[str, ...]:
    """The tasks that a folder has a file for.

    Raises:
        DataError: there is no such folder.
    """
    return tuple(task for task, source in QUESTIONS.items() if present(data, source.tasks))


def question_files(data: Path, task: str) -> dict[str, str]:
    """The files that the questions come from, with their SHA-256.

    Raises:
        DataError: one is missing or malformed.
    """
    found = [read_items(data, name) for name in present(data, QUESTIONS[task].tasks)]
    return {each.file: each.sha256 for each in found}


def question_items(data: Path, task: str, split: str, seed: int, *, thought: bool = False) -> Iterator[StudyItem]:
    """The questions of a task, as many as the files hold, in an order drawn by the seed.

    Args:
        data: the folder of the files.
        task: one of `QUESTIONS`.
        split: one of `attnrb.studies.conflict.SPLITS`; what the question says decides its split.
        seed: another one draws another order.
        thought: ask for a chain of thought.

    Raises:
        DataError: a file is missing or malformed, or has no questions of this split.
    """
    names = present(data, QUESTIONS[task].tasks)
    items = [(name, item) for name in names for item in read_items(data, name).items]
    mine = [pair for pair in items if _in_split(pair[1], split) and len(pair[1].question) <= _LONGEST]
    random.Random(f"questions {task} {split} {seed}").shuffle(mine)
    if not mine:
        raise DataError(f"data: the files for {task} in {str(data)!r} hold no {split} questions")
    for name, item in mine:
        subject = name.removeprefix("mmlu_") if name.startswith("mmlu_") else ""
        if thought:
            text = chain_of_thought(item, chat=True)
            yield ThoughtItem((), 0, 0, text, (item.answer,), subject, choices=item.choices)
            continue
        assert item.gold is not None, "numbers are written"
        right, *others = item.choices[item.gold], *(each for each in item.choices if each != item.choices[item.gold])
        words = tuple(each.strip() for each in (right, *others))
        if all(words) and len(set(words)) == len(item.choices):
            text = item.question if item.question.startswith("Context:") else f"Question: {item.question}"
            yield StudyItem((), 0, 0, f"{text}\nAnswer:", words, subject, per_character=True)
