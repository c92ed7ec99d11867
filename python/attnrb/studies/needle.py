"""A needle in a haystack: long prompts of small talk in which a few sentences say which word belongs to which place.

    items = needle_items(4096)("held-out", 0)
    next(items).prompt(tokenizer, span="marked")

Four sentences of one form stand among the small talk, and the question is about one of them. So a model cannot go by
the form alone. Where it stands is part of the item: near the beginning, in the middle or near the end.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from attnrb.studies.conflict import PLACES, SPLITS
from attnrb.studies.material import PEOPLE, StudyItem

__all__ = ["needle_items"]

_NEEDLES = 4
_DEPTHS = {"begin": 0.1, "middle": 0.5, "end": 0.9}
_CHARACTERS_PER_TOKEN = 3.9
"""Of this English; less than it is with usual tokenizers, so that a prompt is rather too short than too long."""
_WORDS = ("silver", "orange", "winter", "summer", "coffee", "yellow", "golden", "dragon", "castle", "forest", "ocean")

_WHO = ("{person}", "{person}'s neighbour", "The old teacher", "A friend of {person}", "Somebody from the village")
_DID = (
    "walked down to the river",
    "talked about the weather",
    "was looking for a pair of gloves",
    "bought two loaves and some butter",
    "waited for the bus in the rain",
    "told a long story about a ship",
    "mended the handle of a broken cup",
    "sat on a bench and read the paper",
    "counted the steps up to the gate",
    "planted beans behind the shed",
    "wrote a card and could not find a stamp",
    "heard music from an open window",
)
_WHEN = (
    "in the morning",
    "after lunch",
    "before it got dark",
    "on the way home",
    "while the others were still asleep",
    "as on every Tuesday",
    "without saying a word",
    "for the second time that week",
)


def _small_talk(draw: random.Random, split: int) -> str:
    who = draw.choice(_WHO).format(person=draw.choice(PEOPLE[split]))
    return f"{who} {draw.choice(_DID)} {draw.choice(_WHEN)}."


def needle_items(tokens: int) -> Callable[[str, int], Iterator[StudyItem]]:
    """What makes items without end, each of about so many tokens: a function of split and seed.

    Args:
        tokens: of a prompt, roughly: its characters are what is counted.

    Raises:
        ValueError: ``tokens`` is too small for the question and the needles.
    """
    if tokens < 96:
        raise ValueError(f"needles: expected prompts of 96 tokens or more, got {tokens}")

    def endless(split: str, seed: int) -> Iterator[StudyItem]:
        draw = random.Random(f"needle {tokens} {split} {seed}")
        for index in itertools.count():
            yield _item(draw, SPLITS.index(split), index, tokens)

    return endless


def _item(draw: random.Random, split: int, index: int, tokens: int) -> StudyItem:
    places, words = draw.sample(PLACES["house"][split], _NEEDLES), draw.sample(_WORDS, 2 * _NEEDLES)
    needles = [f"The word for the {place} is {word}." for place, word in zip(places, words, strict=False)]
    question = f"The word for the {places[0]} is"
    room = int(tokens * _CHARACTERS_PER_TOKEN) - sum(len(needle) + 1 for needle in needles) - len(question)
    talk: list[str] = []
    while room > 0:
        talk.append(_small_talk(draw, split))
        room -= len(talk[-1]) + 1
    depth = list(_DEPTHS)[index % len(_DEPTHS)]
    # The other needles lie anywhere; the one that is asked for where its depth says.
    sentences: list[str] = talk[:-1] or talk
    for needle in needles[1:]:
        sentences.insert(draw.randint(0, len(sentences)), needle)
    sentences.insert(round(_DEPTHS[depth] * len(sentences)), needles[0])
    wrong = sentences.index(draw.choice(needles[1:]))
    return StudyItem(
        tuple(sentences), sentences.index(needles[0]), wrong, question, (words[0], *words[1:]), f"{depth} of the prompt"
    )
