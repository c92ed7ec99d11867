"""Items from text that people wrote: questions with their passages or contexts, read from files of the user's own.

    items = natural_items(Path("data"), "siqa", "held-out", seed=0)

============== ========================================================== =====================================
task           what the prompt says                                       what is marked
============== ========================================================== =====================================
``siqa``       two situations of Social IQa, and a question about one      that situation
``passages``   two historical sources of MMLU, and a question about one    that source
``questions``  two questions of MMLU, and the beginning of an answer       the question that is to be answered
``piqa``       a sentence that has nothing to do with it, and PIQA's       the sentence: a price, no help
============== ========================================================== =====================================

Files are those of ``attnrb eval --data``. The candidates of ``questions`` are the right answers of both, so that the
model shows which one it answers; all others have the candidates of the data set. What stands in the text that an item
is about decides its split, so that no source and no situation is in both.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from attnrb.evaluation import mmlu
from attnrb.evaluation.data import DataError, Item, read_items, task_names
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import ASIDES, StudyItem

__all__ = ["NATURAL", "natural_files", "natural_items", "natural_tasks", "present"]

_SOURCES = ("high_school_european_history", "high_school_us_history", "high_school_world_history")
_SOURCE_INTRODUCTION = "This question refers to the following information."
_LONGEST_SOURCE = 1200  # characters, question included
_DEVELOPMENT_SHARE = 0.4
_CAPITALISED = re.compile(r"\b[A-Z][a-z]+")
_SITUATION = re.compile(r"(?:Context: )?(?P<situation>.+?)\nQuestion: (?P<question>.+?)\s*(?:\nChoices:.*)?", re.DOTALL)
_OF_OTHERS = re.compile(r"\b(?:all|none|both|neither|above|below|following|[A-D] and [A-D])\b", re.IGNORECASE)


class _Text(NamedTuple):
    """A text, and a question about it with its candidates, the right one first."""

    text: str
    question: str
    candidates: tuple[str, ...]
    group: str = ""


def _in_split(text: str, split: str) -> bool:
    drawn = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return (drawn < _DEVELOPMENT_SHARE) == (split == SPLITS[0])


def _right_first(item: Item) -> tuple[str, ...]:
    assert item.gold is not None, "these data sets have choices"
    others = [choice.strip() for index, choice in enumerate(item.choices) if index != item.gold]
    return (item.choices[item.gold].strip(), *others)


def _is_usable(candidates: Sequence[str]) -> bool:
    return all(candidates) and len(set(candidates)) == len(candidates)


def _situations(data: Path) -> Iterator[_Text]:
    for item in read_items(data, "siqa").items:
        match = _SITUATION.fullmatch(item.question.removesuffix("Answer:").strip())
        candidates = _right_first(item)
        if match is not None and _is_usable(candidates):
            yield _Text(match["situation"].strip(), match["question"].strip(), candidates)


def _sources(data: Path) -> Iterator[_Text]:
    for name in present(data, _FILES["passages"]):
        subject = name.removeprefix("mmlu_")
        for item in read_items(data, name).items:
            first, *source = item.question.split("\n")
            candidates = _right_first(item)
            fits = first.strip() == _SOURCE_INTRODUCTION and len(item.question) <= _LONGEST_SOURCE
            if fits and len(source) > 1 and _is_usable(candidates):
                yield _Text("\n".join(source[:-1]).strip(), source[-1].strip(), candidates, subject)


def _short_questions(data: Path) -> Iterator[_Text]:
    for name in present(data, _FILES["questions"]):
        for item in read_items(data, name).items:
            right = _right_first(item)[0]
            fits = 20 <= len(item.question) <= 200 and 4 <= len(right) <= 60 and item.question.endswith("?")
            if fits and "\n" not in item.question and not _OF_OTHERS.search(right + " " + item.question):
                yield _Text(item.question, "Answer:", (right,))


def _drawn(texts: Iterator[_Text], split: str, seed: int, name: str) -> tuple[list[_Text], random.Random]:
    """The texts of a split in an order of their own, and what draws the rest."""
    draw = random.Random(f"{name} {split} {seed}")
    mine = [each for each in texts if _in_split(each.text, split)]
    draw.shuffle(mine)
    return mine, draw


def _other(one: _Text, texts: Sequence[_Text], draw: random.Random) -> _Text | None:
    """A text about somebody else."""
    names = set(_CAPITALISED.findall(one.text))
    for _ in range(50):
        other = draw.choice(texts)
        if other.text != one.text and not names & set(_CAPITALISED.findall(other.text)):
            return other
    return None


def _siqa(data: Path, split: str, seed: int) -> Iterator[StudyItem]:
    texts, draw = _drawn(_situations(data), split, seed, "siqa")
    for each in texts:
        other = _other(each, texts, draw)
        if other is not None:
            yield _pair(each, other, draw, f"Question: {each.question}\nAnswer:", each.candidates, "\n")


def _passages(data: Path, split: str, seed: int) -> Iterator[StudyItem]:
    texts, draw = _drawn(_sources(data), split, seed, "passages")
    for each in texts:
        others = [other for other in texts if other.text != each.text]
        if others:
            question = f"Question: {each.question}\nAnswer:"
            yield _pair(each, draw.choice(others), draw, question, each.candidates, "\n\n")


def _questions(data: Path, split: str, seed: int) -> Iterator[StudyItem]:
    texts, draw = _drawn(_short_questions(data), split, seed, "questions")
    for each in texts:
        other = draw.choice(texts)
        [right], [wrong] = each.candidates, other.candidates
        if right.lower() != wrong.lower():
            yield _pair(each, other, draw, "Answer:", (right, wrong), "\n")


def _pair(
    one: _Text, other: _Text, draw: random.Random, question: str, candidates: tuple[str, ...], joint: str
) -> StudyItem:
    marked = draw.randrange(2)
    texts = (one.text, other.text) if marked == 0 else (other.text, one.text)
    place = ("first", "second")[marked]
    return StudyItem(texts, marked, 1 - marked, question, candidates, place, joint, per_character=True)


def _piqa(data: Path, split: str, seed: int) -> Iterator[StudyItem]:
    draw = random.Random(f"piqa {split} {seed}")
    items = [item for item in read_items(data, "piqa").items if _in_split(item.question, split)]
    draw.shuffle(items)
    for item in items:
        candidates = _right_first(item)
        if _is_usable(candidates):
            aside = draw.choice(ASIDES[SPLITS.index(split)])
            question = f"Question: {item.question}\nAnswer:"
            yield StudyItem((aside,), 0, 0, question, candidates, joint="\n", per_character=True)


NATURAL: Mapping[str, Callable[[Path, str, int], Iterator[StudyItem]]] = {
    "siqa": _siqa,
    "passages": _passages,
    "questions": _questions,
    "piqa": _piqa,
}
"""What makes the items of each task: see `natural_items`."""

_FILES = {
    "siqa": ("siqa",),
    "passages": tuple(f"mmlu_{subject}" for subject in _SOURCES),
    "questions": tuple(f"mmlu_{subject}" for subject in mmlu.SUBJECTS),
    "piqa": ("piqa",),
}


def natural_tasks(data: Path) -> tuple[str, ...]:
    """The tasks that a folder has a file for.

    Raises:
        DataError: there is no such folder.
    """
    return tuple(task for task in NATURAL if present(data, _FILES[task]))


def present(data: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some data sets, as `attnrb.evaluation.data.read_items` names them, that a folder has a file for.

    Raises:
        DataError: there is no such folder.
    """
    known = set(task_names(data))
    return tuple(name for name in names if name in known)


def natural_files(data: Path, task: str) -> dict[str, str]:
    """The files that a task's items come from, with their SHA-256.

    Raises:
        DataError: one is missing or malformed.
    """
    found = [read_items(data, name) for name in present(data, _FILES[task])]
    return {each.file: each.sha256 for each in found}


def natural_items(data: Path, task: str, split: str, seed: int) -> Iterator[StudyItem]:
    """The items of a task, as many as the files hold, in an order drawn by the seed.

    Args:
        data: the folder of the files.
        task: one of `NATURAL`.
        split: one of `attnrb.studies.conflict.SPLITS`.
        seed: another one draws others.

    Raises:
        DataError: a file is missing or malformed, or has nothing for this task.
        ValueError: ``task`` or ``split`` is unknown.
    """
    if task not in NATURAL:
        raise ValueError(f"task: expected one of {', '.join(NATURAL)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    some = False
    for item in NATURAL[task](data, split, seed):
        some = True
        yield item
    if not some:
        raise DataError(f"data: the files for {task} in {str(data)!r} hold no {split} items of its kind")
