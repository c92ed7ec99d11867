"""The log-likelihoods of several answers to each prompt: every prompt is read once, and its cache serves all answers.

Note: [One prompt, many answers]
The first token of every answer is predicted by the prompt's last one, so one forward of the prompt scores all answers
of one token, with one row of logits. Longer answers go on from the prompt's cache, each in a row of its own, with
logits for each of its tokens: of a large vocabulary these are what takes most memory. Prompts are padded on the left,
so that all of them end in the same slot.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from attnrb.hosts.transformers.caches import cache_of, with_cache
from attnrb.hosts.transformers.finite import check_numbers
from attnrb.hosts.transformers.patch import Patch
from attnrb.studies.answers import AnswerRow
from attnrb.text.spans import Spans

__all__ = ["candidate_batches", "candidate_scores"]

_WHOLE: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
_ALIKE = 8  # tokens by which answers of like length differ at most


def candidate_batches(prompts: Sequence[Sequence[AnswerRow]], tokens: int, answer_tokens: int) -> Iterator[list[int]]:
    """The indices of prompts in batches of like lengths.

    Args:
        prompts: the answers to each prompt.
        tokens: of prompts in a batch at most, padding included.
        answer_tokens: the same of answers that have more than one token. A prompt that has more than either is a batch
            of its own.
    """
    batch: list[int] = []
    width = longest = rows = 0

    def with_one_more(answers: Sequence[AnswerRow]) -> tuple[int, int, int]:
        long = [len(each.answer) for each in answers if len(each.answer) > 1]
        return max(width, len(answers[0].prompt)), max([longest, *long]), rows + len(long)

    for index in sorted(range(len(prompts)), key=lambda index: _length(prompts[index])):
        more = with_one_more(prompts[index])
        if batch and ((len(batch) + 1) * more[0] > tokens or more[1] * more[2] > answer_tokens):
            yield batch
            batch, width, longest, rows = [], 0, 0, 0
            more = with_one_more(prompts[index])
        width, longest, rows = more
        batch.append(index)
    if batch:
        yield batch


def _length(answers: Sequence[AnswerRow]) -> tuple[int, int]:
    """What batches are of alike: the longest answer, roughly, and the prompt."""
    return max(len(each.answer) for each in answers) // _ALIKE, len(answers[0].prompt)


def candidate_scores(
    model: Any, prompts: Sequence[Sequence[AnswerRow]], patched: Patch | None = None
) -> list[list[float]]:
    """The log-likelihood of each answer, in nats, given its prompt: see Note: [One prompt, many answers].

    Args:
        model: a ``transformers`` causal language model in evaluation mode.
        prompts: the answers to each prompt; those of one share its tokens and spans. Read as one batch.
        patched: the patch on the model that the spans are for; None: they are for nobody.

    Returns:
        A number for each answer of each prompt.

    Raises:
        ValueError: the model's logits are not finite.
    """
    firsts = [rows[0] for rows in prompts]
    width = max(len(row.prompt) for row in firsts)
    pads = [width - len(row.prompt) for row in firsts]
    ids = torch.tensor([[0] * pad + list(row.prompt) for row, pad in zip(firsts, pads, strict=True)], **_WHOLE)
    mask = (torch.arange(width, **_WHOLE) >= torch.tensor(pads, **_WHOLE)[:, None]).long()
    longer = [
        (row, place)
        for row, answers in enumerate(prompts)
        for place, answer in enumerate(answers)
        if len(answer.answer) > 1
    ]
    spans = Spans(tuple(row.spans for row in firsts)).shift(pads)
    with torch.inference_mode():
        output = _forward(model, ids, mask, spans, width, patched, use_cache=bool(longer), logits_to_keep=1)
        first = output.logits[:, -1].float().log_softmax(-1).cpu()
        found = [[float(first[row, answer.answer[0]]) for answer in answers] for row, answers in enumerate(prompts)]
        if longer:
            cache = cache_of(output)
            rows = [row for row, _ in longer]
            cache.batch_select_indices(torch.tensor(rows, dtype=torch.int64, device=model.device))
            _add_longer(model, prompts, longer, (cache, mask[rows], spans.select(rows)), found, patched)
    check_numbers(torch.tensor([each for answers in found for each in answers], dtype=torch.float64, device="cpu"))
    return found


def _add_longer(
    model: Any,
    prompts: Sequence[Sequence[AnswerRow]],
    longer: Sequence[tuple[int, int]],
    read: tuple[Any, torch.Tensor, Spans],
    found: list[list[float]],
    patched: Patch | None,
) -> None:
    """Add what the tokens behind the first one come to."""
    cache, mask, spans = read
    answers = [prompts[row][place].answer for row, place in longer]
    most = max(map(len, answers)) - 1
    # Padding behind an answer is seen by no token of it.
    ids = torch.tensor([list(each[:-1]) + [0] * (most - len(each) + 1) for each in answers], **_WHOLE)
    width = mask.shape[1]
    whole = torch.cat([mask, torch.ones_like(ids)], 1)
    logits = _forward(model, ids, whole, spans, width, patched, use_cache=True, **with_cache(model, cache)).logits
    steps = logits.float().log_softmax(-1).cpu()
    for index, ((row, place), answer) in enumerate(zip(longer, answers, strict=True)):
        found[row][place] += sum(float(steps[index, step, token]) for step, token in enumerate(answer[1:]))


def _forward(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, spans: Spans, prompt: int, patched: Patch | None, **options: Any
) -> Any:
    known = inspect.signature(model.forward).parameters
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"position_ids": positions.to(model.device), **options}
    options = {name: value for name, value in options.items() if name in known}
    marked = nullcontext() if patched is None else patched.spans(spans, prompt=prompt)
    with marked:
        return model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)
