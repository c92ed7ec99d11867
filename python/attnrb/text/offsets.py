"""Which characters of its text each token of a batch holds, and which tokens hold given characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from attnrb.text.decoding import decode_offsets
from attnrb.text.spans import SpanError

__all__ = ["TOKENIZER_OPTIONS", "RowOffsets", "check_options", "encode", "split_options"]

TOKENIZER_OPTIONS = frozenset(
    {
        "add_special_tokens",
        "max_length",
        "pad_to_multiple_of",
        "padding",
        "padding_side",
        "return_attention_mask",
        "return_length",
        "return_offsets_mapping",
        "return_special_tokens_mask",
        "return_tensors",
        "return_token_type_ids",
        "split_special_tokens",
        "truncation",
        "verbose",
    }
)
"""Options of a tokenizer's call that leave one row for each text, and one text in each row."""

_REFUSED_FOR_CHATS = ("tokenize", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens")

# What SentencePiece and byte-level BPE write for a space. They can put one before a text that has none.
_SPACES = "▁Ġ"

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowOffsets:
    """The characters of every token of one row: token i holds ``starts[i] <= c < ends[i]`` of the row's text.

    Attributes:
        starts: int64 ``[n]``, n the slots of the row, padding included.
        ends: int64 ``[n]``. Padding, special tokens that the text does not spell, and a space that the tokenizer put
            before the text hold no character: there `ends` is `starts`.
        cut: int64 ``[c, 2]``, the same of the tokens that truncation took away.
    """

    starts: Offsets
    ends: Offsets
    cut: Offsets = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))

    def tokens_of(self, start: int, end: int, *, whole: bool = False) -> tuple[int, int] | None:
        """The first token that holds any of the characters ``start <= c < end``, and the one behind the last.

        With `whole` only tokens count that hold no other characters. None: there is no such token.
        """
        found = np.flatnonzero(_hold(self.starts, self.ends, start, end, whole))
        return (int(found[0]), int(found[-1]) + 1) if found.size else None

    def is_cut(self, start: int, end: int, *, whole: bool = False) -> bool:
        """Whether truncation took away a token of these characters."""
        return bool(_hold(self.cut[:, 0], self.cut[:, 1], start, end, whole).any())


def _hold(starts: Offsets, ends: Offsets, start: int, end: int, whole: bool) -> npt.NDArray[np.bool_]:
    inside = (starts >= start) & (ends <= end) if whole else (starts < end) & (ends > start)
    held: npt.NDArray[np.bool_] = inside & (ends > starts)
    return held


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is no option of a tokenizer, or would make other rows than one for each text.

    Raises:
        TypeError: names the option.
    """
    for name in options:
        if name not in TOKENIZER_OPTIONS:
            raise TypeError(f"{name}: not an option here; expected any of {', '.join(sorted(TOKENIZER_OPTIONS))}")


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a tokenizer's call, and what is left for ``apply_chat_template`` and the template.

    Raises:
        TypeError: an option would make something else than one row of tokens for each chat.
    """
    for name in _REFUSED_FOR_CHATS:
        if name in options:
            raise TypeError(f"{name}: not an option here, where chats become tokens with their offsets")
    tokenizing = {name: value for name, value in options.items() if name in TOKENIZER_OPTIONS}
    rest = {name: value for name, value in options.items() if name not in TOKENIZER_OPTIONS}
    more = rest.pop("tokenizer_kwargs", None) or {}
    check_options(more)
    return {**tokenizing, **more}, rest


