"""Read evaluation items from files: MMLU's CSV, and JSON lines of questions with choices or with a number as answer.

Nothing is guessed from the text of a field: ``None`` and ``NA`` are answers like any other, and quoted fields keep
their commas and newlines. A row that cannot be an item is an error that names the file, the line and what was expected.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrb.evaluation import mmlu
from attnrb.text.reading import check_text, parse_json

__all__ = ["LETTERS", "DataError", "Item", "ItemSet", "read_items", "task_names"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_DESCRIPTION = "The following are multiple choice questions (with answers) about {}.\n\n"
_SIQA_NOTE = "two-choice form of Social IQa; the original has three choices, so figures cannot be compared with it"


# What float() takes beside is no answer: nan, infinity, 1_000, digits of other scripts.
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][+-]?\d+)?", re.ASCII)


class DataError(ValueError):
    """A data file is missing, unreadable or malformed. The message is one sentence that says where and what."""


@dataclass(frozen=True)
class Item:
    """One question."""

    index: int
    """Its place in the file, from 0."""
    question: str
    """The question without its choices."""
    prompt: str
    """The direct prompt: it ends where the answer begins."""
    choices: tuple[str, ...]
    """Texts of the choices; empty where the answer is a number."""
    gold: int | None
    """Index of the right choice; None where the answer is a number."""
    answer: str
    """The right choice's letter, or the number."""
    lettered: bool = True
    """Whether the direct prompt lists the choices by letter and scores the letter; otherwise it scores their texts."""


@dataclass(frozen=True)
class ItemSet:
    """The items of one task."""

    task: str
    items: tuple[Item, ...]
    groups: tuple[str, ...]
    """Groups whose figures these items count in, the task itself first."""
    file: str
    """Name of the file, relative to the data folder."""
    sha256: str
    """Of the file."""
    description: str = ""
    """Line above the first question of a direct prompt."""
    note: str | None = None
    """What a reader of a figure has to know."""
    numeric: bool = False
    """Whether answers are numbers."""


def task_names(data: Path) -> list[str]:
    """Tasks that the folder `data` has files for: ``mmlu_<subject>`` and the names of its ``.jsonl`` files.

    Raises:
        DataError: there is no such folder.
    """
    if not data.is_dir():
        raise DataError(f"data: there is no folder {str(data)!r}")
    subjects = [f"mmlu_{subject}" for subject in mmlu.SUBJECTS if _mmlu_file(data, subject).is_file()]
    return subjects + sorted(path.stem for path in data.glob("*.jsonl"))


def read_items(data: Path, task: str) -> ItemSet:
    """The items of a task, read from its file in the folder `data`.

    ``mmlu_<subject>`` is ``mmlu/<subject>_test.csv``, without a header: question, four choices, letter. Any other task
    is ``<task>.jsonl``, whose lines have either ``query``, ``choices`` and ``gold`` (an index), or ``context`` and
    ``answer`` (a number).

    Raises:
        DataError: the file is missing, unreadable or malformed.
    """
    subject = task.removeprefix("mmlu_")
    if task.startswith("mmlu_") and subject in mmlu.SUBJECTS:
        path = _mmlu_file(data, subject)
        return ItemSet(
            task=task,
            items=tuple(_mmlu_items(path)),
            groups=(task, *mmlu.groups_of(subject)),
            file=f"mmlu/{path.name}",
            sha256=_sha256(path),
            description=_DESCRIPTION.format(subject.replace("_", " ")),
        )
    path = data / f"{task}.jsonl"
    items = tuple(_json_items(path))
    return ItemSet(
        task=task,
        items=items,
        groups=(task,),
        file=path.name,
        sha256=_sha256(path),
        note=_SIQA_NOTE if task == "siqa" and len(items[0].choices) == 2 else None,
        numeric=items[0].gold is None,
    )


def _mmlu_file(data: Path, subject: str) -> Path:
    inside = data / "mmlu" / f"{subject}_test.csv"
    return inside if inside.is_file() or not (data / inside.name).is_file() else data / inside.name


