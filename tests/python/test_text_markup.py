"""Markup: what it means, what is refused, and that it is undone exactly."""

from __future__ import annotations

import pytest
from attnrb.text import MarkupError, escape_markup, parse_markup
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("markup", "plain", "spans"),
    [
        ("", "", []),
        ("no markup (at all)", "no markup (at all)", []),
        ("a ((b)) c", "a b c", [("b", None)]),
        ("((a))((b))", "ab", [("a", None), ("b", None)]),
        ("((a:4))", "a", [("a", 4.0)]),
        ("((a:0))", "a", [("a", 0.0)]),
        ("((a:.5)) ((b:1e1)) ((c:2.))", "a b c", [("a", 0.5), ("b", 10.0), ("c", 2.0)]),
        ("((a:x4)) ((b:×4))", "a b", [("a", 4.0), ("b", 4.0)]),
        ("((a ((b:2)) c:4)) d", "a b c d", [("a b c", 4.0), ("b", 2.0)]),
        ("((a ((b))))", "a b", [("a b", None), ("b", None)]),
        (" (( a )) ", "  a  ", [(" a ", None)]),
        ("a(( ))b", "a b", [(" ", None)]),
        ("((line\nline))", "line\nline", [("line\nline", None)]),
    ],
)
def test_markup_means(markup: str, plain: str, spans: list[tuple[str, float | None]]) -> None:
    found, places = parse_markup(markup)
    assert found == plain
    assert [(plain[start:end], strength) for start, end, strength in places] == spans


@pytest.mark.parametrize("text", ["It is: 42", "12: 30", "a:", "a:b4", "a:4 ", "a:4)", "a:4x", "at 9:00 am", "::"])
def test_a_number_that_is_no_strength_is_text(text: str) -> None:
    plain, [span] = parse_markup(f"(({text}))") if not text.endswith(")") else parse_markup(f"(((b {text}))")
    assert plain[span.start : span.end].endswith(text)
    assert span.strength is None


@pytest.mark.parametrize(
    ("markup", "message"),
    [
        ("((at 12:30))", r"':30' may be text or a strength; write '\\:30' or ':x30'"),
        ("((localhost:8080))", r"':8080' may be text or a strength"),
        ("((a:-1))", "strength: expected a finite number of at least 0, got -1"),
        ("((a:x1e999))", "strength: expected a finite number"),
    ],
)
def test_doubtful_strengths_are_refused(markup: str, message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        parse_markup(markup)


def test_doubtful_strengths_can_be_said_plainly() -> None:
    assert parse_markup(r"((at 12\:30)) ((12:x30)) ((h:x8080))") == (
        "at 12:30 12 h",
        [(0, 8, None), (9, 11, 30.0), (12, 13, 8080.0)],
    )


@pytest.mark.parametrize(
    ("markup", "plain", "spans"),
    [
        (r"\((a\))", "((a))", []),
        (r"((a\)) b))", "a)) b", ["a)) b"]),
        (r"\\((a))", "\\a", ["a"]),
        (r"\\\((a\))", "\\((a))", []),
        (r"((a\\))", "a\\", ["a\\"]),
        (r"\((((a))", "((a", ["a"]),
        (r"((a\:4))", "a:4", ["a:4"]),
        (r"((a\\:4))", "a\\", ["a\\"]),
        (r"((a\\\:4))", r"a\:4", [r"a\:4"]),
        # A backslash elsewhere is one: paths, LaTeX, regular expressions.
        (r"C:\dir \\host \( x \) \n", r"C:\dir \\host \( x \) \n", []),
        (r"((\(x\) ))", r"\(x\) ", [r"\(x\) "]),
        (r"\:4 a\:4", r"\:4 a\:4", []),
    ],
)
def test_backslashes(markup: str, plain: str, spans: list[str]) -> None:
    found, places = parse_markup(markup)
    assert found == plain
    assert [plain[start:end] for start, end, _ in places] == spans


@pytest.mark.parametrize(
    ("markup", "plain", "spans"),
    [
        ("((f(x)))", "f(x)", ["f(x)"]),
        ("((f(g(x))))", "f(g(x))", ["f(g(x))"]),
        ("((f(g(x)) = y))", "f(g(x)) = y", ["f(g(x)) = y"]),
        ("(see ((x)))", "(see x)", ["x"]),
        ("(((x)))", "(x)", ["(x)"]),
        ("(((x)) y)", "(x y)", ["x"]),
        ("(((x) y))", "(x) y", ["(x) y"]),
        ("(((f(x))) y)", "(f(x) y)", ["f(x)"]),
        ("((a (b ((c))) d))", "a (b c) d", ["a (b c) d", "c"]),
        ("((a ((f(x)))))", "a f(x)", ["a f(x)", "f(x)"]),
        ("((sad :())", "sad :(", ["sad :("]),
        ("((sad :( and f(x)))", "sad :( and f(x)", ["sad :( and f(x)"]),
        ("((a) b))", "a) b", ["a) b"]),
        ("((f(x):4))", "f(x)", ["f(x)"]),
        ("f(g(x)) ((y))", "f(g(x)) y", ["y"]),
        ("((a (((x)) y)))", "a (x y)", ["a (x y)", "x"]),
        ("((((a :()) b)))", "a :( b)", ["a :( b", "a :("]),
        (":) ((y)) :)", ":) y :)", ["y"]),
    ],
)
def test_single_brackets_are_text_and_paired(markup: str, plain: str, spans: list[str]) -> None:
    found, places = parse_markup(markup)
    assert found == plain
    assert [plain[start:end] for start, end, _ in places] == spans


@pytest.mark.parametrize(
    ("markup", "position", "message"),
    [
        ("so ((a", 3, r"'\(\(' opens a span that no '\)\)' closes; write '\\\(\('"),
        ("((a ((b)) c", 0, "opens a span"),
        ("so a))", 4, r"'\)\)' closes a span that nothing opened; write '\\\)\)'"),
        ("((a)) b))", 7, "closes a span that nothing opened"),
        ("so (())", 3, "the span is empty"),
        ("((:4))", 0, "the span is empty"),
        ("((a (())))", 4, "the span is empty"),
        ("((:( :( ok))", 0, "opens a span .* a single"),
    ],
)
def test_what_does_not_add_up_is_refused(markup: str, position: int, message: str) -> None:
    with pytest.raises(MarkupError, match=f"prompt 3: .*{message}.*character {position}, in ") as error:
        parse_markup(markup, name="prompt 3")
    assert error.value.position == position


def test_errors_quote_a_long_text_in_part() -> None:
    with pytest.raises(MarkupError) as error:
        parse_markup("a" * 10_000 + "((b" + "c" * 10_000)
    assert "…aaa" in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("open", "close"), [("<em>", "</em>"), ("[[", "]]"), ("{{{", "}}}"), ("«", "»"), ("<<", ">>"), ("(", "))")]
)
def test_delimiters_of_ones_own(open: str, close: str) -> None:
    markup = f"a {open}b {open}c:2{close}:x4{close} d \\{open}e\\{close} e"
    plain, spans = parse_markup(markup, open, close)
    assert plain == f"a b c d {open}e{close} e"
    assert spans == [(2, 5, 4.0), (4, 5, 2.0)]
    with pytest.raises(MarkupError, match="opens a span"):
        parse_markup(f"a {open}b", open, close)
    with pytest.raises(MarkupError, match="closes a span"):
        parse_markup(f"a {close}b", open, close)


