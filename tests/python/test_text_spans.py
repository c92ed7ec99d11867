"""Spans: their tensors, their rows, and what they refuse."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from attnrb.text import Span, Spans
from attnrb.text.offsets import RowOffsets
from hypothesis import given, settings
from hypothesis import strategies as st

STRENGTHS = st.one_of(st.none(), st.just(0.0), st.floats(1e-3, 1e3))


@st.composite
def spans(draw: st.DrawFn) -> Spans:
    def span(start: int, length: int, strength: float | None) -> Span:
        return Span(start, start + length, strength)

    row = st.lists(st.builds(span, st.integers(0, 9), st.integers(1, 6), STRENGTHS), max_size=4).map(tuple)
    return Spans(tuple(draw(st.lists(row, min_size=1, max_size=3))))


@settings(max_examples=150)
@given(spans(), st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), st.integers(0, 3))
def test_tensors_are_what_the_spans_say(marked: Spans, default: float, more: int) -> None:
    slots = marked.slots + more
    factor = np.ones((len(marked), slots))
    counts = np.zeros((len(marked), slots))
    covered = np.zeros((len(marked), slots), dtype=bool)
    for row, of_row in enumerate(marked):
        for slot in range(slots):
            for span in of_row:
                if span.start <= slot < span.end:
                    factor[row, slot] *= default if span.strength is None else span.strength
                    counts[row, slot] += span.strength is None
                    covered[row, slot] = True
    logs = marked.log_strengths(default, slots)
    assert logs.dtype == torch.float32 and logs.shape == (len(marked), slots)
    with np.errstate(divide="ignore"):
        expected = np.log(factor)
    # One rounding to float32 of a sum that float64 has to 1e-14.
    np.testing.assert_allclose(logs.numpy(), expected, rtol=2**-23, atol=1e-12)
    assert not logs.isnan().any()
    union = marked.union(slots)
    assert union.dtype == torch.bool
    np.testing.assert_array_equal(union.numpy(), covered)
    np.testing.assert_array_equal(marked.default_counts(slots).numpy(), counts)
    if default > 0:
        learnt = marked.log_strengths(1.0, slots) + marked.default_counts(slots) * math.log(default)
        torch.testing.assert_close(learnt, logs, rtol=1e-5, atol=1e-5)
    last = [max(np.flatnonzero(row) + 1, default=0) for row in covered]
    assert marked.ends().dtype == torch.int64
    assert marked.ends().tolist() == last


@settings(max_examples=50)
@given(spans())
def test_a_dictionary_gives_the_spans_back(marked: Spans) -> None:
    assert Spans.from_dict(json.loads(json.dumps(marked.to_dict()))) == marked


TWO = Spans(((Span(0, 2), Span(1, 4, 3.0)), ()))


def test_the_fewest_slots_are_the_default() -> None:
    assert TWO.slots == 4
    assert TWO.log_strengths(2.0).shape == TWO.union().shape == (2, 4)
    empty = Spans(((), ()))
    assert empty.slots == 0 and not empty and TWO
    assert empty.log_strengths(2.0).shape == (2, 0)
    assert empty.log_strengths(0.0, 3).tolist() == [[0.0] * 3] * 2
    assert empty.ends().tolist() == [0, 0]


def test_strength_none_wins_over_every_other() -> None:
    both = Spans(((Span(0, 2, 0.0), Span(1, 3, 100.0)),))
    assert both.log_strengths(5.0).tolist() == [[-math.inf, -math.inf, pytest.approx(math.log(100.0))]]


def test_rows_follow_their_beams() -> None:
    one, other = TWO.rows
    assert TWO.repeat(2).rows == (one, one, other, other)
    assert TWO.select([1, 1, 0]).rows == (other, other, one)
    assert TWO.select(torch.tensor([1, 0])).rows == (other, one)
    assert TWO.repeat(3).ends().tolist() == TWO.ends().repeat_interleave(3).tolist()
    assert list(TWO) == [one, other] and TWO[0] == one and len(TWO) == 2


def test_spans_move_with_their_tokens() -> None:
    assert TWO.shift(3).rows == ((Span(3, 5), Span(4, 7, 3.0)), ())
    assert TWO.shift([1, 5]).rows == ((Span(1, 3), Span(2, 5, 3.0)), ())
    assert TWO.select([1, 0]).shift(2).rows == ((), (Span(2, 4), Span(3, 6, 3.0)))
    with pytest.raises(ValueError, match="start: expected a slot of at least 0, got -1"):
        TWO.shift(-1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Span(-1, 2), ValueError, "start: expected a slot of at least 0, got -1"),
        (lambda: Span(2, 2), ValueError, "end: expected a slot above start, which is 2, got 2"),
        (lambda: Span(0, 1, -2.0), ValueError, "strength: expected a finite number of at least 0, got -2"),
        (lambda: Span(0, 1, math.inf), ValueError, "strength: expected a finite number"),
        (lambda: Span(0, 1, "4"), TypeError, "strength: expected a number, got '4'"),  # type: ignore[arg-type]
        (lambda: Span(0, 1, True), TypeError, "strength: expected a number, got True"),
        (lambda: Span(0.5, 1), TypeError, "start: expected an integer, got 0.5"),  # type: ignore[arg-type]
        (lambda: Spans((((0, 1),),)), TypeError, r"rows: expected Span objects in row 0, got \(0, 1\)"),  # type: ignore[arg-type]
        (lambda: TWO.log_strengths(1.0, 3), ValueError, "slots: expected at least 4, .* got 3"),
        (lambda: TWO.log_strengths(-1.0), ValueError, "default_strength: expected a finite number"),
        (lambda: TWO.log_strengths(math.nan), ValueError, "default_strength: expected a finite number"),
        (lambda: TWO.union(2), ValueError, "slots: expected at least 4"),
        (lambda: TWO.repeat(0), ValueError, "times: expected at least 1, got 0"),
        (lambda: TWO.select([2]), IndexError, "rows: expected indices from 0 to 1, got 2"),
        (lambda: TWO.select([-1]), IndexError, "rows: expected indices from 0 to 1, got -1"),
        (lambda: TWO.shift([1]), ValueError, "by: expected one number or 2, one for each row, got 1"),
    ],
)
def test_what_is_no_span_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], TypeError, "spans: expected a dictionary"),
        ({}, ValueError, "spans: the dictionary misses rows"),
        ({"rows": [], "policy": 1}, ValueError, "spans: the dictionary has unknown policy"),
        ({"rows": "ab"}, TypeError, "rows: expected a list of lists"),
        ({"rows": [3]}, TypeError, "rows: expected a list of lists"),
        ({"rows": [[], [{"start": 0}]]}, ValueError, r"rows\[1\]\[0\]: the dictionary misses end"),
        ({"rows": [[{"start": 0, "end": 1, "weight": 2}]]}, ValueError, r"rows\[0\]\[0\]: .* unknown weight"),
        ({"rows": [[{"start": 0, "end": 0}]]}, ValueError, r"rows\[0\]\[0\].end: expected a slot above start"),
        ({"rows": [[{"start": 0, "end": "1"}]]}, TypeError, r"rows\[0\]\[0\].end: expected an integer"),
    ],
)
def test_bad_dictionaries_are_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Spans.from_dict(data)


def test_reprs_are_short() -> None:
    assert repr(Span(3, 9, 4.0)) == "Span(3:9 ×4)"
    assert repr(TWO) == "Spans(0:2, 1:4 ×3 | none)"
    many = Spans(tuple(tuple(Span(place, place + 1) for place in range(500)) for _ in range(500)))
    assert len(repr(many)) < 300
    assert "and 496 rows more" in repr(many) and "and 496 more" in repr(many)


def test_spans_are_values() -> None:
    assert Spans([[Span(0, 2), Span(1, 4, 3.0)], []]) == TWO  # type: ignore[arg-type]
    assert len({TWO, Spans(TWO.rows)}) == 1


def test_tokens_of_no_characters_belong_to_no_span() -> None:
    """Special tokens, padding and the space that a tokenizer puts before a text lie at some place, without width."""
    row = RowOffsets(np.array([0, 0, 2, 2, 5, 5]), np.array([0, 2, 2, 5, 5, 8]))
    assert row.tokens_of(0, 5, whole=True) == (1, 4)
    assert row.tokens_of(1, 5) == (1, 4)
    assert row.tokens_of(2, 8, whole=True) == (3, 6)
    assert row.tokens_of(2, 2, whole=True) is None
    cut = RowOffsets(row.starts, row.ends, np.array([[8, 8], [8, 9]]))
    assert not cut.is_cut(8, 8, whole=True)
    assert cut.is_cut(8, 9)
