"""Phrases found in tokens, and what tokens decode to one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attnrb.text import Span, SpanError, Spans, find_spans, mark
from attnrb.text.decoding import decode, decode_offsets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_tokenizers import KINDS, SlowTokenizer, texts

TOKENIZERS = {name: make() for name, make in KINDS.items()}
EXACT = ["byte-level", "RoBERTa", "Llama", "Gemma"]
TEXT = "The cat sat on the mat, and the cat didn't begin to rain."


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


def test_a_phrase_is_the_span_that_markup_would_mark(tokenizer: Any) -> None:
    marked = mark(tokenizer, "The ((cat sat)) on the mat, and the cat didn't ((begin)) to rain.")
    assert find_spans(marked.inputs, ["cat sat", "begin"], tokenizer) == marked.spans


def test_every_place_or_the_first(tokenizer: Any) -> None:
    both = mark(tokenizer, "The ((cat)) sat on the mat, and the ((cat)) didn't begin to rain.")
    assert find_spans(both.inputs, "cat", tokenizer) == both.spans
    first = find_spans(both.inputs, "cat", tokenizer, every=False, strength=4)
    assert first.rows == ((Span(both.spans[0][0].start, both.spans[0][0].end, 4.0),),)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_and_padding(tokenizer: Any, side: str) -> None:
    marked = mark(tokenizer, ["The cat ((sat)) on the mat", "it ((sat))"], padding_side=side)
    assert find_spans(marked.inputs, "sat", tokenizer) == marked.spans
    each = find_spans(marked.inputs, [["sat"], []], tokenizer)
    assert each.rows == (marked.spans[0], ())
    assert find_spans(marked.inputs, ["mat"], tokenizer, missing_ok=True)[1] == ()
    with pytest.raises(SpanError, match=r"phrases: row 1 does not hold 'mat'; it says '.*sat'"):
        find_spans(marked.inputs, "mat", tokenizer)


def test_ids_of_every_type() -> None:
    tokenizer = TOKENIZERS["Llama"]
    ids = tokenizer(TEXT)["input_ids"]
    expected = find_spans({"input_ids": [ids]}, "cat", tokenizer)
    assert len(expected[0]) == 2
    array = np.array(ids)
    for inputs in (ids, [ids], array, array[None], torch.tensor(ids), torch.tensor([ids]), {"input_ids": ids}):
        assert find_spans(inputs, "cat", tokenizer) == expected


def test_a_phrase_may_be_written_as_the_tokenizer_would() -> None:
    marked = mark(TOKENIZERS["WordPiece"], "The ((CAT)) sat")
    assert find_spans(marked.inputs, "CAT", TOKENIZERS["WordPiece"]) == marked.spans
    assert find_spans(marked.inputs, "cat", TOKENIZERS["WordPiece"]) == marked.spans


def test_special_tokens_say_nothing() -> None:
    tokenizer = TOKENIZERS["Llama"]
    inputs = tokenizer("the</s> s cat")
    assert "<s>" in tokenizer.decode(inputs["input_ids"])
    found = find_spans(inputs, "s", tokenizer)
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][found[0][0].start : found[0][0].end])[-1] != "</s>"
    with pytest.raises(SpanError, match="does not hold '<s>'"):
        find_spans(inputs, "<s>", tokenizer)


@pytest.mark.parametrize(
    ("inputs", "phrases", "error", "message"),
    [
        ("the cat", "cat", TypeError, r"inputs: expected token ids \[n\] or \[B, n\], got str"),
        ({"ids": [1]}, "cat", TypeError, "inputs: expected input_ids among ids"),
        ([5, 6], 3, TypeError, "phrases: expected a string or a list, got 3"),
        ([5, 6], [["a"], "b"], TypeError, "phrases: expected strings, or a list of strings for each row"),
        ([5, 6], [["a"], ["b"]], ValueError, "phrases: expected 1 lists, one for each row, got 2"),
        ([5, 6], " ", ValueError, "phrases: expected more than white space, got ' '"),
        ([5, 6], [[3]], TypeError, "phrases: expected strings, got 3"),
    ],
)
def test_bad_calls_are_refused(inputs: Any, phrases: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_spans(inputs, phrases, TOKENIZERS["byte-level"])


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=80)
@given(text=texts(max_size=16))
def test_tokens_are_told_apart_as_their_tokenizer_maps_them(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    encoding = tokenizer(text, add_special_tokens=False).encodings[0]
    if "\N{REPLACEMENT CHARACTER}" in text and name in ("Llama", "Gemma"):
        assume(_is_told_apart(tokenizer, encoding.ids))  # as unfinished bytes are written alike
    decoded = decode_offsets(tokenizer, encoding.ids)
    assert decoded.text == decode(tokenizer, encoding.ids)
    assume(decoded.text.lstrip(" ") == text.lstrip(" "))
    moved = len(text) - len(decoded.text)
    for token, (start, end) in enumerate(zip(decoded.starts, decoded.ends, strict=True)):
        begin, stop = encoding.offsets[token]
        said = text[max(start + moved, 0) : max(end + moved, 0)]
        if encoding.tokens[token] in ("▁", "Ġ") and token + 1 < len(decoded.starts) and not said.strip():
            continue  # a space that the tokenizer puts before the text is mapped to what follows
        if name == "RoBERTa":  # its map leaves white space out
            assert said.strip(" \t\n\xa0") == text[begin:stop].strip(" \t\n\xa0")
        else:
            assert said == text[begin:stop]


def _is_told_apart(tokenizer: Any, ids: list[int]) -> bool:
    try:
        decode_offsets(tokenizer, ids)
    except SpanError as error:
        return "cannot be told apart" not in str(error)
    return True


@settings(max_examples=100)
@given(st.lists(st.integers(0, 319), max_size=24))
def test_any_ids_decode_or_are_refused(ids: list[int]) -> None:
    """A model may write half a character, and what follows it need not finish it."""
    tokenizer = TOKENIZERS["byte-level"]
    assume(_is_told_apart(tokenizer, ids))
    decoded = decode_offsets(tokenizer, ids)
    assert decoded.text == decode(tokenizer, ids)
    assert len(decoded.starts) == len(decoded.ends) == len(ids)
    assert all(start <= end for start, end in zip(decoded.starts, decoded.ends, strict=True))
    held = {place for start, end in zip(decoded.starts, decoded.ends, strict=True) for place in range(start, end)}
    assert held == set(range(len(decoded.text)))


@pytest.mark.parametrize("name", ["byte-level", "Gemma"])
def test_replacement_characters_of_the_text_hold_their_bytes(name: str) -> None:
    text = "😀😀\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    encoding = TOKENIZERS[name](text, add_special_tokens=False).encodings[0]
    decoded = decode_offsets(TOKENIZERS[name], encoding.ids)
    assert list(zip(decoded.starts, decoded.ends, strict=True)) == encoding.offsets


def test_slow_tokenizers_and_missing_mask() -> None:
    tokenizer = SlowTokenizer()
    ids = tokenizer("abcdefgh")["input_ids"]
    assert find_spans(ids, "def", tokenizer) == Spans(((Span(2, 4),),))
