"""Instructions that a program can check, for answers that a model writes itself.

    item = next(instruction_items("held-out", 0))
    follows(item.group, written)

=============== ======================================================================
kind            the answer
=============== ======================================================================
``lower case``  has letters, and no capital among them
``upper case``  has letters, and no small one among them
``no commas``   has no comma
``end phrase``  ends with the words "That is all."
``JSON``        is one JSON object with a text under "answer", perhaps in a code fence
=============== ======================================================================

An answer of fewer than three words follows nothing: else saying nothing would be the safest way to have no comma.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from attnrb.studies.conflict import PLACES, SPLITS
from attnrb.studies.material import ASIDES, WrittenItem
from attnrb.text.mark import mark, spans
from attnrb.text.marked import Marked
from attnrb.text.reading import parse_json

__all__ = ["KINDS", "InstructionItem", "follows", "instruction_items", "repeats_itself"]

_END = "That is all."
_FEWEST_WORDS = 3
_FENCE = re.compile(r"```(?:json)?\s*(?P<inside>.*?)\s*```", re.DOTALL)
_OPEN, _CLOSE = "⟦", "⟧"  # that no item has


class _Kind(NamedTuple):
    """A kind of instruction."""

    instruction: str
    follows: Callable[[str], bool]
    obey: Callable[[str], str]
    """Makes an answer that follows it of a plain one."""


def _is_json(text: str) -> bool:
    match = _FENCE.fullmatch(text)
    try:
        found = parse_json(match["inside"] if match else text)
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("answer"), str)


KINDS: Mapping[str, _Kind] = {
    "lower case": _Kind("Write the whole answer in small letters, without any capital letter.", str.islower, str.lower),
    "upper case": _Kind("Write the whole answer in CAPITAL LETTERS.", str.isupper, str.upper),
    "no commas": _Kind(
        "Do not use any comma in the answer.", lambda text: "," not in text, lambda text: text.replace(",", "")
    ),
    "end phrase": _Kind(
        f'End the answer with the words "{_END}"', lambda text: text.endswith(_END), lambda text: f"{text} {_END}"
    ),
    "JSON": _Kind(
        'Give the answer as JSON, as in {"answer": "..."}, and nothing else.',
        _is_json,
        lambda text: json.dumps({"answer": text}),
    ),
}

# Each with a plain answer to it.
_REQUESTS = (
    (
        "Describe the {place} in one short sentence.",
        "The {place} is old and quiet, and many people like to go there.",
    ),
    (
        "Say in one short sentence why somebody would go to the {place}.",
        "People go to the {place} to meet friends, to rest, and to look at old things.",
    ),
    (
        "What could somebody hear near the {place}? Answer in one short sentence.",
        "Near the {place} one could hear birds, steps on the stones, and a bell.",
    ),
)


def follows(kind: str, text: str) -> bool:
    """Whether a text follows an instruction of this kind; ``kind`` is one of `KINDS`."""
    text = text.strip()
    return len(text.split()) >= _FEWEST_WORDS and KINDS[kind].follows(text)


def repeats_itself(text: str) -> bool:
    """Whether fewer than half of the words of a text of ten or more are different ones."""
    words = text.lower().split()
    return len(words) >= 10 and 2 * len(set(words)) < len(words)


@dataclass(frozen=True)
class InstructionItem(WrittenItem):
    """A prompt with an instruction, whose answer is written. Its one candidate is an answer that follows it."""

    @property
    def answer(self) -> str:
        """Which begins a line of its own."""
        return self.candidates[0]

    def judge(self, text: str) -> bool:
        """See `follows`."""
        return follows(self.group, text)

    def prompt(self, tokenizer: Any, form: str = "as it is", span: str = "none") -> Marked:
        """The prompt's tokens and its span, in the tokenizer's chat template if it has one."""
        text, ranges = self.text(form, span)
        if not getattr(tokenizer, "chat_template", None):
            return spans(tokenizer, f"{text}\nAnswer:\n", ranges)
        for start, end in ranges:
            text = f"{text[:start]}{_OPEN}{text[start:end]}{_CLOSE}{text[end:]}"
        return mark(tokenizer, [{"role": "user", "content": text}], open=_OPEN, close=_CLOSE)


def instruction_items(split: str, seed: int) -> Iterator[InstructionItem]:
    """Items without end, of all kinds in turn.

    Args:
        split: one of `attnrb.studies.conflict.SPLITS`.
        seed: another one makes other items.
    """
    draw, side = random.Random(f"written {split} {seed}"), SPLITS.index(split)
    for index in itertools.count():
        kind = list(KINDS)[index % len(KINDS)]
        place = draw.choice([*PLACES["house"][side]])
        request, plain = draw.choice(_REQUESTS)
        aside = draw.choice(ASIDES[side])
        before = draw.randrange(2)
        sentences = (aside, KINDS[kind].instruction) if before else (KINDS[kind].instruction, aside)
        answer = KINDS[kind].obey(plain.format(place=place))
        yield InstructionItem(sentences, before, 1 - before, request.format(place=place), (answer,), kind)
