"""Which characters each token decodes to: for tokenizers without offsets, and for token ids without their text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from attnrb.text.spans import SpanError

__all__ = ["Decoded", "decode", "decode_offsets", "special_ids"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 16  # tokens; 4 bytes are the longest, and tokenizers have ways of their own


class Decoded(NamedTuple):
    """Token ids as text. Token i holds the characters ``starts[i] <= c < ends[i]``.

    The tokens of one character that takes several all hold it. A token that stands for no character holds none.
    """

    text: str
    starts: list[int]
    ends: list[int]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of these tokens, special tokens by name, nothing tidied."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {id_ for id_, token in added.items() if token.special}


def decode_offsets(tokenizer: Any, ids: Sequence[int], name: str = "inputs") -> Decoded:
    """Decode, and find the characters of each token, in time linear in their number.

    What a token adds is what the text gains when it is decoded behind the tokens just before it: alone, many tokenizers
    would drop its leading space. A character that is not finished decodes to something that is not in the text of all
    tokens, U+FFFD as a rule, so tokens are taken together until one finishes it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the tokens of one text, in order.
        name: what errors call them.

    Raises:
        SpanError: what the tokens add one by one is not the text they decode to together.
    """
    ids = [int(token) for token in ids]
    text = decode(tokenizer, ids)
    offsets: list[tuple[int, int]] = []
    anchor = length = 0  # the token that decoding starts with; the characters that are told apart
    while (done := len(offsets)) < len(ids):
        known = decode(tokenizer, ids[anchor:done])
        for stop in range(done + 1, min(done + _LONGEST_CHARACTER, len(ids)) + 1):
            whole = decode(tokenizer, ids[anchor:stop])
            gained = whole[len(known) :]
            if whole.startswith(known) and text.startswith(gained, length):
                break
        else:
            break
        if gained:
            _claim(tokenizer, offsets, ids[:stop], gained, length)
        group = _group(tokenizer, ids[anchor:stop], stop - done, known, gained)
        offsets += [(length + start, length + end) for start, end in group]
        length += len(gained)
        # A token that adds nothing may be needed to decode the next.
        if gained or stop - anchor > _LONGEST_CHARACTER:
            anchor = done
    if len(offsets) < len(ids) or length != len(text):
        raise SpanError(
            f"{name}: the tokens cannot be told apart in the text they decode to, so no span can be found in it; "
            "give the text and let attnrb.mark or attnrb.spans tokenise it"
        )
    return Decoded(text, [start for start, _ in offsets], [end for _, end in offsets])


def _group(tokenizer: Any, window: list[int], count: int, known: str, gained: str) -> list[tuple[int, int]]:
    """Which of the characters `gained` each of the last `count` tokens of the window holds."""
    if not gained and known.endswith(_UNFINISHED):  # the other bytes of a real U+FFFD
        return [(-1, 0)] * count
    if count == 1:
        return [(0, len(gained))]
    offsets, finished = [], 0
    for end in range(len(window) - count + 1, len(window) + 1):
        start = finished
        part = decode(tokenizer, window[:end])
        surely = part if end == len(window) else part.rstrip(_UNFINISHED)
        finished = max(start, _common(surely, known + gained) - len(known))
        begun = finished == start or len(part) > len(known) + finished
        offsets.append((start, min(finished + begun, len(gained))))
    return offsets


def _claim(tokenizer: Any, offsets: list[tuple[int, int]], ids: list[int], gained: str, length: int) -> None:
    """Give the tokens just before that added nothing their share, where what follows needs them to be decoded."""
    silent = len(offsets)
    while silent and offsets[silent - 1] == (length, length):
        silent -= 1
    alone = decode(tokenizer, ids[len(offsets) :])
    if silent < len(offsets) and alone.strip() != gained.strip():
        offsets[silent:] = [(length, length + 1)] * (len(offsets) - silent)


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
