r"""Markup that says which part of a text matters: ``((text))``, or ``((text:4))`` with a strength.

The rules, for the default delimiters:

- ``((`` opens a span and ``))`` closes it. Spans may nest. Each one opened must be closed, and none may be empty.
- ``((text:4))`` gives the span the strength 4. It is absolute and takes the place of the policy's strength, as a weight
  does in image tools: what a marked text means then does not change with a default elsewhere. ``((text:x4))`` and
  ``((text:×4))`` say the same. The number stands directly behind the colon, so ``((It is: 42))`` is plain text.
- Where a colon and a number may just as well be text, behind a digit (``((at 12:30))``) or above 100
  (``((localhost:8080))``), the bare form is refused: ``\:30`` is text, and ``:x30`` is a strength.
- A backslash before a delimiter or a strength makes it text: ``\((``, ``\))``, ``((text\:4))``. A backslash elsewhere
  is a backslash. Two of them in front of a delimiter are one, and the delimiter counts.
- Single brackets inside a span are text, and they are paired before a delimiter is: ``((f(x)))`` marks ``f(x)``, and
  ``(see ((x)))`` marks ``x``. A smiley's bracket that has no partner does not disturb that: ``((sad :())`` marks
  ``sad :(``.

Delimiters of one's own are any two strings, such as ``<em>`` and ``</em>``. If both are the same, as ``**``, spans
cannot nest.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

__all__ = ["CharSpan", "Delimiters", "MarkupError", "check_delimiters", "escape_markup", "parse_markup"]

_BARE_LIMIT = 100.0  # a bare number above this is more likely a port or a price than a strength
_STRENGTH = re.compile(r":(?P<times>[x×]?)(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\Z", re.ASCII)
_LONGEST_STRENGTH = 40  # characters

Fail = Callable[[int, str], NoReturn]


class MarkupError(ValueError):
    """Markup that cannot be read. The message names the text, the place and what to write instead."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position
        """Index of the character in the marked-up text."""


class CharSpan(NamedTuple):
    """Characters ``start <= i < end`` of a text, and how strong they are."""

    start: int
    end: int
    strength: float | None = None
    """Factor on the weights of the span. None: the policy's."""


class Delimiters(NamedTuple):
    """What opens and what closes a span."""

    open: str = "(("
    close: str = "))"

    @property
    def are_brackets(self) -> bool:
        """Whether they are a character doubled (or tripled) and its partner, as ``((`` and ``))``.

        Text next to such a delimiter may be the same character, so where the delimiter begins is to be decided.
        """
        same_width = len(self.open) == len(self.close) >= 2
        return same_width and len(set(self.open)) == len(set(self.close)) == 1 and self.open != self.close


def check_delimiters(open: str = "((", close: str = "))") -> Delimiters:
    """The two as `Delimiters`.

    Raises:
        TypeError: one is no string.
        ValueError: one is empty, white space, or holds a backslash, which escapes.
    """
    for name, delimiter in (("open", open), ("close", close)):
        if not isinstance(delimiter, str):
            raise TypeError(f"{name}: expected a string, got {delimiter!r}")
        if not delimiter.strip() or "\\" in delimiter:
            raise ValueError(f"{name}: expected a delimiter without backslashes that is not empty, got {delimiter!r}")
    return Delimiters(open, close)


def parse_markup(text: str, open: str = "((", close: str = "))", *, name: str = "text") -> tuple[str, list[CharSpan]]:
    r"""The text without its markup, and the spans by characters of that text.

    For servers that resolve markup before they tokenise; `attnrb.mark` does both. The rules stand at the top of this
    module.

    Args:
        text: the marked-up text.
        open: what opens a span. Default: ``((``.
        close: what closes it. Default: ``))``.
        name: what errors call the text.

    Returns:
        ``(plain, spans)``, spans in the order in which they open, an outer one before those inside it. Spans may
        overlap only by nesting; their strengths then multiply. White space at their edges is still there.

    Raises:
        MarkupError: a span is not closed or not opened or empty, or a strength is below 0, not finite, or may be text.
        TypeError, ValueError: as `check_delimiters`; or `text` is no string.

    >>> parse_markup(r"The ((big (red):4)) fox \((sic\))")
    ('The big (red) fox ((sic))', [CharSpan(start=4, end=13, strength=4.0)])
    """
    delimiters = check_delimiters(open, close)
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {type(text).__name__}")

    def fail(position: int, what: str) -> NoReturn:
        excerpt = ("…" if position > 16 else "") + text[max(0, position - 16) : position + 24]
        excerpt += "…" if position + 24 < len(text) else ""
        raise MarkupError(f"{name}: {what} (character {position}, in {excerpt!r})", position)

    dropped: list[_Cut] = []
    runs = _runs(text, delimiters, dropped)
    pair = _pair_brackets if delimiters.are_brackets else _pair
    pairs = sorted(pair(runs, delimiters, fail))
    return _assemble(text, pairs, dropped, delimiters, fail)


