"""A batch with its spans, to look at: as text and as HTML, with nothing in it that acts on a terminal or a page."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from attnrb.reports.printable import printable
from attnrb.text.decoding import decode, decode_offsets
from attnrb.text.spans import Span, SpanError

__all__ = ["Piece", "as_html", "as_text", "pieces"]

_OPEN, _CLOSE, _BETWEEN = "⟦", "⟧", "·"


class Piece(NamedTuple):
    """Neighbouring tokens that the same spans cover."""

    tokens: tuple[str, ...]
    """Their texts. Of a character that takes several tokens the first has the whole."""
    strength: str | None
    """As it is shown: ``""`` for the policy's, ``"×4"`` for one of its own. None: no span covers them."""


def pieces(tokenizer: Any, ids: Sequence[int], first: int, spans: Sequence[Span]) -> list[Piece]:
    """The tokens in pieces.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the tokens of one row without its padding.
        first: slot of the first of them.
        spans: of the row.
    """
    texts = _texts(tokenizer, ids)
    borders = {0, len(ids)} | {slot - first for span in spans for slot in (span.start, span.end)}
    inside = sorted(border for border in borders if 0 <= border <= len(ids))
    return [
        Piece(tuple(texts[start:end]), _strength(spans, first + start)) for start, end in itertools.pairwise(inside)
    ]


def as_text(shown: Sequence[Piece], context: int | None = None) -> str:
    """One string, marked pieces in ``⟦…⟧`` with their strength and their tokens separated by ``·``.

    Args:
        shown: of `pieces`.
        context: how many characters to leave of what is not marked beside a marked piece. Default: all.
    """
    strings = []
    for index, piece in enumerate(shown):
        if piece.strength is None:
            text = printable("".join(piece.tokens))
            strings.append(_shorten(text, context, first=index == 0, last=index == len(shown) - 1))
        else:
            tokens = _BETWEEN.join(printable(token) for token in piece.tokens if token)
            strings.append(f"{_OPEN}{tokens}{_CLOSE}{piece.strength}")
    return "".join(strings)


def as_html(shown: Sequence[Piece], limit: int) -> str:
    """One HTML fragment, marked pieces in ``<mark>``, everything escaped, cut behind `limit` characters of text."""
    strings, left = [], limit
    for piece in shown:
        if left <= 0:
            strings.append("…")
            break
        plain = "".join(piece.tokens)
        text = html.escape(printable(plain[:left])) + ("…" if len(plain) > left else "")
        left -= len(plain)
        if piece.strength is None:
            strings.append(text)
        else:
            label = f"<sup>{html.escape(piece.strength)}</sup>" if piece.strength else ""
            strings.append(f'<mark title="{len(piece.tokens)} tokens">{text}</mark>{label}')
    return "".join(strings)


def _strength(spans: Sequence[Span], slot: int) -> str | None:
    covering = [span for span in spans if span.start <= slot < span.end]
    if not covering:
        return None
    own = [f"×{span.strength:g}" for span in covering if span.strength is not None]
    of_policy = len(covering) - len(own)
    if own or of_policy > 1:
        own += ["×policy's"] * of_policy
    return "".join(own)


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    try:
        decoded = decode_offsets(tokenizer, ids)
    except SpanError:
        return [decode(tokenizer, [token]) for token in ids]
    texts, shown = [], 0
    for start, end in zip(decoded.starts, decoded.ends, strict=True):
        texts.append(decoded.text[max(start, shown) : end])
        shown = max(shown, end)
    return texts


def _shorten(text: str, context: int | None, *, first: bool, last: bool) -> str:
    """What of an unmarked text stands near a marked piece, of which there is one before all but the first."""
    if context is None:
        return text
    head = context if last or not first else 0
    tail = 0 if last else context
    if len(text) <= head + tail + 1:
        return text
    return text[:head] + "…" + text[len(text) - tail :]
