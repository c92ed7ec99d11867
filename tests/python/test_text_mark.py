"""Marked texts: the tokens are those of the plain text, and the spans are the tokens of the marked characters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from attnrb.text import MarkupError, Span, SpanCutWarning, SpanError, Spans, mark
from attnrb.text import spans as mark_characters
from hypothesis import example, given, settings
from text_oracles import characters_by_bytes, check_markup, check_row, held_characters, pieces
from text_tokenizers import HARD, KINDS, SlowTokenizer
from transformers import ByT5Tokenizer

TOKENIZERS = {name: make() for name, make in KINDS.items()}
ACUTE = "\N{COMBINING ACUTE ACCENT}"
SYLLABLE = "\u1112\u1161\u11ab"  # three parts that NFC makes one character of
SIMPLE = "".join(character for character in HARD if character not in ACUTE + SYLLABLE)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80)
@given(parts=pieces(SIMPLE))
@example(parts=[(" a ", "span"), ("b", "plain")])
def test_any_markup_on_any_text(name: str, parts: list[tuple[str, str]]) -> None:
    check_markup(TOKENIZERS[name], parts, held_characters)


@pytest.mark.parametrize("name", ["byte-level", "Gemma"])
@settings(max_examples=120)
@given(parts=pieces(HARD.replace("▁", "").replace("Ġ", "")))
def test_any_markup_by_counting_bytes(name: str, parts: list[tuple[str, str]]) -> None:
    check_markup(TOKENIZERS[name], parts, characters_by_bytes)


def marked_text(tokenizer: Any, markup: str, **options: Any) -> list[str]:
    """What each span's tokens decode to."""
    marked = mark(tokenizer, markup, **options)
    ids = marked.inputs["input_ids"]
    return [
        tokenizer.decode(ids[row][span.start : span.end]).strip()
        for row, spans in enumerate(marked.spans)
        for span in spans
    ]


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("a((😀))b", "😀"),
        ("a((👩🏽\u200d🚀)) b", "👩🏽\u200d🚀"),
        ("x((e\u0301)) y", "e\u0301"),
        ("((שלום)) עולם", "שלום"),
        ("قال: ((مرحبا)) يا", "مرحبا"),
        ("数((字))42", "字"),
        ("a ((  b  )) c", "b"),
        ("((\N{REPLACEMENT CHARACTER}))x", "\N{REPLACEMENT CHARACTER}"),
    ],
    ids=["emoji", "emoji of several", "combining mark", "Hebrew", "Arabic", "Chinese", "white space", "U+FFFD"],
)
@pytest.mark.parametrize("name", ["byte-level", "Llama", "Gemma"])
def test_hard_characters(name: str, markup: str, expected: str) -> None:
    assert marked_text(TOKENIZERS[name], markup) == [expected]