def escape_markup(text: str, open: str = "((", close: str = "))") -> str:
    r"""Markup that stands for `text` as it is: `parse_markup` gives the text back, and no span.

    >>> escape_markup("f((1, 2))")
    'f\\((1, 2\\))'
    """
    delimiters = check_delimiters(open, close)
    width = len(delimiters.open)

    def escaped(match: re.Match[str]) -> str:
        slashes, run = match[1], match[2]
        if not delimiters.are_brackets:
            return f"{slashes * 2}\\{run}"
        if len(run) < width:
            return slashes + run
        whole = len(run) // width
        return slashes * 2 + f"\\{run[:width]}" * whole + run[whole * width :]

    return _pattern(delimiters).sub(escaped, text)


class _Run(NamedTuple):
    """Delimiters that are not escaped: one, or as many bracket characters as stand in a row."""

    start: int
    length: int
    text: str


class _Cut(NamedTuple):
    """Characters of the markup that the plain text does not have."""

    start: int
    length: int


class _Pair(NamedTuple):
    """Where the two delimiters of a span begin."""

    open: int
    close: int


def _pattern(delimiters: Delimiters) -> re.Pattern[str]:
    if delimiters.are_brackets:
        kinds = [f"{re.escape(delimiter[0])}+" for delimiter in delimiters]
    else:
        kinds = [re.escape(delimiter) for delimiter in sorted(delimiters, key=len, reverse=True)]
    # Looking back keeps a long row of backslashes from being tried at each of them.
    return re.compile(r"(?<!\\)(\\*)(" + "|".join(kinds) + ")")


