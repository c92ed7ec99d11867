"""Text as files and arguments bring it: byte-order marks go, and what is no text is refused in words."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

__all__ = [
    "BYTE_ORDER_MARK",
    "as_typed",
    "check_text",
    "is_number",
    "is_whole_number",
    "parse_json",
    "read_text",
    "reads_as_number",
]

BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
"""What some editors put before UTF-8. It would become a model's first token, the one that attention sinks into."""


_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# As JSON writes them, and what Python prints for others.
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def is_whole_number(text: str) -> bool:
    """Whether a text is a whole number, as `is_number` has it."""
    return _WHOLE.fullmatch(text) is not None


def is_number(text: str) -> bool:
    """Whether a text is a number: not ``1_000``, in which a slip of the pen reads as one, nor digits of other scripts.

    Python's ``int`` and ``float`` take both. NaN and infinities pass: what takes a number says whether it takes those.
    """
    return _NUMBER.fullmatch(text) is not None


def reads_as_number(text: str) -> bool:
    """Whether Python takes a text for a number, ``1_000`` and digits of other scripts among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_typed(text: str) -> str:
    """Text that a person typed: UTF-8, also where the locale says ASCII and each byte came as half of a pair."""
    try:
        return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text  # bytes of another encoding, which whoever takes the text refuses


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        which = " but UTF-16, which an editor can save as UTF-8" if error.object[:2] in _UTF_16 else ""
        raise ValueError(f"{str(path)!r} is not UTF-8 text{which}: byte {error.start} cannot be read") from error
    except OSError as error:
        raise ValueError(f"{str(path)!r} could not be read: {error.strerror or error}") from error


def parse_json(text: str, *, finite: bool = False) -> Any:
    """The value of a JSON document in which a key that stands twice is an error, and not the last one's.

    Args:
        text: the document.
        finite: refuse ``NaN`` and ``Infinity``, which JSON has not and Python reads.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse if finite else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in it twice")
    return found


def check_text(name: str, value: Any) -> None:
    """Refuse text that no tokenizer takes and no file holds: half of a surrogate pair, or bytes that were no UTF-8.

    Args:
        name: of what is checked, for the message.
        value: a text, or lists and dictionaries of texts, keys included; anything else passes.

    Raises:
        ValueError: a text holds a lone surrogate.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            check_text(name, key)
            check_text(name, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            check_text(name, each)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: expected text, but character {error.start + 1} is U+{ord(value[error.start]):04X}, half of a "
                "surrogate pair, or a byte that was no UTF-8"
            ) from None
