"""From characters to tokens: tokenise prompts without their markup, and place their spans among the tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attnrb.text.marked import Marked
from attnrb.text.markup import CharSpan
from attnrb.text.offsets import RowOffsets, encode
from attnrb.text.spans import Span, SpanError, Spans

__all__ = ["Prompt", "SpanCutWarning", "tokenise", "trimmed"]

_SHOWN = 40  # characters of a span in an error


class SpanCutWarning(UserWarning):
    """Truncation took away some tokens of a span."""


class Prompt(NamedTuple):
    """What is tokenised, and what matters in it."""

    text: str
    spans: Sequence[CharSpan]
    """By characters of `text`."""
    names: Sequence[str]
    """What errors call the text that each span stands in."""


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its edges; as it is where it holds nothing else."""
    inside = text[start:end]
    if not inside.strip():
        return start, end
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


def tokenise(tokenizer: Any, prompts: Sequence[Prompt], options: Mapping[str, Any], *, batched: bool) -> Marked:
    """Tokenise prompts as one batch and place their spans.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: at least one.
        options: of the tokenizer's call. Without ``padding`` several prompts are padded to the longest if
            ``return_tensors`` is set, as a tensor has no ragged rows.
        batched: hand the tokenizer a list; False: the one text.

    Raises:
        SpanError: a span holds no token, or the tokenizer does not say where its tokens are.
        ValueError: there is no prompt.
    """
    if not prompts:
        raise ValueError("text: expected at least one text, got an empty list")
    if len(prompts) > 1 and options.get("return_tensors"):
        options = {"padding": True, **options}
    texts = [prompt.text for prompt in prompts]
    names = [prompt.names[0] if prompt.names else f"text {row}" for row, prompt in enumerate(prompts)]
    inputs, offsets = encode(tokenizer, texts if batched else texts[0], options, names)
    cut: list[tuple[int, int]] = []
    rows = [_place(prompt, row, offsets[row], cut) for row, prompt in enumerate(prompts)]
    if cut:
        listed = ", ".join(_quoted(prompts[row], index) for row, index in cut)
        warnings.warn(f"truncation took a part of these spans: {listed}", SpanCutWarning, stacklevel=3)
    return Marked(inputs, Spans(tuple(rows)), tuple(texts), tokenizer, tuple(cut))


def _place(prompt: Prompt, row: int, offsets: RowOffsets, cut: list[tuple[int, int]]) -> tuple[Span, ...]:
    placed = []
    for index, span in enumerate(prompt.spans):
        start, end = trimmed(prompt.text, span.start, span.end)
        whole = not prompt.text[start:end].strip()
        tokens = offsets.tokens_of(start, end, whole=whole)
        is_cut = offsets.is_cut(start, end, whole=whole)
        if tokens is None:
            if is_cut:
                reason = "truncation took all of it"
            elif whole:
                reason = "it is white space, and no token holds only that"
            else:
                reason = "the tokenizer makes no token of it"
            raise SpanError(f"{_quoted(prompt, index)}: the span holds no token: {reason}")
        if is_cut:
            cut.append((row, index))
        placed.append(Span(*tokens, span.strength))
    return tuple(placed)


def _quoted(prompt: Prompt, index: int) -> str:
    span = prompt.spans[index]
    text = prompt.text[span.start : span.end]
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return f"{prompt.names[index]}, {shown!r}"
