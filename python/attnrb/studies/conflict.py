"""Knowledge conflict: a prompt states a fact, and then a newer one that contradicts it. Which one does a model go by?

    items = conflict_items(24)
    score_items(model, tokenizer, items).accuracy                       # the model as it is
    score_items(model, tokenizer, items, Emphasis(strength=16)).accuracy

An item reads, with the newer fact marked:

    The market in Tolvane is held on Monday. ((From this month on they hold it on Friday.)) The market in Tolvane is
    held on

and is right if the model finds " Friday" likelier than " Monday". The question repeats the words of the older fact, and
the newer fact has words of its own, so a model that copies what stood behind the same words before goes wrong. All
items are made from lists of words: no item needs a download, and the same call makes the same items.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attnrb.hosts.transformers.patch import patch
from attnrb.policies.base import Policy
from attnrb.protocols import LanguageModel, LoadedTokenizer, Tokenizer
from attnrb.studies.answers import AnswerRow, Item, answer_row, batches, log_likelihoods
from attnrb.studies.items import TaskItem
from attnrb.text.marked import Marked

__all__ = ["MARKUPS", "SPLITS", "ConflictItem", "Scores", "conflict_examples", "conflict_items", "score_items"]

SPLITS = ("development", "held-out")
"""Items of one split share no place with those of the other."""
MARKUPS = ("span", "older", "asterisks", "none")
"""What is pointed at: the newer fact by a span, the older one by a span, the newer one by asterisks, or nothing."""

_BATCH_TOKENS = 1024


class ConflictItem(TaskItem):
    """One prompt with two facts, the newer one marked: `TaskItem` under the names of its parts.

    Its markup ``older`` points at the older fact.
    """

    markups = MARKUPS

    @property
    def older(self) -> str:
        """A fact."""
        return self.before

    @property
    def newer(self) -> str:
        """One that contradicts it."""
        return self.marked

    @property
    def question(self) -> str:
        """The beginning of a sentence that the fact completes."""
        return self.behind


class _Topic(NamedTuple):
    """A kind of item. ``{place}`` is a name or a building, ``{fact}`` one of ``facts``."""

    older: str
    newer: str
    question: str
    places: str
    facts: tuple[str, ...]


PLACES = {
    "town": (
        ("Tolvane", "Ardmoss", "Kelbury", "Nornwick", "Selgate", "Brunfell", "Ostrell", "Mirefold"),
        ("Vardale", "Pellham", "Quenby", "Harlow Sands", "Dunmere", "Losfield", "Wexholm", "Tarnhill"),
    ),
    "house": (
        ("bakery", "lighthouse", "school", "old mill", "town hall", "cinema", "farm", "post office"),
        ("library", "harbour office", "bookshop", "chapel", "water tower", "hotel", "museum", "train station"),
    ),
}  # those of each split

_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ANIMALS = ("dog", "cat", "horse", "goat", "rabbit", "parrot", "pig", "sheep")
_STUFFS = ("wood", "stone", "steel", "glass", "copper", "iron", "brick", "silver")
_FOODS = ("bread", "rice", "soup", "fish", "cheese", "pizza", "cake", "pasta")
_CROPS = ("corn", "wheat", "cotton", "coffee", "tea", "apples", "grapes", "potatoes")

_TOPICS = (
    _Topic(
        "The door of the {place} is {fact}.",
        "Last week somebody painted it {fact}.",
        "The door of the {place} is",
        "house",
        _COLOURS,
    ),
    _Topic(
        "The market in {place} is held on {fact}.",
        "From this month on they hold it on {fact}.",
        "The market in {place} is held on",
        "town",
        _DAYS,
    ),
    _Topic(
        "The animal that lives behind the {place} is a {fact}.",
        "It was sold in spring, and now they keep a {fact}.",
        "The animal that lives behind the {place} is a",
        "house",
        _ANIMALS,
    ),
    _Topic(
        "The bridge in {place} is made of {fact}.",
        "They tore it down and built a new one of {fact}.",
        "The bridge in {place} is made of",
        "town",
        _STUFFS,
    ),
    _Topic(
        "On Sundays, the kitchen of the {place} serves {fact}.",
        "The new cook has put {fact} in its place.",
        "On Sundays, the kitchen of the {place} serves",
        "house",
        _FOODS,
    ),
    _Topic(
        "The farmers around {place} grow {fact}.",
        "Since the drought they have changed to {fact}.",
        "The farmers around {place} grow",
        "town",
        _CROPS,
    ),
)


def check_draw(count: int, split: str) -> None:
    """Refuse what no items can be made of.

    Raises:
        ValueError: ``count`` is below 1, or ``split`` none of `SPLITS`.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def conflict_items(count: int, *, split: str = "held-out", seed: int = 0) -> tuple[ConflictItem, ...]:
    """Make items, of all kinds in turn.

    Args:
        count: how many, at least 1.
        split: one of `SPLITS`: choose heads and settings on ``"development"``, report on ``"held-out"``.
        seed: another one makes other items.

    Raises:
        ValueError: ``count`` is below 1, or ``split`` unknown.
    """
    check_draw(count, split)
    draw = random.Random(f"{split} {seed}")
    made = []
    for index in range(count):
        topic = _TOPICS[index % len(_TOPICS)]
        place = draw.choice(PLACES[topic.places][SPLITS.index(split)])
        old, new = draw.sample(topic.facts, 2)
        older, newer = topic.older.format(place=place, fact=old), topic.newer.format(fact=new)
        made.append(ConflictItem(older, newer, topic.question.format(place=place), (new, old)))
    return tuple(made)


