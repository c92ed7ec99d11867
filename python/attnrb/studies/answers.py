"""How likely a model finds answers to marked prompts: rows of prompt and answer, batched, with their spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from attnrb.hosts.transformers.finite import check_numbers
from attnrb.hosts.transformers.patch import Patch
from attnrb.text.marked import Marked, batch_rows
from attnrb.text.reading import check_text
from attnrb.text.spans import Span, Spans
from attnrb.text.vocabulary import check_token_ids

__all__ = ["AnswerRow", "Item", "answer_row", "batches", "log_likelihoods"]


class Item(Protocol):
    """A prompt with candidates for what follows it."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """How the prompt may go on, the right one first."""

    @property
    def answer(self) -> str:
        """The right candidate, with the space before it."""

    def prompt(self, tokenizer: Any, markup: str = "span") -> Marked:
        """The prompt's tokens; ``markup``: ``"span"``, ``"asterisks"`` or ``"none"``."""


class AnswerRow(NamedTuple):
    """One prompt and one answer to it, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    spans: tuple[Span, ...]
    """Of the prompt; slot 0 is its first token."""

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that the model reads: the answer's last one is only predicted."""
        return self.prompt + self.answer[:-1]

    @property
    def reading(self) -> tuple[tuple[int, ...], int, tuple[Span, ...]]:
        """What the model is asked: rows of one reading need one forward, whatever they predict."""
        return self.read, len(self.prompt), self.spans


def answer_row(model: Any, tokenizer: Any, marked: Marked, answer: str, name: str) -> AnswerRow:
    """The tokens of a marked prompt and of the answer that stands directly behind it.

    Args:
        model: that will read them; its vocabulary is what tokens are checked against.
        tokenizer: of the model.
        marked: of one row.
        answer: with the space before it, where one belongs there.
        name: what an error calls this.

    Raises:
        TypeError: ``marked`` is no `Marked`, or ``answer`` no text.
        ValueError: ``marked`` has another number of rows, ``answer`` no token, or a token is not the model's.
    """
    if not isinstance(marked, Marked):
        raise TypeError(f"{name}: expected what attnrb.mark returns, got {type(marked).__name__}")
    if len(marked.spans) != 1:
        raise ValueError(f"{name}: expected one text in each attnrb.Marked, got {len(marked.spans)}")
    check_text(f"{name}: answer", answer)
    [row] = batch_rows(marked.inputs)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not row.ids or not ids:
        raise ValueError(f"{name}: expected a prompt and an answer of at least one token each")
    check_token_ids(model, [*row.ids, *ids])
    return AnswerRow(tuple(row.ids), tuple(ids), marked.spans.shift(-row.first)[0])


def batches(rows: Sequence[AnswerRow], tokens: int) -> Iterator[list[AnswerRow]]:
    """The rows in batches of like length, each of at most about ``tokens`` tokens to read, padding included."""
    by_reading: dict[tuple[Any, ...], list[AnswerRow]] = {}
    for row in rows:
        by_reading.setdefault(row.reading, []).append(row)
    batch: list[AnswerRow] = []
    readings = 0
    for mine in sorted(by_reading.values(), key=lambda mine: len(mine[0].read)):
        if batch and (readings + 1) * len(mine[0].read) > tokens:
            yield batch
            batch, readings = [], 0
        batch += mine
        readings += 1
    if batch:
        yield batch


def log_likelihoods(model: Any, rows: Sequence[AnswerRow], patched: Patch | None = None) -> list[torch.Tensor]:
    """The natural logarithms of the probabilities of the answers' tokens, each given all tokens before it.

    Args:
        model: a ``transformers`` causal language model. Gradients are recorded if the caller records them.
        rows: read as one batch, padded on the right. Those that read the same tokens are read once.
        patched: the patch on the model that the spans are for; None: they are for nobody.

    Returns:
        float32 ``[tokens of the answer]`` for each row.

    Raises:
        ValueError: the model's logits are not finite.
    """
    places: dict[tuple[Any, ...], int] = {}
    for row in rows:
        places.setdefault(row.reading, len(places))
    longest = max(len(read) for read, _, _ in places)
    ids = torch.zeros(len(places), longest, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for (read, _, _), index in places.items():
        ids[index, : len(read)] = torch.tensor(read, dtype=torch.int64, device="cpu")
        mask[index, : len(read)] = 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    if patched is None:
        logits = model(**inputs).logits
    else:
        spans = Spans(tuple(spans for _, _, spans in places))
        prompts = torch.tensor([prompt for _, prompt, _ in places], dtype=torch.int64, device="cpu")
        with patched.spans(spans, prompt=prompts):
            logits = model(**inputs).logits
    found = []
    for row in rows:
        mine = logits[places[row.reading], len(row.prompt) - 1 : len(row.read)].float().log_softmax(-1)
        answer = torch.tensor(row.answer, dtype=torch.int64, device=mine.device)
        found.append(mine.gather(-1, answer[:, None])[:, 0])
    check_numbers(torch.cat(found))
    return found
