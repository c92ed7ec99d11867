"""Text from tokens made harmless: no character that drives a terminal or reorders what stands around it."""

from __future__ import annotations

import unicodedata

# Direction marks can reorder what stands around them.
_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """`text` with control characters and direction marks replaced by visible ones; newlines stay, tabs become spaces.

    A model can write any character, escape sequences that would drive the terminal included. Lone surrogates, as in
    the names of files that are no UTF-8, go too: no stream takes them.
    """
    return "".join(_visible(character) for character in text.replace("\t", "    "))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures
    if unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION_MARKS:
        return "\N{REPLACEMENT CHARACTER}"
    return character
