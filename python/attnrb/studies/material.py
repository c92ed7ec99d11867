"""What the study of emphasis asks: prompts of sentences, one of which is pointed at, made from lists of words.

    items = study_items("retrieval", 100)
    items[0].prompt(tokenizer, span="marked")

============== ========================================================== =====================================
task           what the prompt says                                       what is marked
============== ========================================================== =====================================
``conflict``   a fact, and then a newer one that contradicts it           the newer fact
``retrieval``  four or eight places, each with the person who has its key the pair that is asked for
``instruction`` facts about a thing, and which of them to say             which of them to say
``story``      where two people put two things                            the sentence about the thing asked for
``several``    two notes with three facts each                            one note; the answer is one of its facts
``irrelevant`` one fact, and a sentence that has nothing to do with it    the other sentence: a price, no help
============== ========================================================== =====================================

The same call makes the same items, no two of them alike. Items of the two splits share no place or thing. The names in
them are first names, of nobody in particular.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from attnrb.studies.conflict import PLACES, SPLITS, check_draw
from attnrb.studies.items import TaskItem
from attnrb.studies.tasks import task_items
from attnrb.text.function_words import FUNCTION_WORDS
from attnrb.text.mark import spans
from attnrb.text.marked import Marked

__all__ = [
    "ASIDES",
    "FORMS",
    "MATERIAL",
    "PEOPLE",
    "POINTED",
    "StudyItem",
    "WrittenItem",
    "different_items",
    "study_items",
]

FORMS = ("as it is", "asterisks", "important", "repeated", "alone")
"""How the text itself may point: not at all, by asterisks, by "Important:" before the marked sentence, by saying it
again before the question, or by leaving out all other sentences."""
POINTED = ("none", "marked", "wrong", "automatic")
"""What a span lies on: nothing, the marked sentence, one with a wrong answer, or the sentence that shares most words
with the question, which needs no knowledge of the answer."""

AnyItem = TypeVar("AnyItem", bound="StudyItem")

_SENTENCES = re.compile(r"(?<=[.?!]) ")
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class StudyItem:
    """Sentences, one of them marked, and the beginning of another one, which the answer completes.

    Attributes:
        sentences: in their order.
        marked: which of them is pointed at.
        wrong: which of them a wrong span lies on.
        question: what the candidates complete.
        candidates: how it may go on, the right one first.
        group: items of one group are reported together as well; may be empty.
        joint: what stands between two sentences, and before the question.
        per_character: whether the log-likelihoods of the candidates are divided by the numbers of their characters, as
            is usual where these differ much.
    """

    sentences: tuple[str, ...]
    marked: int
    wrong: int
    question: str
    candidates: tuple[str, ...]
    group: str = ""
    joint: str = " "
    per_character: bool = False

    @property
    def answer(self) -> str:
        """The right candidate, with the space before it."""
        return " " + self.candidates[0]

    @property
    def fingerprint(self) -> str:
        """Tells this item from others, whatever split somebody says it is of."""
        content = "\n".join([*self.sentences, self.question, *self.candidates])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def automatic(self) -> int:
        """The sentence that shares most words with the question, function words aside; the first of several."""
        asked = _content_words(self.question)
        shared = [len(asked & _content_words(sentence)) for sentence in self.sentences]
        return shared.index(max(shared))

    def text(self, form: str = "as it is", span: str = "none") -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and the characters of its span.

        Raises:
            ValueError: ``form`` is none of `FORMS`, or ``span`` none of `POINTED`, or the two do not go together.
        """
        if form not in FORMS:
            raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        if span not in POINTED:
            raise ValueError(f"span: expected one of {', '.join(POINTED)}, got {span!r}")
        if span != "none" and form != "as it is":
            raise ValueError(f"span: expected none where the text itself points ({form}), got {span!r}")
        parts = list(self.sentences)
        if form == "asterisks":
            parts[self.marked] = f"**{parts[self.marked]}**"
        elif form == "important":
            parts[self.marked] = f"Important: {parts[self.marked]}"
        elif form == "repeated":
            parts.append(parts[self.marked])
        elif form == "alone":
            parts = [parts[self.marked]]
        ranges = []
        if span != "none":
            place = {"marked": self.marked, "wrong": self.wrong, "automatic": self.automatic}[span]
            start = sum(len(part) + len(self.joint) for part in parts[:place])
            ranges = [(start, start + len(parts[place]))]
        return self.joint.join([*parts, self.question]), ranges

    def prompt(self, tokenizer: Any, form: str = "as it is", span: str = "none") -> Marked:
        """The prompt's tokens and its span: see `text`."""
        text, ranges = self.text(form, span)
        return spans(tokenizer, text, ranges)

    def scores(self, log_likelihoods: Sequence[float]) -> list[float]:
        """What decides between the candidates, of their log-likelihoods."""
        if not self.per_character:
            return list(log_likelihoods)
        return [each / len(word) for each, word in zip(log_likelihoods, self.candidates, strict=True)]


