"""Items from files as tasks of lm-evaluation-harness, which builds their requests and scores the responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnrb.evaluation import prompts
from attnrb.evaluation.data import LETTERS, DataError, Item, ItemSet
from attnrb.evaluation.extraction import extract_choice, extract_number

__all__ = ["ANSWER_TOKENS", "cot_task", "direct_task", "extract"]

ANSWER_TOKENS = 12
"""Tokens of a generated answer at most: room for a letter and the wording of most options, or for a number."""

_METRICS = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def direct_task(items: ItemSet, *, shots: int = 0, generated: bool = False) -> Any:
    """The ``ConfigurableTask`` that asks for the answer at once.

    Choices are scored by the likelihood of their letters (or of their texts, where the prompt does not list them), as
    the harness' own tasks do; numbers, and choices with `generated`, are extracted from what the model writes.

    Args:
        items: the questions.
        shots: examples before each question: the first items of the file, which are not asked themselves.
        generated: generate answers rather than score choices.

    Raises:
        DataError: there are too few items for so many shots.
    """
    if generated or items.numeric:
        settings = _generating(
            items, prompts.direct, {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}
        )
    else:
        settings = {
            "output_type": "multiple_choice",
            "doc_to_text": _field("prompt"),
            "doc_to_choice": _scored_choices,
            "doc_to_target": _field("gold"),
        }
    return _task(items, settings, shots)


def cot_task(items: ItemSet, *, minimum: int, maximum: int, chat: bool = False) -> Any:
    """The ``ConfigurableTask`` that has the model think first, within a budget of computed tokens.

    Args:
        items: the questions.
        minimum: computed tokens at least.
        maximum: computed tokens at most.
        chat: whether the prompt becomes a user's message.
    """
    generation = {
        "until": [],
        "min_computed_tokens": minimum,
        "max_computed_tokens": maximum,
        "answer_tokens": ANSWER_TOKENS,
    }
    return _task(items, _generating(items, lambda item: prompts.chain_of_thought(item, chat=chat), generation), 0)


def extract(doc: Mapping[str, Any], text: str) -> str | None:
    """The answer that `text` gives to a document of these tasks: a letter, a number, or None."""
    # An answer ends with its line; what small models write after it is the next question.
    line = text.strip().split("\n")[0]
    return extract_choice(line, doc["choices"]).answer if doc["choices"] else extract_number(line).answer


def _generating(items: ItemSet, prompt: Callable[[Item], str], generation: Mapping[str, Any]) -> dict[str, Any]:
    by_index = {item.index: item for item in items.items}
    return {
        "output_type": "generate_until",
        "doc_to_text": lambda doc: prompt(by_index[doc["index"]]),
        "doc_to_target": _field("answer"),
        "generation_kwargs": dict(generation),
        "process_results": _score_generated,
    }


def _score_generated(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"acc": float(extract(doc, results[0]) == doc["answer"])}


def _scored_choices(doc: Mapping[str, Any]) -> list[str]:
    return list(LETTERS[: len(doc["choices"])]) if doc["lettered"] else list(doc["choices"])


def _field(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda doc: doc[name]


def _task(items: ItemSet, settings: Mapping[str, Any], shots: int) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    if shots >= len(items.items):
        raise DataError(f"shots: {items.task} has {len(items.items)} items, too few for {shots} shots and a question")
    rows = [vars(item) | {"choices": list(item.choices)} for item in items.items]
    splits = {"test": Dataset.from_list(rows[shots:]), "shots": Dataset.from_list(rows[:shots] or rows[:1])}
    return ConfigurableTask(
        config={
            "task": items.task,
            # A function rather than a file: readers of data sets turn texts like "NA" into missing values.
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "shots",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": shots,
            "description": items.description,
            "metric_list": _METRICS,
            **settings,
        }
    )