def encode(
    tokenizer: Any, texts: str | Sequence[str], options: Mapping[str, Any], names: Sequence[str]
) -> tuple[Any, list[RowOffsets]]:
    """Tokenise, and say for each row which characters its tokens hold.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: one text or several.
        options: of the tokenizer's call, checked by `check_options`.
        names: what errors call each text.

    Returns:
        ``(inputs, rows)``; `inputs` is what ``tokenizer(texts, **options)`` returns, a ``BatchEncoding``.

    Raises:
        SpanError: the tokenizer gives no offsets, and its tokens do not decode to the text either.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    if getattr(tokenizer, "is_fast", False):
        inputs = tokenizer(texts, **options)
        return inputs, [_encoded(encoding, text) for encoding, text in zip(inputs.encodings, listed, strict=True)]
    inputs = tokenizer(texts, **{**options, "return_special_tokens_mask": True})
    masks = (
        inputs["special_tokens_mask"]
        if options.get("return_special_tokens_mask")
        else inputs.pop("special_tokens_mask")
    )
    ids = inputs["input_ids"]
    if isinstance(texts, str) and not options.get("return_tensors"):
        ids, masks = [ids], [masks]
    return inputs, [
        _decoded(tokenizer, text, _integers(row), _integers(mask), options, name)
        for text, row, mask, name in zip(listed, ids, masks, names, strict=True)
    ]


def _encoded(encoding: Any, text: str) -> RowOffsets:
    """From the offsets of an encoding of the library ``tokenizers``."""
    parts = [_own_offsets(part) for part in (encoding, *encoding.overflowing)]
    offsets = np.concatenate(parts)
    if not text.isascii():
        _join_composed(offsets, text)
    kept = len(parts[0])
    return RowOffsets(offsets[:kept, 0], offsets[:kept, 1], offsets[kept:])


def _own_offsets(encoding: Any) -> Offsets:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    of_text = np.array([sequence is not None for sequence in encoding.sequence_ids], dtype=np.bool_)
    offsets[~of_text] = 0
    # A space put before the text, or behind a special token in it, claims the character of the next token.
    for slot, token in enumerate(encoding.tokens[:-1]):
        if of_text[slot] and not token.strip(_SPACES) and offsets[slot + 1, 0] == offsets[slot, 0]:
            offsets[slot, 1] = offsets[slot, 0]
    return offsets


def _join_composed(offsets: Offsets, text: str) -> None:
    """Give tokens the marks that a normaliser joined with the letters before them, changing `offsets` in place.

    The library says that such a token (an e and an acute accent made into one é) holds the letter alone, and leaves the
    mark to no token.
    """
    steps = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(steps, offsets[:, 0], 1)
    np.add.at(steps, offsets[:, 1], -1)
    held = np.cumsum(steps[:-1]) > 0
    place = 1
    while place < len(text):
        end = place
        if held[place - 1]:
            while end < len(text) and not held[end] and _continues(text, place, end):
                end += 1
        if end > place:
            offsets[offsets[:, 1] == place, 1] = end
        place = end + 1


def _continues(text: str, place: int, end: int) -> bool:
    """Whether the character at `end` belongs to the one before `place`: a mark, or a part that it is composed with."""
    is_mark = unicodedata.category(text[end]).startswith("M")
    return is_mark or len(unicodedata.normalize("NFC", text[place - 1 : end + 1])) == 1


def _decoded(
    tokenizer: Any, text: str, ids: list[int], special: list[int], options: Mapping[str, Any], name: str
) -> RowOffsets:
    """From what the tokens decode to, where that is the text."""
    splitting = {key: options[key] for key in ("split_special_tokens",) if key in options}
    whole = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False, **splitting)["input_ids"]]
    decoded = decode_offsets(tokenizer, whole, name)
    if decoded.text.lstrip(" ") != text.lstrip(" "):
        raise SpanError(
            f"{name}: {type(tokenizer).__name__} gives no character offsets, and its tokens do not decode to the text, "
            "so no span can be placed exactly; load the fast version of this tokenizer"
        )
    moved = len(text) - len(decoded.text)
    offsets = np.stack([decoded.starts, decoded.ends], axis=-1).astype(np.int64).reshape(-1, 2) + moved
    offsets = offsets.clip(min=0)
    kept = np.flatnonzero(np.array(special, dtype=np.int64) == 0)
    first = len(whole) - kept.size if tokenizer.truncation_side == "left" else 0
    last = first + kept.size
    if [ids[slot] for slot in kept] != whole[max(first, 0) : last] or first < 0:
        raise SpanError(
            f"{name}: {type(tokenizer).__name__} gives no character offsets, and its tokens of the text alone are "
            "others than with these options, so no span can be placed exactly; load the fast version of this tokenizer"
        )
    placed = np.zeros((len(ids), 2), dtype=np.int64)
    placed[kept] = offsets[first:last]
    return RowOffsets(placed[:, 0], placed[:, 1], np.concatenate([offsets[:first], offsets[last:]]))


def _integers(row: Any) -> list[int]:
    return [int(value) for value in row]
