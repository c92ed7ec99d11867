"""Records from JSON lines, as text, as token blocks of equal length, and split into training and held-out ones."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Records:
    """The records of a file, in an order that depends on the seed of the split alone."""

    training: list[str]
    held_out: list[str]
    digest: str
    """SHA-256 of the file: what makes two studies comparable."""


def read_records(path: Path, *, held_out: int, limit: int | None, seed: int) -> Records:
    """Read a file of JSON lines and set some records aside.

    A line is an object. One with a field ``text`` stands for that text; any other is a card, a line for each field.
    Blank lines are passed over.

    Args:
        path: the file, in UTF-8.
        held_out: how many records are set aside.
        limit: use only so many records for training; None: all others. Those set aside do not depend on it.
        seed: of the split.

    Raises:
        ValueError: the file cannot be read, is not JSON lines, or has too few records; bad rows are named by line.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"data: {str(path)!r} could not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        bad = content[: error.start].count(b"\n") + 1
        raise ValueError(f"data: {str(path)!r}, line {bad}: not UTF-8") from error
    texts, problems = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                texts.append(_text(line))
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN_ERRORS:,} more" if len(problems) > _SHOWN_ERRORS else ""
        raise ValueError(f"data: {str(path)!r} has bad rows: {'; '.join(problems[:_SHOWN_ERRORS])}{more}")
    if len(texts) <= held_out:
        raise ValueError(
            f"data: expected more records than the {held_out:,} to be held out, got {len(texts):,} in {str(path)!r}"
        )
    random.Random(seed).shuffle(texts)
    training = texts[held_out:]
    return Records(training[:limit], texts[:held_out], hashlib.sha256(content).hexdigest())


def _text(line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON (too deeply nested)") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_kind(record)}")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise ValueError(f"text: expected a string that is not empty, got {_kind(record['text'])}")
        return record["text"]
    if not record:
        raise ValueError("expected fields, got an empty object")
    return "\n".join(f"{name}: {_value(name, value)}" for name, value in record.items())


def _value(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_value(name, each) for each in value)
    if value is None or isinstance(value, dict):
        raise ValueError(f"{name}: expected a string, number, truth value or list of them, got {_kind(value)}")
    return value if isinstance(value, str) else json.dumps(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


class Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Texts one after the other, each ended by the tokenizer's end-of-text token, cut into blocks of equal length.

    A text may go on in the next block; what does not fill the last one is left out, unless it is the only one.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or the texts are too short for one block of two tokens.
    """

    def __init__(self, tokenizer: Any, texts: list[str], length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("model: its tokenizer has no end-of-text token to put between records")
        ids: list[int] = []
        for text in texts:
            ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) < length:
            raise ValueError(f"length: expected at most the {len(ids):,} tokens that there are, got {length:,}")
        count = len(ids) // length
        self.tokens = torch.tensor(ids[: count * length]).view(count, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}
