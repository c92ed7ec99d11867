"""What the model is asked: wording of the chain-of-thought prompts, and of the direct ones whose answer is generated.

The chain of thought is in the manner of the published study (every option is weighed before the answer), in words of
our own. Direct prompts that are scored by likelihood are the task's own: see `attnrb.evaluation.data.Item.prompt`.
"""

from __future__ import annotations

from attnrb.evaluation.data import LETTERS, Item

__all__ = ["VERSION", "chain_of_thought", "direct"]

VERSION = 1
"""Goes up when a word of a prompt changes: results of different versions cannot be mixed."""

_OPENING = "\n\nAnalysis:"


def direct(item: Item) -> str:
    """A prompt whose answer is generated: it lists the options by letter and ends where the answer begins."""
    if item.gold is None or item.lettered:
        return item.prompt
    return f"Question: {item.question}\n{_options(item)}\nAnswer:"


def chain_of_thought(item: Item, *, chat: bool = False) -> str:
    """A prompt that asks to think first; the answer follows `attnrb.hosts.lm_eval.budget.DEFAULT_CUE`.

    Args:
        item: the question.
        chat: whether it becomes a user's message; otherwise it ends where the analysis begins.
    """
    if item.gold is None:
        task = (
            f"Question: {item.question}\n\n"
            "Work this out in small steps, with one calculation in each. When you have the result, write it on a line "
            'of its own that begins with "Answer:" and holds nothing but the number.'
        )
    else:
        task = (
            f"Question: {item.question}\n{_options(item)}\n\n"
            "Look at every option in turn and say briefly what speaks for it and what speaks against it. Only when you "
            'have weighed them all, write a line of its own that begins with "Answer:" and holds nothing but the '
            "letter of the best option."
        )
    return task if chat else task + _OPENING


def _options(item: Item) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
