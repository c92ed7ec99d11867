"""Small tasks in which pointing at part of a prompt should matter, made from lists of words.

    items = task_items("retrieval", 24)
    score_items(model, tokenizer, items, Emphasis(strength=16, heads=profile)).accuracy

============== ===================================================== ==========================================
task           what the prompt says                                  what is marked
============== ===================================================== ==========================================
``conflict``   a fact, and then a newer one that contradicts it      the newer fact
``retrieval``  eight places, each with the person who has its key    the pair that is asked for
``instruction`` how to write the answer, and then a fact              how to write it
``story``      where two people put two things                       the sentence about the thing asked for
============== ===================================================== ==========================================

An item is right if the model finds the right candidate likelier than every other one: see `attnrb.studies.conflict`,
which has the first task. No item needs a download, and the same call makes the same items.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnrb.studies.answers import Item
from attnrb.studies.conflict import PLACES, SPLITS, check_draw, conflict_items
from attnrb.studies.items import TaskItem
from attnrb.text.marked import Marked

__all__ = ["TASKS", "TaskItem", "task_examples", "task_items"]


# Each as (those of development, those held out).
_PEOPLE = (
    ("Anna", "Tom", "Laura", "Peter", "Julia", "Mark", "Sarah", "Paul", "Maria", "Henry"),
    ("Emma", "David", "Alice", "Simon", "Clara", "Oliver", "Ruth", "Daniel", "Grace", "Victor"),
)
_THINGS = (
    ("ring", "letter", "coin", "map", "photo", "watch"),
    ("key", "knife", "ticket", "stamp", "candle", "diary"),
)
_HIDING = (
    ("drawer", "basket", "kitchen", "cellar", "garden", "car"),
    ("box", "attic", "oven", "bag", "garage", "piano"),
)
_OBJECTS = (
    ("boat", "chair", "fence", "hat", "lamp", "cup"),
    ("bicycle", "coat", "roof", "table", "train", "vase"),
)
_COLOURS = {"red": "rouge", "blue": "bleu", "green": "vert", "yellow": "jaune", "white": "blanc", "black": "noir"}
_WAYS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Write every colour in CAPITAL LETTERS.", str.upper),
    ("Write every colour in French.", lambda colour: _COLOURS[colour]),
    ('Write every colour in "quotation marks".', lambda colour: f'"{colour}"'),
)

_PAIRS = 8


def _retrieval(draw: random.Random, split: int, index: int) -> TaskItem:
    places = draw.sample(PLACES["house"][split], _PAIRS)
    people = draw.sample(_PEOPLE[split], _PAIRS)
    pairs = [f"{place.capitalize()}: {person}." for place, person in zip(places, people, strict=True)]
    # Not the last pair, which stands beside the question.
    asked = draw.randrange(_PAIRS - 1)
    return TaskItem(
        " ".join(["Who has which key:", *pairs[:asked]]),
        pairs[asked],
        " ".join([*pairs[asked + 1 :], f"The person with the key of the {places[asked]} is called"]),
        (people[asked], *people[:asked], *people[asked + 1 :]),
    )


def _instruction(draw: random.Random, split: int, index: int) -> TaskItem:
    instruction, write = _WAYS[index % len(_WAYS)]
    colour, thing = draw.choice(sorted(_COLOURS)), draw.choice(_OBJECTS[split])
    return TaskItem("", instruction, f"The {thing} is {colour}. The colour of the {thing} is", (write(colour), colour))


def _story(draw: random.Random, split: int, index: int) -> TaskItem:
    people, things = draw.sample(_PEOPLE[split], 2), draw.sample(_THINGS[split], 2)
    right, wrong = draw.sample(_HIDING[split], 2)
    return TaskItem(
        f"It was late, and {people[0]} and {people[1]} were tidying up.",
        f"{people[0]} carried the {things[0]} to the {right}.",
        f"{people[1]} took the {things[1]} and put it into the {wrong}. Then they had dinner. In the morning "
        f"{people[0]} looked for the {things[0]}, and found it in the",
        (right, wrong),
    )


def _generated(make: Callable[[random.Random, int, int], TaskItem], name: str) -> Callable[..., Sequence[Item]]:
    def items(count: int, *, split: str = "held-out", seed: int = 0) -> Sequence[Item]:
        check_draw(count, split)
        draw = random.Random(f"{name} {split} {seed}")
        return tuple(make(draw, SPLITS.index(split), index) for index in range(count))

    return items


TASKS: Mapping[str, Callable[..., Sequence[Item]]] = {
    "conflict": conflict_items,
    "retrieval": _generated(_retrieval, "retrieval"),
    "instruction": _generated(_instruction, "instruction"),
    "story": _generated(_story, "story"),
}
"""What makes the items of each task: see `task_items`."""


def task_items(task: str, count: int, *, split: str = "held-out", seed: int = 0) -> Sequence[Item]:
    """Make the items of a task.

    Args:
        task: one of `TASKS`.
        count: how many, at least 1.
        split: one of `attnrb.studies.conflict.SPLITS`: choose heads and settings on ``"development"``, report on
            ``"held-out"``. Items of the two share no name, place or thing.
        seed: another one makes other items.

    Raises:
        ValueError: an argument is none of these.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return TASKS[task](count, split=split, seed=seed)


def task_examples(tokenizer: Any, task: str, count: int = 12, *, seed: int = 0) -> list[tuple[Marked, str]]:
    """Examples of a task's development items for `attnrb.profile_heads`: pairs of prompt and right answer."""
    items = task_items(task, count, split="development", seed=seed)
    return [(item.prompt(tokenizer), item.answer) for item in items]
