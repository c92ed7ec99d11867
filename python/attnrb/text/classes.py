"""What tokens say: the text of each, and which class of token it is.

Both come from what a tokenizer decodes and not from its vocabulary, so byte-level BPE, SentencePiece and WordPiece look
alike here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from attnrb.protocols import LoadedTokenizer
from attnrb.text.function_words import FUNCTION_WORDS

__all__ = ["FUNCTION_WORDS", "NON_SEMANTIC", "TOKEN_CLASSES", "Token", "TokenClass", "describe_tokens", "token_texts"]

TokenClass = Literal["special", "whitespace", "punctuation", "digit", "function_word", "content"]
"""``special``: tokens that stand for no text, such as BOS. ``whitespace``: nothing but spaces, newlines, and invisible
characters. ``punctuation``: punctuation and symbols. ``digit``: digits and other numerals. ``function_word``: a word of
the closed classes (articles, prepositions, pronouns, conjunctions, auxiliaries), or a piece of one. ``content``: the
rest."""

TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
"""Every `TokenClass`, in the order of tables and colours."""

NON_SEMANTIC: tuple[TokenClass, ...] = ("special", "whitespace", "punctuation")
"""The classes of tokens that say nothing by themselves."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8  # tokens of one character; 4 bytes are the longest, and a tokenizer may add a space

_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}"
_STRAIGHTEN = str.maketrans(dict.fromkeys(_APOSTROPHES, "'"))


@dataclass(frozen=True)
class Token:
    """One token of an analysed text."""

    id: int
    text: str
    """What it adds to the text, its space included. Of a character that takes several tokens the first has the whole
    and the others have none. A special token has its name."""
    token_class: TokenClass


def describe_tokens(
    tokenizer: LoadedTokenizer, ids: Sequence[int], *, function_words: Iterable[str] | None = None
) -> tuple[Token, ...]:
    """The text and class of every token of a text.

    A word is looked up whole, whatever tokens it was cut into: ``in`` is a function word in "in time" and content in
    "beg·in". A token that holds letters has the class of its words, ``function_word`` if all of them are; without
    letters numerals decide, then punctuation and symbols, then whitespace.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the tokens of one text, in order.
        function_words: words of the closed classes in the language of the text, in any case. Default: the English ones
            of `FUNCTION_WORDS`.
    """
    words = FUNCTION_WORDS if function_words is None else frozenset(word.casefold() for word in function_words)
    texts = token_texts(tokenizer, ids)
    special = special_ids(tokenizer)
    # Special tokens part words but hold none.
    runs = ["\n" if id_ in special else text for id_, text in zip(ids, texts, strict=True)]
    is_function = _function_letters("".join(runs), words)
    tokens, start = [], 0
    previous: TokenClass = "content"
    for id_, text, run in zip(ids, texts, runs, strict=True):
        if id_ in special:
            previous = "special"
        elif run:
            previous = _classify(run, is_function[start : start + len(run)])
        # A token without text continues the character before it, and has its class.
        tokens.append(Token(int(id_), text, previous))
        start += len(run)
    return tuple(tokens)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {id_ for id_, token in added.items() if token.special}


def token_texts(tokenizer: LoadedTokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text: see `Token.text`.

    A token decoded by itself loses its leading space in many tokenizers, so each is decoded after an anchor, a token
    whose own text is known.
    """
    special = special_ids(tokenizer)
    anchor = _anchor(tokenizer)
    lead = len(_decode(tokenizer, anchor))
    known: dict[int, str] = {}

    def text_of(run: Sequence[int]) -> str:
        return _decode(tokenizer, [*anchor, *run])[lead:]

    for id_ in set(ids):
        if id_ in special:
            known[id_] = str(tokenizer.convert_ids_to_tokens(int(id_)))
        else:
            known[id_] = text_of([int(id_)])
    texts = [known[id_] for id_ in ids]
    place = 0
    while place < len(ids):
        if _UNFINISHED in texts[place] and ids[place] not in special:
            for end in range(place + 2, min(place + _LONGEST_CHARACTER, len(ids)) + 1):
                if ids[end - 1] in special:
                    break
                whole = text_of([int(id_) for id_ in ids[place:end]])
                if _UNFINISHED not in whole:
                    texts[place:end] = [whole, *[""] * (end - place - 1)]
                    place = end - 1
                    break
        place += 1
    return tuple(texts)


def _anchor(tokenizer: Any) -> list[int]:
    """A token of plain text, or a few."""
    for text in ("a", "x", "1"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = getattr(tokenizer, "unk_token_id", None)
        if ids and unknown not in ids:
            return [int(id_) for id_ in ids]
    return []


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _function_letters(text: str, words: frozenset[str]) -> list[bool]:
    """For each character whether it belongs to one of these words."""
    marked = [False] * len(text)
    before = 0  # where the word before began
    for start, end in _words(text):
        word = text[start:end].casefold().translate(_STRAIGHTEN)
        if word in words:
            marked[start:end] = [True] * (end - start)
        # WordPiece parts don ' t.
        parted = text[before:end].casefold().translate(_STRAIGHTEN)
        if "' " in parted and parted.replace(" ", "") in words:
            marked[before:end] = [True] * (end - before)
        before = start
    return marked


def _words(text: str) -> Iterator[tuple[int, int]]:
    """Where words stand: letters with their marks, joined by apostrophes as in don't."""
    is_letter = [unicodedata.category(character)[0] in "LM" for character in text]
    place = 0
    while place < len(text):
        start = place
        while place < len(text) and (
            is_letter[place] or (start < place < len(text) - 1 and text[place] in _APOSTROPHES and is_letter[place + 1])
        ):
            place += 1
        if place > start:
            yield start, place
        place += 1


def _classify(text: str, is_function: Sequence[bool]) -> TokenClass:
    kinds = [unicodedata.category(character)[0] for character in text]
    letters = [function for function, kind in zip(is_function, kinds, strict=True) if kind in "LM"]
    if letters:
        return "function_word" if all(letters) else "content"
    if "N" in kinds:
        return "digit"
    if "P" in kinds or "S" in kinds:
        # The apostrophe of don't belongs to the word.
        return "function_word" if any(is_function) else "punctuation"
    return "whitespace"
