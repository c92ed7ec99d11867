"""Chat messages with markup: their plain text, what the chat template makes of it, and where the spans land there.

A template is a program: it may drop, strip, repeat or rewrite what it is given. So it is run twice, on the plain
messages and on messages in which private characters stand at the borders of every span. Where the second result
without those characters is the first, the borders are known exactly; otherwise an error says what became of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from attnrb.text.markup import CharSpan, Delimiters, parse_markup
from attnrb.text.placing import Prompt, trimmed
from attnrb.text.spans import SpanError

__all__ = ["Chat", "Chats", "conversations", "render", "template_errors"]

_Path = tuple[int, ...]  # index of the message, and of the part of its content

# Private characters of plane 15: no template's white space, case or escaping touches them.
_FIRST_SIGN, _LAST_SIGN = 0xF0000, 0xFFFFD


class Chat(NamedTuple):
    """One conversation, and what errors call it."""

    messages: Sequence[Mapping[str, Any]]
    name: str


class Chats(NamedTuple):
    """One conversation, or several."""

    listed: list[Chat]
    batched: bool


@dataclass
class _Marked:
    """One text of a message: where it is, what it says, and its spans."""

    path: _Path
    name: str
    plain: str
    spans: list[CharSpan]
    signs: list[tuple[str, str]] = field(default_factory=list)


def conversations(value: Any) -> Chats | None:
    """The conversations that `value` is, or None for what begins with something else than messages.

    Raises:
        TypeError: what follows messages is something else.
    """
    if not _is_list(value):
        return None
    if _is_chat(value):
        return Chats([Chat(_checked(value, "messages"), "messages")], batched=False)
    if _is_chat(value[0]):
        names = [f"conversations[{index}]" for index in range(len(value))]
        return Chats([Chat(_checked(chat, name), name) for chat, name in zip(value, names, strict=True)], batched=True)
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value)


def _is_chat(value: Any) -> bool:
    return _is_list(value) and isinstance(value[0], Mapping)


def _checked(chat: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if not _is_list(chat):
        raise TypeError(f"{name}: expected a list of messages, got {chat!r:.80}")
    for index, message in enumerate(chat):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}[{index}]: expected a dictionary with role and content, got {message!r:.80}")
    checked: Sequence[Mapping[str, Any]] = chat
    return checked


def render(
    tokenizer: Any,
    chat: Chat,
    delimiters: Delimiters,
    options: Mapping[str, Any],
    add_generation_prompt: bool | None = None,
) -> Prompt:
    """Resolve the markup of a conversation and render it with the tokenizer's chat template.

    Markup is read in ``content``, where that is a string, and in the ``text`` of its parts, where it is a list of them.
    Everything else goes to the template as it is.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat: of `conversations`.
        delimiters: of the markup.
        options: of ``apply_chat_template``, the template's own variables included.
        add_generation_prompt: None: unless the assistant has the last word, or is to continue it.

    Raises:
        MarkupError: in a message.
        SpanError: the template drops or rewrites a marked text.
        ValueError: the template fails.
    """
    if add_generation_prompt is None:
        continues = options.get("continue_final_message") or chat.messages[-1].get("role") == "assistant"
        add_generation_prompt = not continues
    options = {**options, "add_generation_prompt": add_generation_prompt}
    marked = [_Marked(path, name, *parse_markup(text, *delimiters, name=name)) for path, name, text in _texts(chat)]
    plain = _apply(tokenizer, _with_texts(chat, {part.path: part.plain for part in marked}), options)
    if not any(part.spans for part in marked):
        return Prompt(plain, [], [])
    signs = _signs("".join([plain, *(part.plain for part in marked)]), chat.name)
    signed = {part.path: _sign(part, signs) for part in marked}
    return _find(_apply(tokenizer, _with_texts(chat, signed), options), plain, marked, chat.name)


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    with template_errors():
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


@contextmanager
def template_errors() -> Iterator[None]:
    """Name the chat template where it fails: its messages know only of roles and variables.

    Raises:
        ValueError: the template is no template, or refuses the messages.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise ValueError(
            f"chat: the model's chat template fails: {error}; take the prompt as it is (--no-chat)"
        ) from error


def _texts(chat: Chat) -> Iterator[tuple[_Path, str, str]]:
    for index, message in enumerate(chat.messages):
        name, content = f"{chat.name}[{index}].content", message.get("content")
        if isinstance(content, str):
            yield (index,), name, content
        elif isinstance(content, Sequence):
            for number, part in enumerate(content):
                if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                    yield (index, number), f"{name}[{number}].text", part["text"]


def _with_texts(chat: Chat, texts: Mapping[_Path, str]) -> list[dict[str, Any]]:
    """The same messages with other texts."""
    changed = []
    for index, message in enumerate(chat.messages):
        content = message.get("content")
        if (index,) in texts:
            content = texts[index,]
        elif isinstance(content, Sequence) and not isinstance(content, str):
            content = [
                {**part, "text": texts[index, number]} if (index, number) in texts else part
                for number, part in enumerate(content)
            ]
        changed.append({**message, "content": content} if "content" in message else dict(message))
    return changed


def _signs(texts: str, name: str) -> Iterator[str]:
    """Characters that stand nowhere in the texts."""
    used = set(texts)
    for code in range(_FIRST_SIGN, _LAST_SIGN + 1):
        if chr(code) not in used:
            yield chr(code)
    raise SpanError(f"{name}: a conversation may hold about {(_LAST_SIGN - _FIRST_SIGN) // 2} spans, and here are more")


def _sign(part: _Marked, signs: Iterator[str]) -> str:
    """The text with a character of its own at each border of each span, next to what is no white space."""
    borders: list[tuple[int, str]] = []
    for span in part.spans:
        start, end = trimmed(part.plain, span.start, span.end)
        opening, closing = next(signs), next(signs)
        part.signs.append((opening, closing))
        borders += [(start, opening), (end, closing)]
    pieces, place = [], 0
    for position, sign in sorted(borders, key=lambda border: border[0]):
        pieces += [part.plain[place:position], sign]
        place = position
    return "".join([*pieces, part.plain[place:]])


def _find(signed: str, plain: str, marked: Sequence[_Marked], name: str) -> Prompt:
    """Where the spans are in `plain`, which is `signed` without the signs."""
    places: dict[str, list[int]] = {sign: [] for part in marked for pair in part.signs for sign in pair}
    kept: list[str] = []
    for character in signed:
        if character in places:
            places[character].append(len(kept))
        else:
            kept.append(character)
    spans, names = [], []
    for part in marked:
        for span, (opening, closing) in zip(part.spans, part.signs, strict=True):
            text = part.plain[slice(*trimmed(part.plain, span.start, span.end))]
            for start, end in _written(places[opening], places[closing], kept, text, part.name):
                spans.append(CharSpan(start, end, span.strength))
                names.append(part.name)
    if "".join(kept) != plain:
        raise SpanError(
            f"{name}: the chat template writes another text when the messages carry marks, so the spans cannot be "
            "placed; render the messages, and give the text and the characters to attnrb.spans"
        )
    return Prompt(plain, spans, names)


def _written(starts: list[int], ends: list[int], kept: list[str], text: str, name: str) -> list[tuple[int, int]]:
    """The places where the template wrote a marked text."""
    if not starts and not ends:
        raise SpanError(f"{name}: the chat template drops the marked text {text!r:.80}")
    places = list(zip(starts, ends, strict=False))
    if len(starts) != len(ends) or any("".join(kept[start:end]) != text for start, end in places):
        raise SpanError(f"{name}: the chat template rewrites the marked text {text!r:.80}")
    return places