class WrittenItem(StudyItem):
    """An item whose answer is written rather than chosen from its candidates."""

    def judge(self, text: str) -> bool:
        """Whether a text that was written is right."""
        raise NotImplementedError


def _content_words(text: str) -> frozenset[str]:
    words = _WORDS.findall(text.lower())
    return frozenset(word for word in words if word not in FUNCTION_WORDS)


def _of_task(item: TaskItem) -> StudyItem:
    """An item of `attnrb.studies.tasks`, cut into sentences."""
    before = _SENTENCES.split(item.before) if item.before else []
    *behind, question = _SENTENCES.split(item.behind)
    sentences = (*before, item.marked, *behind)
    others = [place for place in range(len(sentences)) if place != len(before)]
    wrong = next(
        place for place in others if set(item.candidates[1:]) & set(_WORDS.findall(sentences[place].rstrip(".")))
    )
    return StudyItem(sentences, len(before), wrong, question, item.candidates)


def _converted(task: str) -> Callable[[str, int], Iterator[StudyItem]]:
    def endless(split: str, seed: int) -> Iterator[StudyItem]:
        for more in itertools.count():
            # Each batch has a seed of its own: a longer list begins with the shorter one.
            for item in task_items(task, 64, split=split, seed=1000 * more + seed):
                assert isinstance(item, TaskItem)
                yield _of_task(item)

    return endless


# Each as (those of development, those held out).
PEOPLE = (
    ("Anna", "Tom", "Laura", "Peter", "Julia", "Mark", "Sarah", "Paul", "Maria", "Henry"),
    ("Emma", "David", "Alice", "Simon", "Clara", "Oliver", "Ruth", "Daniel", "Grace", "Victor"),
)
_THINGS = (
    ("boat", "chair", "fence", "hat", "lamp", "cup", "clock", "ladder"),
    ("bicycle", "coat", "roof", "table", "train", "vase", "spoon", "kite"),
)
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange")
_STUFFS = ("wood", "stone", "steel", "glass", "copper", "iron", "brick", "silver")
_FOODS = ("bread", "rice", "soup", "fish", "cheese", "pizza", "cake", "pasta")
_ANIMALS = ("dog", "cat", "horse", "goat", "rabbit", "parrot", "pig", "sheep")
ASIDES = (
    (
        "Two birds sat on a wire.",
        "It rained in the evening.",
        "The children played cards.",
        "A bus went by.",
        "Somebody sang in the street.",
        "The milk was cold.",
    ),
    (
        "A kettle whistled next door.",
        "Clouds came up from the west.",
        "The leaves were falling.",
        "A dozen letters lay on the desk.",
        "The radio played a waltz.",
        "Nobody was in a hurry.",
    ),
)
_PAIRS = (4, 8)
_ASKED = ("first", "middle", "last")