def _runs(text: str, delimiters: Delimiters, dropped: list[_Cut]) -> Iterator[_Run]:
    """The delimiters in `text`; the backslashes that only escape are added to `dropped`."""
    width = len(delimiters.open)
    for match in _pattern(delimiters).finditer(text):
        slashes, run = len(match[1]), match[2]
        start = match.start(2)
        if slashes and (not delimiters.are_brackets or len(run) >= width):
            dropped.append(_Cut(match.start(1), slashes - slashes // 2))
            if slashes % 2:
                taken = width if delimiters.are_brackets else len(run)
                start, run = start + taken, run[taken:]
        if run:
            yield _Run(start, len(run), run)


def _pair(runs: Iterable[_Run], delimiters: Delimiters, fail: Fail) -> list[_Pair]:
    pairs, opened = [], list[int]()
    for run in runs:
        closes = run.text == delimiters.close and (opened or delimiters.open != delimiters.close)
        if not closes:
            opened.append(run.start)
        elif opened:
            pairs.append(_Pair(opened.pop(), run.start))
        else:
            _not_opened(run.start, delimiters, fail)
    if opened:
        _not_closed(opened[-1], delimiters, fail)
    return pairs


@dataclass
class _Frame:
    """A row of opening characters with at least one delimiter in it, and the single ones behind it."""

    start: int
    count: int
    """Characters of the row that nothing has closed."""
    singles: int = 0


def _pair_brackets(runs: Iterable[_Run], delimiters: Delimiters, fail: Fail) -> list[_Pair]:
    """Pairs of delimiters made of brackets, so that the single brackets around and inside them are paired too."""
    width = len(delimiters.open)
    pairs: list[_Pair] = []
    frames = [_Frame(-1, 0)]  # the first is the text outside all spans
    for run in runs:
        if run.text[0] == delimiters.close[0]:
            _close(run, frames, pairs, delimiters, fail)
        elif run.length < width:
            frames[-1].singles += run.length
        else:
            frames.append(_Frame(run.start, run.length))
    if len(frames) > 1:
        _not_closed(frames[-1].start, delimiters, fail)
    return pairs


def _close(run: _Run, frames: list[_Frame], pairs: list[_Pair], delimiters: Delimiters, fail: Fail) -> None:
    """Spend a row of closing characters on what is open, the innermost first."""
    width = len(delimiters.close)
    place, left = run.start, run.length
    while left:
        frame = frames[-1]
        single = frame.singles + frame.count % width
        beyond = left - single
        outside = len(frames) == 1
        if outside and beyond >= width:
            _not_opened(place + single, delimiters, fail)
        if outside or left < width or beyond <= 0:
            # Each closes a single bracket; those that find none are text.
            _take(frame, min(left, single))
            return
        # A delimiter closes here. Single brackets are paired before it, as far as that leaves room for it.
        taken = single if beyond >= width else left - width
        _take(frame, taken)
        place, left = place + taken, left - taken
        frame.singles = 0
        frame.count -= width
        pairs.append(_Pair(frame.start + frame.count, place))
        place, left = place + width, left - width
        if frame.count < width:
            frames.pop()
            frames[-1].singles += frame.count


def _take(frame: _Frame, brackets: int) -> None:
    singles = min(brackets, frame.singles)
    frame.singles -= singles
    frame.count -= brackets - singles


def _not_opened(position: int, delimiters: Delimiters, fail: Fail) -> NoReturn:
    close = delimiters.close
    fail(position, f"{close!r} closes a span that nothing opened; write '\\{close}' if it is text")


def _not_closed(position: int, delimiters: Delimiters, fail: Fail) -> NoReturn:
    open, close = delimiters
    hint = f"; write '\\{open}' if it is text"
    if delimiters.are_brackets:
        hint += f" (a single {close[0]!r} is paired with a single {open[0]!r} before it)"
    fail(position, f"{open!r} opens a span that no {close!r} closes{hint}")


def _assemble(
    text: str, pairs: list[_Pair], dropped: list[_Cut], delimiters: Delimiters, fail: Fail
) -> tuple[str, list[CharSpan]]:
    """Cut the markup out of `text`, and say where the spans are in what is left."""
    opens = [_Cut(pair.open, len(delimiters.open)) for pair in pairs]
    closes = [_Cut(pair.close, len(delimiters.close)) for pair in pairs]
    borders = sorted(cut.start + cut.length for cut in (*opens, *closes))
    cuts, endings = [*opens, *closes, *dropped], []
    for pair in pairs:
        border = borders[bisect.bisect_right(borders, pair.close) - 1]
        ending = _ending(text, border, pair.close, fail)
        cuts.append(ending.cut)
        endings.append(ending)
    cuts.sort()
    starts = [cut.start for cut in cuts]
    removed = [0, *itertools.accumulate(cut.length for cut in cuts)]

    def plain_index(position: int) -> int:
        return position - removed[bisect.bisect_left(starts, position)]

    spans = []
    for pair, ending in zip(pairs, endings, strict=True):
        start, end = plain_index(pair.open + len(delimiters.open)), plain_index(ending.end)
        if start == end:
            fail(pair.open, f"the span is empty; write '\\{delimiters.open}' if it is text")
        spans.append(CharSpan(start, end, ending.strength))
    kept, place = [], 0
    for cut in cuts:
        kept.append(text[place : cut.start])
        place = cut.start + cut.length
    return "".join([*kept, text[place:]]), spans


class _Ending(NamedTuple):
    """What stands before a span's closing delimiter."""

    end: int
    """Where the span's text ends."""
    strength: float | None
    cut: _Cut


def _ending(text: str, border: int, close: int, fail: Fail) -> _Ending:
    """The strength that a span ends with; `border` is where the text before its closing delimiter begins."""
    match = _STRENGTH.search(text[max(border, close - _LONGEST_STRENGTH) : close])
    if not match:
        return _Ending(close, None, _Cut(close, 0))
    colon = close - len(match[0])
    before = text[border:colon]
    slashes = len(before) - len(before.rstrip("\\"))
    if slashes % 2:
        return _Ending(close, None, _Cut(colon - slashes, slashes - slashes // 2))
    strength = float(match["number"])
    if not match["times"] and not slashes and (before[-1:].isdigit() or strength > _BARE_LIMIT):
        number = match["number"]
        fail(colon, f"':{number}' may be text or a strength; write '\\:{number}' or ':x{number}'")
    if not (strength >= 0 and math.isfinite(strength)):
        fail(colon, f"strength: expected a finite number of at least 0, got {match['number']}")
    return _Ending(colon - slashes // 2, strength, _Cut(colon - slashes // 2, slashes // 2 + len(match[0])))