def _text(path: Path) -> str:
    try:
        # Newlines as they are: universal newlines would alter those inside quoted fields.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"data: there is no file {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data: {str(path)!r} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"data: {str(path)!r} could not be read: {error.strerror}") from None


def _mmlu_items(path: Path) -> Iterator[Item]:
    # The csv module alone: readers of tables turn "None" and "NA" into missing values.
    text = _text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a field may be as long as the file
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    index = 0
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"data: {path.name}, line {line}: {error}") from None
        if not row:
            continue
        if len(row) != 6:
            raise DataError(
                f"data: {path.name}, line {line}: expected 6 fields (question, four choices, letter), got {len(row)}"
            )
        question, *choices, letter = row
        letter = letter.strip()
        if len(letter) != 1 or letter not in "ABCD":
            raise DataError(f"data: {path.name}, line {line}: expected the letter A, B, C or D, got {letter!r}")
        if not question.strip():
            raise DataError(f"data: {path.name}, line {line}: expected a question, got none")
        yield Item(
            index, question.strip(), _mmlu_prompt(question, choices), tuple(choices), LETTERS.index(letter), letter
        )
        index += 1
    if index == 0:
        raise DataError(f"data: {path.name} holds no items")


def _mmlu_prompt(question: str, choices: Sequence[str]) -> str:
    """The prompt of lm-evaluation-harness' mmlu tasks."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question.strip()}\n{options}\nAnswer:"


def _json_items(path: Path) -> Iterator[Item]:
    index = 0
    numeric: bool | None = None
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"data: {path.name}, line {number}"
        try:
            row = parse_json(line, finite=True)
            check_text("a field", row)
        except ValueError as error:
            raise DataError(f"{where}: no JSON of texts and numbers ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        item = _choice_item(where, index, row) if "choices" in row else _number_item(where, index, row)
        if numeric is not None and numeric != (item.gold is None):
            raise DataError(f"{where}: expected the fields of the lines before, got {', '.join(sorted(row))}")
        numeric = item.gold is None
        yield item
        index += 1
    if index == 0:
        raise DataError(f"data: {path.name} holds no items")


def _choice_item(where: str, index: int, row: dict[str, Any]) -> Item:
    query, choices, gold = _string(where, row, "query"), row["choices"], row.get("gold")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{where}: choices: expected a list of texts, got {choices!r}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{where}: choices: expected 2 to {len(LETTERS)}, got {len(choices)}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise DataError(f"{where}: gold: expected an index from 0 to {len(choices) - 1}, got {gold!r}")
    letters = list(LETTERS[: len(choices)])
    if choices != letters:
        question = query.strip().removeprefix("Question: ")
        return Item(index, question, f"{query.rstrip()}\nAnswer:", tuple(choices), gold, LETTERS[gold], lettered=False)
    # The query lists its own options; their texts are needed where an answer names one instead of its letter.
    body = query.rstrip().removesuffix("Answer:").rstrip()
    texts = [_option(where, body, letter) for letter in letters]
    question = body.split(f"\n{letters[0]}. ")[0].removesuffix("\nChoices:")
    return Item(index, question, f"{body}\nAnswer:", tuple(texts), gold, LETTERS[gold])


def _option(where: str, query: str, letter: str) -> str:
    for line in query.split("\n"):
        if line.startswith(f"{letter}. "):
            return line[3:].strip()
    raise DataError(f"{where}: query: expected a line '{letter}. ...' with that option, found none")


def _number_item(where: str, index: int, row: dict[str, Any]) -> Item:
    question = _string(where, row, "context")
    answer = row.get("answer")
    text = str(answer).strip()
    if _NUMBER.fullmatch(text) is None or not math.isfinite(float(text.replace(",", ""))):
        raise DataError(f"{where}: answer: expected a number, got {answer!r}")
    text = text.replace(",", "")
    return Item(index, question, f"Question: {question}\nAnswer:", (), None, text)


def _string(where: str, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name}: expected some text, got {value!r}")
    return value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
