"""A row's result does not depend on the batch that it sits in."""

from __future__ import annotations

from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from test_patch_models import CONFIG
from tiny_models import tiny, tokens

pytestmark = pytest.mark.oldest

# Of the largest logit. What differs between batches is the order in which matrix products add up.
ROUNDING = 1e-5

architectures = pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_neox", "phi3", "gpt_oss"]
)


def batch(rows: int, length: int, side: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[slice]]:
    lengths = [length - (5 * row) % length for row in range(rows)]
    texts = [slice(length - each, length) if side == "left" else slice(0, each) for each in lengths]
    mask = torch.zeros(rows, length, dtype=torch.int64)
    for row, text in enumerate(texts):
        mask[row, text] = 1
    return tokens(rows, length), {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, texts


@architectures
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_logits(name: str, rows: int, side: str) -> None:
    model = tiny(name)
    ids, inputs, texts = batch(rows, 17, side)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        together = model(ids, **inputs).logits
        for row, text in enumerate(texts):
            alone = model(ids[row : row + 1, text]).logits[0]
            assert (together[row, text] - alone).abs().max() <= ROUNDING * alone.abs().max()


@architectures
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_tokens(name: str, use_cache: bool) -> None:
    model = tiny(name)
    ids, inputs, texts = batch(8, 11, "left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    with attnrb.patch(model, CONFIG):
        together = model.generate(ids, attention_mask=inputs["attention_mask"], **options)
        for row, text in enumerate(texts):
            prompt = ids[row : row + 1, text]
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert together[row, 11:].tolist() == alone[0, prompt.shape[1] :].tolist()
