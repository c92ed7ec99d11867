"""Which tokens a span should have, found in other ways than by the code under test."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from attnrb.text import MarkupError, Span, SpanError, mark, parse_markup
from hypothesis import assume
from hypothesis import strategies as st
from text_tokenizers import texts


def held_characters(tokenizer: Any, text: str) -> list[set[int]]:
    """The characters of each token by the tokenizer's own map.

    The space that a tokenizer puts before a text is mapped to the first character, which it does not hold.
    """
    encoding = tokenizer(text).encodings[0]
    held = [
        set(range(*offsets)) if sequence is not None else set()
        for offsets, sequence in zip(encoding.offsets, encoding.sequence_ids, strict=True)
    ]
    for token, (own, following) in enumerate(itertools.pairwise(held)):
        if encoding.tokens[token] in ("▁", "Ġ") and own and own <= following:
            own.clear()
    return held


def held_bytes(token: str) -> int:
    """How many bytes of the text a token of byte-level BPE, or of SentencePiece without normaliser, holds."""
    return 1 if re.fullmatch("<0x..>", token) else len(token.replace("▁", " ").encode())


def characters_by_bytes(tokenizer: Any, text: str) -> list[set[int]]:
    """The characters of each token, by counting bytes: owes nothing to the tokenizer's map."""
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    held, done = [], 0
    encoding = tokenizer(text).encodings[0]
    byte_level = tokenizer.convert_tokens_to_ids("<0x00>") in (None, tokenizer.unk_token_id)
    for token, special in zip(encoding.tokens, encoding.special_tokens_mask, strict=True):
        count = 0 if special else len(token) if byte_level else held_bytes(token)
        held.append(set(owner[done : done + count]))
        done += count
    assert done == len(owner)
    return held


def check_row(text: str, row: tuple[Span, ...], ranges: list[Any], held: list[set[int]]) -> None:
    """Each span is the tokens that hold a marked character that is no white space, and those between them."""
    for span, (start, end, strength) in zip(row, ranges, strict=True):
        marked = {place for place in range(start, end) if not text[place].isspace()}
        if marked:
            holders = [token for token, characters in enumerate(held) if characters & marked]
            assert (span.start, span.end) == (holders[0], holders[-1] + 1)
        else:
            assert all(held[token] <= set(range(start, end)) for token in range(span.start, span.end))
        assert span.strength == strength


def check_markup(tokenizer: Any, pieces: list[tuple[str, str]], oracle: Callable[[Any, str], list[set[int]]]) -> None:
    written = {"plain": "{}", "span": "[[{}]]", "strong": "[[{}:x4]]", "nested": "[[x{} [[y{}:x2]] ]]"}
    markup = "".join(written[kind].format(text, text) for text, kind in pieces)
    try:
        plain, ranges = parse_markup(markup, "[[", "]]")
    except MarkupError:
        plain, ranges = "", []
    assume(ranges)
    held = oracle(tokenizer, plain)
    nothing = [
        not any(
            held[token] & {place for place in range(start, end) if not plain[place].isspace()}
            for token in range(len(held))
        )
        for start, end, _ in ranges
    ]
    if any(nothing):
        # White space has tokens of its own, or none; other characters without a token are refused.
        if not all(plain[start:end].isspace() for (start, end, _), none in zip(ranges, nothing, strict=True) if none):
            with pytest.raises(SpanError, match="holds no token"):
                mark(tokenizer, markup, open="[[", close="]]")
        return
    marked = mark(tokenizer, markup, open="[[", close="]]", return_tensors=None)
    assert marked.texts == (plain,)
    assert dict(marked.inputs) == dict(tokenizer(plain))
    check_row(plain, marked.spans[0], ranges, held)


def pieces(alphabet: str) -> st.SearchStrategy[list[tuple[str, str]]]:
    kinds = st.sampled_from(["plain", "span", "strong", "nested"])
    return st.lists(st.tuples(texts(alphabet, max_size=6), kinds), min_size=1, max_size=4)
