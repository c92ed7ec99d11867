"""Find spans by what they say, in a batch that is tokenised already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnrb.protocols import Tokenizer
from attnrb.text.decoding import decode, decode_offsets, special_ids
from attnrb.text.marked import BatchRow, batch_rows
from attnrb.text.offsets import RowOffsets
from attnrb.text.placing import trimmed
from attnrb.text.spans import Span, SpanError, Spans, check_strength

__all__ = ["find_spans"]

_NO_TEXT = "\uffff"  # no character at all, so no phrase holds it


def find_spans(
    inputs: Any,
    phrases: str | Sequence[str] | Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    *,
    every: bool = True,
    strength: float | None = None,
    missing_ok: bool = False,
) -> Spans:
    """The tokens that say certain phrases.

        spans = attnrb.find_spans(inputs, "the capital is B", tokenizer)

    The tokens are decoded, and a span is all tokens that hold a character of the phrase, also where it is cut into
    other tokens than by itself. Letters and white space must be the same; where the tokenizer changes texts (to lower
    case, say), it may change the phrase likewise. A phrase is found inside words too.

    Args:
        inputs: a ``BatchEncoding`` or another mapping with ``input_ids`` and perhaps ``attention_mask``, or the ids
            alone: a tensor, array or list ``[n]`` or ``[B, n]``.
        phrases: one phrase or several, looked for in every row; or a list of phrases for each row.
        tokenizer: the Hugging Face tokenizer that made `inputs`.
        every: find all places where a phrase stands, that do not overlap, or only the first. Default: all.
        strength: of the spans. Default: the policy's.
        missing_ok: a row may be without a phrase. Default: that is an error.

    Returns:
        `Spans`, in slots of `inputs`, in the order of the phrases and then of the text. Special tokens say nothing.

    Raises:
        SpanError: a row is without a phrase, or the tokens cannot be told apart in what they decode to.
        TypeError: `inputs` or `phrases` is of another type.
        ValueError: a phrase is empty, or there is not one list of phrases for each row.
    """
    rows = batch_rows(inputs)
    strength = None if strength is None else check_strength("strength", strength)
    found = []
    for index, (row, wanted) in enumerate(zip(rows, _for_rows(phrases, len(rows)), strict=True)):
        found.append(tuple(_in_row(row, wanted, tokenizer, every, strength, missing_ok, f"row {index}")))
    return Spans(tuple(found))


def _for_rows(phrases: Any, rows: int) -> list[list[str]]:
    if isinstance(phrases, str):
        phrases = [phrases]
    if not isinstance(phrases, Sequence):
        raise TypeError(f"phrases: expected a string or a list, got {phrases!r}")
    if all(isinstance(phrase, str) for phrase in phrases):
        listed = [list(phrases)] * rows
    elif any(isinstance(phrase, str) or not isinstance(phrase, Sequence) for phrase in phrases):
        raise TypeError(f"phrases: expected strings, or a list of strings for each row, got {phrases!r:.80}")
    else:
        listed = [list(own) for own in phrases]
    if len(listed) != rows:
        raise ValueError(f"phrases: expected {rows} lists, one for each row, got {len(listed)}")
    for phrase in (phrase for own in listed for phrase in own):
        if not isinstance(phrase, str):
            raise TypeError(f"phrases: expected strings, got {phrase!r}")
        if not phrase.strip():
            raise ValueError(f"phrases: expected more than white space, got {phrase!r}")
    return listed


def _in_row(
    row: BatchRow,
    phrases: list[str],
    tokenizer: Any,
    every: bool,
    strength: float | None,
    missing_ok: bool,
    name: str,
) -> Iterator[Span]:
    decoded = decode_offsets(tokenizer, row.ids, name)
    characters = list(decoded.text)
    special = special_ids(tokenizer)
    for token, start, end in zip(row.ids, decoded.starts, decoded.ends, strict=True):
        if token in special:
            characters[start:end] = _NO_TEXT * (end - start)
    text = "".join(characters)
    offsets = RowOffsets(np.array(decoded.starts, dtype=np.int64), np.array(decoded.ends, dtype=np.int64))
    for phrase in phrases:
        places = _places(text, phrase)
        if not places:
            written = decode(tokenizer, tokenizer(phrase, add_special_tokens=False)["input_ids"]).strip()
            places = _places(text, written) if written else []
        if not places and not missing_ok:
            raise SpanError(f"phrases: {name} does not hold {phrase!r}; it says {text.replace(_NO_TEXT, '')[:200]!r}")
        for start, end in places if every else places[:1]:
            tokens = offsets.tokens_of(*trimmed(text, start, end))
            if tokens is not None:
                yield Span(row.first + tokens[0], row.first + tokens[1], strength)


def _places(text: str, phrase: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(re.escape(phrase), text)]