def conflict_examples(tokenizer: Tokenizer, count: int = 12, *, seed: int = 0) -> list[tuple[Marked, str]]:
    """Examples of the development items for `attnrb.profile_heads`: pairs of prompt and right answer."""
    return [(item.prompt(tokenizer), item.answer) for item in conflict_items(count, split="development", seed=seed)]


@dataclass(frozen=True)
class Scores:
    """How a model did on items, by the likelihood of their candidates.

    Attributes:
        margins: of each item: the log-likelihood of the right candidate less that of the likeliest other one.
    """

    margins: tuple[float, ...]

    @property
    def right(self) -> int:
        """How many items have a margin above 0."""
        return sum(margin > 0 for margin in self.margins)

    @property
    def accuracy(self) -> float:
        """`right` divided by the number of items."""
        return self.right / len(self.margins)


def score_items(
    model: LanguageModel,
    tokenizer: LoadedTokenizer,
    items: Sequence[Item],
    policy: Policy | None = None,
    markup: str = "span",
    *,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Ask a model which candidate of each item it finds likeliest.

    Args:
        model: an unpatched ``transformers`` causal language model. It is left as it was.
        tokenizer: its tokenizer.
        items: as `conflict_items` or `attnrb.studies.tasks.task_items` makes them.
        policy: what is edited. Default: nothing.
        markup: one of `MARKUPS`. Spans do nothing without a policy that heeds them.
        progress: called with the number of answers that were scored, after each batch.

    Raises:
        ValueError: ``items`` is empty, or ``markup`` unknown.
        Exception: whatever `attnrb.patch` raises for a model it cannot serve.
    """
    if not items:
        raise ValueError("items: expected at least one, got none")
    wanted: list[list[AnswerRow]] = []
    for index, item in enumerate(items):
        prompt = item.prompt(tokenizer, markup)
        mine = [answer_row(model, tokenizer, prompt, " " + each, f"items[{index}]") for each in item.candidates]
        wanted.append(mine)
    sums: dict[AnswerRow, float] = {}
    with torch.inference_mode(), nullcontext() if policy is None else patch(model, policy) as patched:
        for batch in batches([row for mine in wanted for row in mine], _BATCH_TOKENS):
            for row, found in zip(batch, log_likelihoods(model, batch, patched), strict=True):
                sums[row] = float(found.sum())
            if progress is not None:
                progress(len(sums))
    margins = tuple(sums[mine[0]] - max(sums[other] for other in mine[1:]) for mine in wanted)
    return Scores(margins)