@pytest.mark.parametrize("name", ["Qwen", "Unigram with NFKC", "WordPiece"])
def test_marks_belong_to_the_letter_that_a_normaliser_joins_them_with(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    letter = mark(tokenizer, f"the ((e)){ACUTE} cat").spans
    assert mark(tokenizer, f"the e(({ACUTE})) cat").spans == letter
    assert mark(tokenizer, f"the ((e{ACUTE})) cat").spans == letter
    assert mark(tokenizer, f"the e{ACUTE} ((cat))").spans[0][0].start >= letter[0][0].end


def test_parts_of_a_composed_syllable_belong_to_it() -> None:
    whole = mark(TOKENIZERS["Qwen"], f"the (({SYLLABLE})) cat").spans
    assert whole[0][0].end - whole[0][0].start == 3  # its bytes
    for place in range(3):
        split = f"the {SYLLABLE[:place]}(({SYLLABLE[place]})){SYLLABLE[place + 1 :]} cat"
        assert mark(TOKENIZERS["Qwen"], split).spans == whole


def test_a_normaliser_that_makes_several_letters_of_one() -> None:
    [[span]] = mark(TOKENIZERS["Unigram with NFKC"], "a((\N{LATIN SMALL LIGATURE FI}))b").spans
    ids = mark(TOKENIZERS["Unigram with NFKC"], "a\N{LATIN SMALL LIGATURE FI}b").inputs["input_ids"][0]
    assert TOKENIZERS["Unigram with NFKC"].convert_ids_to_tokens(ids[span.start : span.end]) == ["f", "i"]


def test_lower_case_and_dropped_characters() -> None:
    tokenizer = TOKENIZERS["WordPiece"]
    assert marked_text(tokenizer, "THE ((CAT)) SAT") == ["cat"]
    with pytest.raises(SpanError, match=r"text, '\\x00': the span holds no token: the tokenizer makes no token of it"):
        mark(tokenizer, "the ((\0)) cat")


def test_a_token_that_straddles_a_border_belongs() -> None:
    tokenizer = TOKENIZERS["Llama"]
    assert tokenizer.tokenize("the cat") == ["▁the", "▁cat"]
    assert marked_text(tokenizer, "t((h))e c((a))t") == ["the", "cat"]


def test_white_space_at_the_edges_of_a_span_does_not_count() -> None:
    for tokenizer in TOKENIZERS.values():
        plain = mark(tokenizer, "the cat ((sat)) on").spans
        assert mark(tokenizer, "the cat(( sat ))on").spans == plain


def test_a_span_of_white_space_has_the_tokens_that_hold_only_that() -> None:
    tokenizer = TOKENIZERS["Gemma"]
    place = tokenizer.convert_ids_to_tokens(tokenizer("the\n\ncat")["input_ids"]).index("\n\n")
    assert mark(tokenizer, "the((\n\n))cat").spans == Spans(((Span(place, place + 1),),))
    with pytest.raises(SpanError, match="it is white space, and no token holds only that"):
        mark(tokenizer, "the(( ))cat")


def test_a_space_that_the_tokenizer_puts_before_the_text_is_in_no_span() -> None:
    for name in ("Llama", "Unigram with NFKC"):
        tokenizer = TOKENIZERS[name]
        assert tokenizer.convert_ids_to_tokens(tokenizer("ש")["input_ids"])[:2] == ["<s>", "▁"]
        assert mark(tokenizer, "((ש))").spans[0][0].start == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_slots_count_the_padding(tokenizer: Any, side: str) -> None:
    markups = ["((The cat:4)) sat ((on)) the mat", "it ((rain))", "none"]
    plain = ["The cat sat on the mat", "it rain", "none"]
    marked = mark(tokenizer, markups, padding_side=side)
    expected = tokenizer(plain, padding=True, padding_side=side, return_tensors="pt")
    assert set(marked.inputs) == set(expected)
    assert all(torch.equal(marked.inputs[key], expected[key]) for key in expected)
    alone = [mark(tokenizer, markup) for markup in markups]
    width = marked.inputs["input_ids"].shape[1]
    for row, one in enumerate(alone):
        padding = width - one.inputs["input_ids"].shape[1] if side == "left" else 0
        assert marked.spans[row] == one.spans.shift(padding)[0]
        for span, own in zip(marked.spans[row], one.spans[0], strict=True):
            ids = marked.inputs["input_ids"][row, span.start : span.end]
            assert ids.tolist() == one.inputs["input_ids"][0, own.start : own.end].tolist()
    assert [len(row) for row in marked.spans] == [2, 1, 0]


def test_options_go_to_the_tokenizer(tokenizer: Any) -> None:
    options = {"add_special_tokens": False, "pad_to_multiple_of": 8, "padding": "max_length", "max_length": 24}
    marked = mark(tokenizer, ["((The cat)) sat", "it"], truncation=True, **options)
    expected = tokenizer(["The cat sat", "it"], truncation=True, return_tensors="pt", **options)
    assert all(torch.equal(marked.inputs[key], expected[key]) for key in expected)
    lists = mark(tokenizer, ["((The cat)) sat", "it"], return_tensors=None)
    assert lists.inputs["input_ids"] == tokenizer(["The cat sat", "it"])["input_ids"]  # not padded


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_says_what_it_cuts(side: str) -> None:
    tokenizer = KINDS["byte-level"]()
    tokenizer.truncation_side = side
    markup = "((数)) the ((cat)) sat ((字))"
    whole = mark(tokenizer, markup)
    length = whole.inputs["input_ids"].shape[1]
    with pytest.warns(SpanCutWarning, match="truncation took a part of these spans: text, '.'$") as caught:
        cut = mark(tokenizer, markup, truncation=True, max_length=length - 1)
    assert caught[0].filename == __file__
    assert cut.cut == ((0, 2 if side == "right" else 0),)
    assert (
        cut.inputs["input_ids"].tolist()
        == tokenizer(["数 the cat sat 字"], truncation=True, max_length=length - 1)["input_ids"]
    )
    assert [span.end - span.start for span in cut.spans[0]] == ([3, 3, 2] if side == "right" else [2, 3, 3])
    moved = 1 if side == "left" else 0
    assert cut.spans[0][1].start == whole.spans[0][1].start - moved
    with pytest.raises(SpanError, match=r"text, '.': the span holds no token: truncation took all of it"):
        mark(tokenizer, markup, truncation=True, max_length=length - 3)


def test_truncation_beside_the_spans_says_nothing(tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked = mark(tokenizer, "((The)) cat sat on the mat", truncation=True, max_length=6)
    assert marked.cut == ()
    assert marked.inputs["input_ids"].shape[1] == 6


def test_characters_instead_of_markup(tokenizer: Any) -> None:
    text = "The ((cat)) sat on it"
    marked = mark_characters(tokenizer, text, [(4, 11), (16, 21, 3)])
    plain = tokenizer(text, return_tensors="pt")
    assert torch.equal(marked.inputs["input_ids"], plain["input_ids"])
    check_row(text, marked.spans[0], [(4, 11, None), (16, 21, 3.0)], held_characters(tokenizer, text))
    several = mark_characters(tokenizer, [text, "it is"], [[(4, 11), (16, 21, 3)], []], padding_side="right")
    assert several.spans.rows == (marked.spans[0], ())


@pytest.mark.parametrize(
    ("text", "ranges", "error", "message"),
    [
        ("abc", [(0, 4)], ValueError, r"ranges\[0\]: expected 0 <= start < end <= 3, the text's length, got \(0, 4\)"),
        ("abc", [(0, 1), (2, 2)], ValueError, r"ranges\[1\]: expected 0 <= start < end"),
        ("abc", [(-1, 1)], ValueError, r"ranges\[0\]: expected 0 <= start"),
        ("abc", [(0, 1, -1)], ValueError, r"ranges\[0\]: expected a finite number of at least 0, got -1"),
        ("abc", [(0, 1, "x")], TypeError, r"ranges\[0\]: expected a number, got 'x'"),
        ("abc", (0, 1), TypeError, r"ranges\[0\]: expected \(start, end\) or \(start, end, strength\), got 0"),
        ("abc", [(0, 1.5)], TypeError, r"ranges\[0\]: expected two integers, got 0 and 1.5"),
        ("abc", "ab", TypeError, r"ranges: expected a list of \(start, end\), got 'ab'"),
        (["abc", "d"], [[(0, 1)]], ValueError, "ranges: expected 2 lists, one for each text, got 1"),
        (["abc", "d"], [[], [(0, 2)]], ValueError, r"ranges\[1\]\[0\]: expected 0 <= start < end <= 1"),
    ],
)
def test_bad_ranges_are_refused(text: Any, ranges: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mark_characters(TOKENIZERS["byte-level"], text, ranges)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (3, {}, TypeError, "text: expected a string, strings, or chat messages, got 3"),
        (["a", 3], {}, TypeError, "text: expected a string, strings, or chat messages"),
        ([], {}, ValueError, "text: expected at least one text, got an empty list"),
        (["a", "((b"], {}, MarkupError, r"text\[1\]: '\(\(' opens a span"),
        ("a", {"text_pair": "b"}, TypeError, "text_pair: not an option here"),
        ("a", {"return_overflowing_tokens": True}, TypeError, "return_overflowing_tokens: not an option here"),
        ("a", {"stride": 2}, TypeError, "stride: not an option here"),
        ("a", {"paddding": True}, TypeError, "paddding: not an option here"),
        ("a", {"add_generation_prompt": True}, TypeError, "add_generation_prompt: expected with chat messages only"),
        ("a", {"open": ""}, ValueError, "open: expected a delimiter"),
    ],
)
def test_bad_calls_are_refused(text: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mark(TOKENIZERS["byte-level"], text, **options)


@settings(max_examples=60)
@given(pieces("ab e(7.,\n数ם😀"))
def test_tokenizers_without_offsets_are_served_by_what_their_tokens_say(parts: list[tuple[str, str]]) -> None:
    check_markup(SlowTokenizer(), parts, characters_by_pairs)


def characters_by_pairs(tokenizer: Any, text: str) -> list[set[int]]:
    """The characters of each token of `SlowTokenizer`."""
    return [set(), *({place, place + 1} & set(range(len(text))) for place in range(0, len(text), 2))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizers_without_offsets_pad_and_truncate(side: str) -> None:
    tokenizer = SlowTokenizer(padding_side=side)
    marked = mark(tokenizer, ["ab((cd))efgh", "((a))"])
    assert marked.spans.rows == ((Span(2, 3),), (Span(4, 5) if side == "left" else Span(1, 2),))
    assert set(marked.inputs) == set(tokenizer(["abcdefgh"], padding=True))
    tokenizer = SlowTokenizer(truncation_side=side)
    with pytest.warns(SpanCutWarning):
        cut = mark(tokenizer, "((abcd))((efgh))", truncation=True, max_length=4)
    assert cut.spans.rows == ((Span(1, 2), Span(2, 4)) if side == "left" else (Span(1, 3), Span(3, 4)),)
    assert cut.cut == ((0, 0 if side == "left" else 1),)
    with pytest.raises(SpanError, match="truncation took all of it"):
        mark(tokenizer, "((ab))cdef((gh))", truncation=True, max_length=3)


def test_a_slow_tokenizer_that_splits_characters() -> None:
    tokenizer = ByT5Tokenizer()
    assert tokenizer.is_fast is False
    assert mark(tokenizer, "ab((c😀e)) d").spans == Spans(((Span(2, 8),),))
    assert mark(tokenizer, "é((数))ß").spans == Spans(((Span(2, 5),),))


def test_tokenizers_that_do_not_say_where_tokens_are_are_refused() -> None:
    with pytest.raises(SpanError, match=r"text: SlowTokenizer gives no character offsets, .* load the fast version"):
        mark(SlowTokenizer(lower=True), "The ((Cat))")


def test_strengths_nest_and_multiply() -> None:
    marked = mark(TOKENIZERS["Llama"], "((the ((cat:2)) sat:4)) ((on))")
    logs = marked.spans.log_strengths(8.0)
    tokens = TOKENIZERS["Llama"].convert_ids_to_tokens(marked.inputs["input_ids"][0])
    assert tokens == ["<s>", "▁the", "▁cat", "▁sat", "▁on"]
    assert logs.exp()[0].tolist() == pytest.approx([1, 4, 8, 4, 8])
    assert marked.spans.ends().tolist() == [5]
