"""What emphasis costs a text that has nothing to do with the span: the perplexity of neutral text behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnrb.text.mark import spans
from attnrb.text.marked import Marked

__all__ = ["NEUTRAL_TASK", "NeutralText", "neutral_texts", "perplexity"]

NEUTRAL_TASK = "neutral text"

_MARKED = (
    "The shop is closed on Mondays.",
    "Please write in blue ink.",
    "The old bridge was painted green.",
    "All tickets cost four coins.",
)
_TEXTS = (
    "A river begins as a small spring in the hills. It grows as other streams join it, slows down in the plain and "
    "leaves sand and mud where it turns. Near the sea it spreads into many arms.",
    "To bake bread, mix flour, water, salt and yeast, and knead the dough until it is smooth. Let it rest in a warm "
    "place until it has doubled in size. Then shape it and put it into a hot oven.",
    "Bees visit flowers to collect nectar. On the way, pollen sticks to their bodies and is carried from one flower "
    "to the next. Without this work many plants would bear no fruit.",
    "The moon has no light of its own. It shines because the sun shines on it. As it moves around the earth, we see "
    "more or less of its bright side, and so it seems to change its shape.",
    "A good map leaves out most of what there is. It shows roads to a driver and depths to a sailor. Whoever draws one "
    "has to know first what it will be used for.",
    "In winter the lake freezes from its edges. The ice is thin at first and breaks under a step. After some cold "
    "weeks it carries people, and in the middle of the day children skate on it.",
)


@dataclass(frozen=True)
class NeutralText:
    """A marked sentence, and a text that goes on about something else."""

    marked: str
    text: str

    def prompt(self, tokenizer: Any) -> Marked:
        """The marked sentence's tokens, all of them a span."""
        return spans(tokenizer, self.marked, [(0, len(self.marked))])

    @property
    def answer(self) -> str:
        """The text, with the space before it."""
        return " " + self.text


def neutral_texts() -> tuple[NeutralText, ...]:
    """Every text behind every marked sentence."""
    return tuple(NeutralText(marked, text) for text in _TEXTS for marked in _MARKED)


def perplexity(records: Sequence[Mapping[str, Any]]) -> float:
    """Of all tokens together: the exponential of their mean negative log-likelihood."""
    tokens = sum(record["tokens"] for record in records)
    return math.exp(-sum(record["loglikelihood"] for record in records) / tokens)
