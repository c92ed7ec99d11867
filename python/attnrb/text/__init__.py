"""Say which part of a prompt matters: markup, spans by characters or phrases, and what they are among the tokens."""

from attnrb.text.find import find_spans
from attnrb.text.mark import mark, spans
from attnrb.text.marked import Marked
from attnrb.text.markup import CharSpan, MarkupError, escape_markup, parse_markup
from attnrb.text.placing import SpanCutWarning
from attnrb.text.spans import Span, SpanError, Spans

__all__ = [
    "CharSpan",
    "Marked",
    "MarkupError",
    "Span",
    "SpanCutWarning",
    "SpanError",
    "Spans",
    "escape_markup",
    "find_spans",
    "mark",
    "parse_markup",
    "spans",
]