def _retrieval(draw: random.Random, split: int, index: int) -> StudyItem:
    pairs = _PAIRS[index % len(_PAIRS)]
    where = _ASKED[index // len(_PAIRS) % len(_ASKED)]
    places, people = draw.sample(PLACES["house"][split], pairs), draw.sample(PEOPLE[split], pairs)
    asked = {"first": 0, "middle": pairs // 2, "last": pairs - 1}[where]
    wrong = draw.choice([place for place in range(pairs) if place != asked])
    lines = [f"{place.capitalize()}: {person}." for place, person in zip(places, people, strict=True)]
    return StudyItem(
        ("These people have the keys.", *lines),
        1 + asked,
        1 + wrong,
        f"The person with the key of the {places[asked]} is called",
        (people[asked], *people[:asked], *people[asked + 1 :]),
        f"{pairs} pairs, {where}",
    )


def _instruction(draw: random.Random, split: int, index: int) -> StudyItem:
    thing, person = draw.choice(_THINGS[split]), draw.choice(PEOPLE[split])
    colour, stuff = draw.choice(_COLOURS), draw.choice(_STUFFS)
    facts = {
        "its colour": (f"The {thing} is {colour}.", colour),
        "what it is made of": (f"It is made of {stuff}.", stuff),
        "whose it is": (f"It belongs to {person}.", person),
    }
    names = list(facts)
    wanted = names[index % len(names)]
    other = draw.choice([name for name in names if name != wanted])
    sentences = (
        draw.choice(ASIDES[split]),
        f"Say in one word {wanted}.",
        *(sentence for sentence, _ in facts.values()),
    )
    return StudyItem(
        sentences,
        1,
        2 + names.index(other),
        "The one word is:",
        (facts[wanted][1], *(word for name, (_, word) in facts.items() if name != wanted)),
        wanted,
    )


def _several(draw: random.Random, split: int, index: int) -> StudyItem:
    place = draw.choice(PLACES["house"][split])
    colours, animals, foods = (draw.sample(words, 2) for words in (_COLOURS, _ANIMALS, _FOODS))
    seasons = draw.sample(("spring", "summer", "autumn", "winter"), 2)
    notes = [
        f"In {seasons[note]} the door of the {place} was {colours[note]}, its owner kept a {animals[note]} and the "
        f"cook made {foods[note]}."
        for note in range(2)
    ]
    right = draw.randrange(2)
    kinds = (("The door was", colours), ("The owner kept a", animals), ("The cook made", foods))
    question, answers = kinds[index % len(kinds)]
    others = [word for _, words in kinds for word in words if word != answers[right]]
    return StudyItem(tuple(notes), right, 1 - right, question, (answers[right], *others))


def _irrelevant(draw: random.Random, split: int, index: int) -> StudyItem:
    place, colour = draw.choice(PLACES["house"][split]), draw.choice(_COLOURS)
    fact, aside = f"The door of the {place} is {colour}.", draw.choice(ASIDES[split])
    marked = draw.randrange(2)
    sentences = (aside, fact) if marked == 0 else (fact, aside)
    others = tuple(each for each in _COLOURS if each != colour)
    return StudyItem(sentences, marked, marked, f"What colour is the door of the {place}? It is", (colour, *others))


def _generated(
    make: Callable[[random.Random, int, int], StudyItem], name: str
) -> Callable[[str, int], Iterator[StudyItem]]:
    def endless(split: str, seed: int) -> Iterator[StudyItem]:
        draw = random.Random(f"study {name} {split} {seed}")
        for index in itertools.count():
            yield make(draw, SPLITS.index(split), index)

    return endless


MATERIAL: Mapping[str, Callable[[str, int], Iterator[StudyItem]]] = {
    "conflict": _converted("conflict"),
    "retrieval": _generated(_retrieval, "retrieval"),
    "instruction": _generated(_instruction, "instruction"),
    "story": _converted("story"),
    "several": _generated(_several, "several"),
    "irrelevant": _generated(_irrelevant, "irrelevant"),
}
"""What makes the items of each task without end: see `study_items`."""

_PATIENCE = 2000  # draws in a row without an item that is new


def different_items(made: Iterable[AnyItem], count: int) -> tuple[AnyItem, ...]:
    """The first ``count`` items that differ, or all if there are fewer."""
    found: dict[str, AnyItem] = {}
    old = 0
    for item in made:
        old = old + 1 if item.fingerprint in found else 0
        found.setdefault(item.fingerprint, item)
        if len(found) == count or old == _PATIENCE:
            break
    return tuple(found.values())


def study_items(task: str, count: int, *, split: str = "held-out", seed: int = 0) -> tuple[StudyItem, ...]:
    """Make items of a task, no two alike.

    Args:
        task: one of `MATERIAL`.
        count: how many, at least 1. Each task has 500 or more in each split.
        split: one of `attnrb.studies.conflict.SPLITS`.
        seed: another one makes other items.

    Raises:
        ValueError: an argument is none of these, or there are not so many different items.
    """
    if task not in MATERIAL:
        raise ValueError(f"task: expected one of {', '.join(MATERIAL)}, got {task!r}")
    check_draw(count, split)
    found = different_items(MATERIAL[task](split, seed), count)
    if len(found) < count:
        raise ValueError(f"count: expected at most {len(found)}, the different items of {task}, got {count}")
    return found
