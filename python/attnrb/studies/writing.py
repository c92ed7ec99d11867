"""Several marked prompts gone on with at once, greedily, each under its own spans; or thought about within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from attnrb.hosts.transformers.patch import Patch
from attnrb.text.decoding import decode
from attnrb.text.marked import Marked, batch_rows
from attnrb.text.spans import Spans
from attnrb.text.vocabulary import check_token_ids

__all__ = ["end_ids", "think", "until_end", "write"]

_WHOLE: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}


def write(
    model: Any, tokenizer: Any, prompts: Sequence[Marked], tokens: int, patched: Patch | None = None
) -> list[tuple[str, int]]:
    """What a model writes after each prompt, the likeliest token each time.

    Args:
        model: a ``transformers`` causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: of one row each. Read as one batch, padded on the left.
        tokens: new tokens at most.
        patched: the patch on the model that the spans are for; None: they are for nobody.

    Returns:
        For each prompt the text without the token that ended it, and how many tokens it has.
    """
    new = _generate(model, tokenizer, prompts, patched, max_new_tokens=tokens)
    kept = [until_end(row, end_ids(model, tokenizer)) for row in new.tolist()]
    return [(decode(tokenizer, ids), len(ids)) for ids in kept]


def think(
    model: Any, tokenizer: Any, prompts: Sequence[Marked], budget: int, tokens: int, patched: Patch | None = None
) -> list[tuple[str, int]]:
    """What a model answers after just so many computed tokens: see `attnrb.evaluation.ComputedTokenBudget`.

    Arguments and result are those of `write`. The text and ``tokens`` are those of the answer, the number that is
    returned is that of computed tokens.
    """
    from attnrb.hosts.lm_eval.budget import ComputedTokenBudget

    ends = end_ids(model, tokenizer)
    held = ComputedTokenBudget(tokenizer, budget, budget, answer_tokens=tokens, end_token_ids=ends)
    new = _generate(model, tokenizer, prompts, patched, max_new_tokens=held.new_tokens, logits_processor=[held])
    return [(decode(tokenizer, each.answer), each.computed_tokens) for each in held.read_all(new)]


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Marked], patched: Patch | None, **options: Any
) -> torch.Tensor:
    """The new tokens, int64 ``[B, at most max_new_tokens]`` on the CPU."""
    from attnrb.hosts.transformers.logits import GREEDY, RefuseNaN

    rows = [batch_rows(prompt.inputs)[0] for prompt in prompts]
    check_token_ids(model, [token for row in rows for token in row.ids])
    width = max(len(row.ids) for row in rows)
    pads = [width - len(row.ids) for row in rows]
    ends = end_ids(model, tokenizer)
    ids = torch.tensor([[0] * pad + row.ids for pad, row in zip(pads, rows, strict=True)], **_WHOLE)
    mask = (torch.arange(width, **_WHOLE) >= torch.tensor(pads, **_WHOLE)[:, None]).long()
    spans = Spans(
        tuple(prompt.spans.shift(pad - row.first)[0] for prompt, row, pad in zip(prompts, rows, pads, strict=True))
    )
    processors = [RefuseNaN(), *options.pop("logits_processor", ())]
    marked = nullcontext() if patched is None else patched.spans(spans, prompt=width)
    with torch.inference_mode(), marked:
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=ends[0] if ends else 0,
            logits_processor=processors,
            **{**GREEDY, **options},
        )
    return torch.as_tensor(output)[:, width:].cpu()


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        return []
    return [int(each) for each in ends] if isinstance(ends, (list, tuple)) else [int(ends)]


def until_end(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """The tokens before the one that ends the text; all, where none does."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]
