"""A budget of computed tokens: how many tokens a model writes between the prompt and its answer.

Note: [Computed tokens]
Every token that a model writes before its answer is one more forward whose result later tokens can read, so the number
of them is an amount of computation, and a study varies it. A row of a generation passes through three states. It
*computes*: the model writes freely, and each token counts. Where it would end before the minimum, a continuation
phrase is written in place of the end, whose tokens count as well; where it would end after the minimum, and at the
maximum, the answer cue is. The cue's tokens are written one a step and do not count. Then the row *answers*, freely or
for a number of tokens. A model that writes the cue by itself, having reached the minimum, answers from there; before
the minimum it gets the continuation phrase in place of the cue's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessor

from attnrb.protocols import LoadedTokenizer

__all__ = ["DEFAULT_CONTINUATION", "DEFAULT_CUE", "ComputedTokenBudget", "Reading"]

DEFAULT_CUE = "\nAnswer:"
DEFAULT_CONTINUATION = "\nLet me check this once more."


@dataclass(frozen=True)
class Reading:
    """What a row of a generation holds, as `ComputedTokenBudget.read` finds it."""

    computed: tuple[int, ...]
    """Token ids between the prompt and the answer cue."""
    answer: tuple[int, ...]
    """Token ids after the cue, without the end token; empty where the row never came to its answer."""
    answered: bool
    """Whether the row came to its answer."""
    extensions: int
    """How often the continuation phrase stands in the computed tokens."""

    @property
    def computed_tokens(self) -> int:
        """How many tokens were computed before the answer."""
        return len(self.computed)


@dataclass(frozen=True)
class _Row:
    """The state of one row; see Note: [Computed tokens]."""

    computed: int = 0
    forced: tuple[int, ...] = ()
    cue_forced: bool = False
    tail: tuple[int, ...] = ()
    answer: int | None = None  # tokens of the answer so far; None before the cue is complete
    ended: bool = False


@dataclass(frozen=True)
class _Step:
    """The state of a row, and what that means for its next token."""

    row: _Row
    forced: int | None = None
    ruled_out: tuple[int, ...] = ()


class ComputedTokenBudget(LogitsProcessor):
    """Holds a generation to a number of computed tokens before its answer: see Note: [Computed tokens].

    Make one for each call of ``generate``, and leave room in ``max_new_tokens`` (see `new_tokens`)::

        budget = ComputedTokenBudget(tokenizer, minimum=64, maximum=128, answer_tokens=8)
        output = model.generate(**inputs, logits_processor=[budget], max_new_tokens=budget.new_tokens)
        readings = budget.read_all(output[:, inputs["input_ids"].shape[1] :])

    Batches, left padding, greedy search, sampling and beams all work: a row's state goes with its tokens.

    Args:
        tokenizer: the model's tokenizer, which makes tokens of the phrases.
        minimum: computed tokens before which the answer may not start. Default: 0.
        maximum: computed tokens at which the answer starts. Default: 256. 0 means at once.
        cue: what begins the answer.
        continuation: what is written where the model would stop before `minimum`.
        answer_tokens: tokens of the answer after which the row ends. Default: None, when the model ends it.
        end_token_ids: tokens that end a text. Default: the tokenizer's end token.

    Raises:
        TypeError: a number of tokens is no integer.
        ValueError: a number of tokens is out of range, a phrase has no token, or there is no end token.
    """

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        minimum: int = 0,
        maximum: int = 256,
        *,
        cue: str = DEFAULT_CUE,
        continuation: str = DEFAULT_CONTINUATION,
        answer_tokens: int | None = None,
        end_token_ids: Sequence[int] | int | None = None,
    ) -> None:
        self.minimum = _count("minimum", minimum, 0)
        self.maximum = _count("maximum", maximum, 0)
        if self.minimum > self.maximum:
            raise ValueError(f"minimum: expected at most the maximum of {maximum}, got {minimum}")
        self.answer_tokens = None if answer_tokens is None else _count("answer_tokens", answer_tokens, 1)
        self.cue = _tokens(tokenizer, "cue", cue)
        self.continuation = _tokens(tokenizer, "continuation", continuation)
        if _stands_in(self.cue, self.continuation):
            raise ValueError(f"continuation: expected none with the cue {cue!r} in it, got {continuation!r}")
        ends = tokenizer.eos_token_id if end_token_ids is None else end_token_ids
        self.end_token_ids = tuple(ends) if isinstance(ends, Sequence) else () if ends is None else (ends,)
        if not self.end_token_ids:
            raise ValueError("end_token_ids: the tokenizer has no end token, so name one")
        self._steps: dict[tuple[int, ...], _Step] = {}

    @property
    def new_tokens(self) -> int:
        """New tokens that a row takes at most, where `answer_tokens` is set: computed tokens, cue, answer, end."""
        if self.answer_tokens is None:
            raise ValueError("answer_tokens: expected a number, since without one an answer has no end")
        return self.maximum + len(self.cue) + self.answer_tokens + 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token, float ``[B, vocabulary]`` for int64 ids ``[B, n]``: -inf where ruled out."""
        likeliest = scores.argmax(dim=-1).tolist()
        steps: dict[tuple[int, ...], _Step] = {}
        scores = scores.clone()  # type: ignore[assignment]
        for index, ids in enumerate(map(tuple, input_ids.tolist())):
            if ids not in steps:  # equal rows, as beams begin, are in one state
                # A row that has no parent among the rows of the last step is a prompt.
                parent = self._steps.get(ids[:-1])
                steps[ids] = self._next(
                    _Row() if parent is None else self._advance(parent.row, ids[-1]), likeliest[index]
                )
            step = steps[ids]
            if step.forced is not None:
                scores[index] = -torch.inf
                scores[index, step.forced] = 0.0
            for token in step.ruled_out:
                scores[index, token] = -torch.inf
        self._steps = steps
        return scores

    def read(self, new_ids: Sequence[int]) -> Reading:
        """Split the new tokens of one row into computed tokens and answer.

        Args:
            new_ids: the row's tokens after the prompt, padding after its end included.
        """
        ids = list(new_ids)
        for start in range(self.minimum, min(self.maximum, len(ids)) + 1):
            stop = start + len(self.cue)
            if tuple(ids[start:stop]) == self.cue:
                answer = _until_end(ids[stop:], self.end_token_ids)
                return Reading(tuple(ids[:start]), tuple(answer), True, self._extensions(ids[:start]))
        computed = _until_end(ids, self.end_token_ids)
        return Reading(tuple(computed), (), False, self._extensions(computed))

    def read_all(self, new_ids: torch.Tensor) -> list[Reading]:
        """`read` of every row of int64 ``[B, m]``."""
        return [self.read(row) for row in new_ids.tolist()]

    def _advance(self, row: _Row, token: int) -> _Row:
        """The state after `token` was written."""
        if row.ended or token in self.end_token_ids:
            return replace(row, ended=True)
        if row.answer is not None:
            return replace(row, answer=row.answer + 1)
        if row.cue_forced:
            left = row.forced[1:]
            return replace(row, forced=left, answer=None if left else 0)
        tail = (*row.tail, token)[-len(self.cue) :]
        computed = row.computed + 1
        if tail == self.cue and computed - len(self.cue) >= self.minimum and not row.forced:
            return replace(row, computed=computed - len(self.cue), tail=(), answer=0)
        return replace(row, computed=computed, tail=tail, forced=row.forced[1:])

    def _next(self, row: _Row, likeliest: int) -> _Step:
        """What the budget makes of the next token, where the model's own choice would be `likeliest`."""
        if row.ended:
            return _Step(row)
        if row.answer is not None:
            over = self.answer_tokens is not None and row.answer >= self.answer_tokens
            return _Step(row, self.end_token_ids[0] if over else None)
        if row.computed >= self.maximum and not row.cue_forced:
            row = replace(row, forced=self.cue, cue_forced=True)
        if not row.forced:
            wants_end = likeliest in self.end_token_ids
            cue_too_early = self._completes_cue(row) and row.computed + 1 - len(self.cue) < self.minimum
            if (wants_end and row.computed < self.minimum) or (cue_too_early and likeliest == self.cue[-1]):
                row = replace(row, forced=self.continuation)
            elif wants_end:
                row = replace(row, forced=self.cue, cue_forced=True)
            else:
                return _Step(row, None, self.end_token_ids + ((self.cue[-1],) if cue_too_early else ()))
        return _Step(row, row.forced[0])

    def _completes_cue(self, row: _Row) -> bool:
        """Whether the cue lacks only its last token."""
        return len(self.cue) == 1 or row.tail[-(len(self.cue) - 1) :] == self.cue[:-1]

    def _extensions(self, computed: Sequence[int]) -> int:
        return _stands_in(self.continuation, computed)


def _stands_in(part: tuple[int, ...], whole: Sequence[int]) -> int:
    """How often `part` stands in `whole`."""
    return sum(tuple(whole[at : at + len(part)]) == part for at in range(len(whole) - len(part) + 1))


def _until_end(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or above, got {value}")
    return value


def _tokens(tokenizer: Any, name: str, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ValueError(f"{name}: expected some text, got {text!r}")
    return ids
