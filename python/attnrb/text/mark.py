"""Say which part of a prompt matters, and get its tokens: by markup in a text or a chat, or by characters."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from attnrb.protocols import Tokenizer
from attnrb.text.chat import conversations, render
from attnrb.text.marked import Marked
from attnrb.text.markup import CharSpan, check_delimiters, parse_markup
from attnrb.text.offsets import check_options, split_options
from attnrb.text.placing import Prompt, tokenise
from attnrb.text.reading import check_text
from attnrb.text.spans import check_strength

__all__ = ["mark", "spans"]

Message = Mapping[str, Any]


def mark(
    tokenizer: Tokenizer,
    text: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
    *,
    open: str = "((",
    close: str = "))",
    add_generation_prompt: bool | None = None,
    return_tensors: str | None = "pt",
    **options: Any,
) -> Marked:
    """Tokenise a prompt that says by markup which part of it matters.

        marked = attnrb.mark(tokenizer, "((Currently, the capital is B.)) The capital is")

    ``((…))`` marks a span and ``((…:4))`` gives it a strength; `attnrb.text.markup` has the rules. The tokens are those
    of the text without its markup, as if there had never been any, and a span is all tokens that hold one of its
    characters: a token that straddles its border belongs to it. White space at the edges of a span does not count,
    unless the span is nothing else; then its tokens are those that hold only white space of the span.

    Chat messages go through the tokenizer's chat template. Markup is read in the ``content`` of every message, and the
    spans are found again in what the template writes. A text that it repeats is marked wherever it stands.

    Args:
        tokenizer: a Hugging Face tokenizer. One without character offsets will do if its tokens decode to the text.
        text: a text, several texts, a list of messages, or several such lists.
        open: what opens a span. Default: ``((``.
        close: what closes it. Default: ``))``.
        add_generation_prompt: end a chat with what makes the model answer. Default: unless the last message is the
            assistant's, or ``continue_final_message`` is given.
        return_tensors: default: ``"pt"``. None: lists.
        options: of the tokenizer, such as ``padding``, ``truncation``, ``max_length`` or ``add_special_tokens`` (False
            by default for a chat, whose template writes them). Several texts are padded to the longest by default, if
            tensors are asked for; ``padding_side`` is the tokenizer's by default, and models generate from batches
            that are padded on the left. For a chat also what ``apply_chat_template`` takes, the template's own
            variables included, such as ``tools`` or ``enable_thinking``.

    Returns:
        `Marked`: `inputs`, a ``BatchEncoding`` as the tokenizer gives it, and `spans`, in slots of that batch.

    Raises:
        MarkupError: the markup cannot be read.
        SpanError: a span holds no token, truncation took all of it, the template drops or rewrites it, or the
            tokenizer does not say where its tokens are.
        TypeError: `text` is none of these, or an option is none of the tokenizer's.
        ValueError: `text` is an empty list, or holds half of a surrogate pair; or the template fails.

    Warns:
        SpanCutWarning: truncation took a part of a span. `Marked.cut` names these.
    """
    delimiters = check_delimiters(open, close)
    options["return_tensors"] = return_tensors
    check_text("text", text)
    chats = conversations(text)
    if chats is not None:
        tokenizing, templating = split_options(options)
        prompts = [render(tokenizer, chat, delimiters, templating, add_generation_prompt) for chat in chats.listed]
        return tokenise(tokenizer, prompts, {"add_special_tokens": False, **tokenizing}, batched=chats.batched)
    if add_generation_prompt is not None:
        raise TypeError("add_generation_prompt: expected with chat messages only, and text is no list of messages")
    check_options(options)
    texts, names = _named_texts(text)
    prompts = []
    for one, name in zip(texts, names, strict=True):
        plain, marked = parse_markup(one, *delimiters, name=name)
        prompts.append(Prompt(plain, marked, [name] * len(marked)))
    return tokenise(tokenizer, prompts, options, batched=not isinstance(text, str))


def spans(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    ranges: Sequence[Any],
    *,
    return_tensors: str | None = "pt",
    **options: Any,
) -> Marked:
    """Tokenise a prompt of which certain characters matter.

        marked = attnrb.spans(tokenizer, "Currently, the capital is B. The capital is", [(0, 28)])

    As `mark` in all else, but the text is taken as it is: nothing in it is markup.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: a text or several.
        ranges: for a text a list of ``(start, end)`` or ``(start, end, strength)``, by characters, ``end`` behind the
            last; for several texts one such list for each.
        return_tensors: as `mark`.
        options: of the tokenizer, as `mark`.

    Raises:
        SpanError: as `mark`.
        TypeError: `text` or `ranges` is of another type, or an option is none of the tokenizer's.
        ValueError: a range is empty or does not lie in its text, there is not one list for each text, or a text holds
            half of a surrogate pair.

    Warns:
        SpanCutWarning: as `mark`.
    """
    options["return_tensors"] = return_tensors
    check_options(options)
    check_text("text", text)
    texts, names = _named_texts(text)
    listed = [ranges] if isinstance(text, str) else list(ranges)
    if len(listed) != len(texts):
        raise ValueError(f"ranges: expected {len(texts)} lists, one for each text, got {len(listed)}")
    prompts = []
    for index, (one, name, mine) in enumerate(zip(texts, names, listed, strict=True)):
        where = "ranges" if isinstance(text, str) else f"ranges[{index}]"
        marked = _ranges(mine, where, len(one))
        prompts.append(Prompt(one, marked, [name] * len(marked)))
    return tokenise(tokenizer, prompts, options, batched=not isinstance(text, str))


def _named_texts(text: Any) -> tuple[list[str], list[str]]:
    if isinstance(text, str):
        return [text], ["text"]
    if not isinstance(text, Sequence) or not all(isinstance(one, str) for one in text):
        raise TypeError(f"text: expected a string, strings, or chat messages, got {text!r:.80}")
    return list(text), [f"text[{index}]" for index in range(len(text))]


def _ranges(ranges: Any, where: str, length: int) -> list[CharSpan]:
    if not isinstance(ranges, Sequence) or isinstance(ranges, str):
        raise TypeError(f"{where}: expected a list of (start, end), got {ranges!r}")
    checked = []
    for index, one in enumerate(ranges):
        name = f"{where}[{index}]"
        if not isinstance(one, Sequence) or isinstance(one, str) or len(one) not in (2, 3):
            raise TypeError(f"{name}: expected (start, end) or (start, end, strength), got {one!r}")
        start, end = one[0], one[1]
        if not all(isinstance(place, numbers.Integral) and not isinstance(place, bool) for place in (start, end)):
            raise TypeError(f"{name}: expected two integers, got {start!r} and {end!r}")
        if not 0 <= start < end <= length:
            raise ValueError(f"{name}: expected 0 <= start < end <= {length}, the text's length, got ({start}, {end})")
        strength = one[2] if len(one) == 3 else None
        checked.append(CharSpan(int(start), int(end), None if strength is None else check_strength(name, strength)))
    return checked