def test_one_delimiter_for_both_does_not_nest() -> None:
    assert parse_markup("a **b** **c:2** (( d", "**", "**") == ("a b c (( d", [(2, 3, None), (4, 5, 2.0)])
    with pytest.raises(MarkupError, match="opens a span"):
        parse_markup("a ** b", "**", "**")


@pytest.mark.parametrize(
    ("open", "close", "error"),
    [("", "))", ValueError), (" ", "))", ValueError), ("\\(", ")", ValueError), (1, ")", TypeError)],
)
def test_bad_delimiters_are_refused(open: str, close: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="open: expected"):
        parse_markup("a", open, close)


def test_a_text_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="text: expected a string, got bytes"):
        parse_markup(b"a")  # type: ignore[arg-type]


SOUP = st.text(r"()\:4x a", max_size=24)
DELIMITERS = st.sampled_from([("((", "))"), ("(", ")"), ("(", "))"), ("x", "a"), ("a", "a"), ("(:", ":)")])


@settings(max_examples=400)
@given(SOUP, DELIMITERS)
def test_any_text_is_read_or_refused(markup: str, delimiters: tuple[str, str]) -> None:
    refused = None
    try:
        plain, spans = parse_markup(markup, *delimiters)
    except MarkupError as error:
        refused = error.position
    if refused is not None:
        assert 0 <= refused < len(markup)
        return
    letters = iter(markup)
    assert all(character in letters for character in plain)  # what is left stands in its order
    opened = [0]
    for start, end, strength in spans:
        assert opened[-1] <= start < end <= len(plain)
        assert strength is None or strength >= 0
        opened.append(start)
    for one in spans:
        for other in spans:
            assert (
                one[1] <= other[0]
                or other[1] <= one[0]
                or one[0] <= other[0] <= other[1] <= one[1]
                or other[0] <= one[0]
            )


@settings(max_examples=400)
@given(SOUP, DELIMITERS)
def test_escaped_text_stands_for_itself(text: str, delimiters: tuple[str, str]) -> None:
    assert parse_markup(escape_markup(text, *delimiters), *delimiters) == (text, [])


def _balanced(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda parts: "(a" + "".join(parts) + ")")


BALANCED = st.recursive(st.sampled_from(["b", " c ", "d.", r"\e", "7"]), _balanced, max_leaves=8)


@settings(max_examples=200)
@given(BALANCED, BALANCED)
def test_balanced_brackets_stay_in_or_out_of_a_span(inner: str, outer: str) -> None:
    assert parse_markup(f"(({inner}))") == (inner, [(0, len(inner), None)])
    plain = f"(z {inner}) {outer}"
    assert parse_markup(f"(z (({inner}))) {outer}") == (plain, [(3, 3 + len(inner), None)])


@pytest.mark.parametrize(
    ("markup", "plain", "spans"),
    [
        ("\\" * 200_000, "\\" * 200_000, 0),
        ("( " * 100_000 + ") " * 100_000, "( " * 100_000 + ") " * 100_000, 0),
        ("((a:4)) " * 25_000, "a " * 25_000, 25_000),
        ("((a" * 25_000 + "))" * 25_000, "a" * 25_000, 25_000),
        ("((" + "(a" * 25_000 + ")" * 25_000 + "))", "(a" * 25_000 + ")" * 25_000, 1),
    ],
    ids=["backslashes", "brackets", "spans", "nested spans", "brackets in a span"],
)
def test_long_texts_are_read_in_linear_time(markup: str, plain: str, spans: int) -> None:
    """A quadratic reader would need minutes, so that none could creep in unseen."""
    found, places = parse_markup(markup)
    assert found == plain
    assert len(places) == spans
