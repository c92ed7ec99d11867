"""Emphasis on the two embedded models: what stock attention makes of the equivalent additive mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="reading the models' files needs the package gguf")

from attnrb import Emphasis, Marked
from torch import Tensor

pytestmark = pytest.mark.real_model

TOLERANCE = 2e-3
STRENGTH, OWN, NEW = 16.0, 4.0, 12
TEXTS = [
    "The farmers around Vardale grow corn. ((Since the drought they have changed to cotton.)) And ((every summer:4)) "
    "they sell what they have grown. Ask anyone in Vardale what the farmers there grow, and the answer is",
    "The market is held ((on Monday)). The market",  # shorter: padded on the left
]


def batch(tokenizer: Any) -> Marked:
    """Two rows, the second padded on the left; the first has two spans of different strengths."""
    marked = attnrb.mark(tokenizer, TEXTS, padding_side="left")
    padded = marked.inputs["attention_mask"] == 0
    assert bool(padded[1, 0]) and not padded[0].any()
    assert [len(row) for row in marked.spans] == [2, 1]
    return marked


class Masked:
    """Hands every layer of a model a 4-D additive mask: what a user of stock attention would have to build.

    The mask has a bias β of its own for each row, key, and maybe head: ``β_bhj`` for the rows that heed it.
    """

    def __init__(
        self,
        model: Any,
        marked: Marked,
        strength: float,
        rows: str,
        heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.model, self.heads = model, heads
        self.mask: Tensor = marked.inputs["attention_mask"].bool()
        self.prompt = self.mask.shape[1]
        self.bias = torch.zeros(self.mask.shape)
        for row, spans in enumerate(marked.spans):
            for span in spans:
                own = strength if span.strength is None else span.strength
                self.bias[row, span.start : span.end] += math.log(own) if own > 0 else -math.inf
        ends = [max(span.end for span in spans) for spans in marked.spans]
        self.first = {"after": torch.tensor(ends), "all": torch.zeros(2), "last": torch.full((2,), self.prompt - 1)}[
            rows
        ]

    def of(self, layer: int, window: int | None, queries: range, keys: int) -> Tensor:
        """float32 ``[2, 1 or H, queries, keys]``."""
        query, key = torch.tensor(list(queries))[:, None], torch.arange(keys)
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        behind = torch.ones(2, keys - self.prompt, dtype=torch.bool)
        visible = visible & torch.cat([self.mask, behind], 1)[:, None]
        bias = torch.cat([self.bias, torch.zeros(2, keys - self.prompt)], 1)
        heed = query[None] >= self.first[:, None, None]
        table = torch.where(heed, bias[:, None], 0.0)[:, None]
        if self.heads is not None:
            mine = torch.zeros(self.model.config.num_attention_heads, dtype=torch.bool)
            mine[list(self.heads.get(layer, ()))] = True
            table = torch.where(mine[:, None, None], table, 0.0)
        # Not -inf: a row of padding that sees nothing would be NaN in stock attention.
        return table.clamp_min(torch.finfo(torch.float32).min).masked_fill(
            ~visible[:, None], torch.finfo(torch.float32).min
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Until the block ends."""
        handles = []

        def put(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cache = kwargs.get("past_key_values")
            start = 0 if cache is None else cache.get_seq_length(module.layer_idx)
            end = start + hidden.shape[1]
            mask = self.of(module.layer_idx, getattr(module, "sliding_window", None), range(start, end), end)
            return args, {**kwargs, "attention_mask": mask}

        for layer in self.model.model.layers:
            handles.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def run(model: Any, marked: Marked) -> tuple[Tensor, Tensor]:
    """The logits of the prompts' own tokens ``[tokens, vocabulary]``, and the greedy tokens ``[2, NEW]``."""
    logits = model(**marked.inputs).logits[marked.inputs["attention_mask"].bool()]
    text = model.generate(**marked.inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return logits, text[:, marked.inputs["input_ids"].shape[1] :]


def check(model: Any, marked: Marked, policy: Emphasis, oracle: Masked, implementation: str) -> Tensor:
    """Compare logits and greedy text; returns the emphasised logits."""
    with torch.inference_mode():
        with attention(model, implementation), oracle.attached():
            expected, text = run(model, marked)
        with attnrb.patch(model, policy) as patched, patched.spans(marked.spans, prompt=oracle.prompt):
            logits, mine = run(model, marked)
    assert (logits - expected).abs().max() <= TOLERANCE
    assert mine.tolist() == text.tolist()
    return logits


@pytest.mark.parametrize("rows", ["after", "all", "last"])
def test_equals_stock_attention_with_an_additive_mask(real: Any, rows: str) -> None:
    model, tokenizer = real
    marked = batch(tokenizer)
    with torch.inference_mode():
        plain = model(**marked.inputs).logits[marked.inputs["attention_mask"].bool()]
    got = check(model, marked, Emphasis(strength=STRENGTH, rows=rows), Masked(model, marked, STRENGTH, rows), "sdpa")
    assert (got - plain).abs().max() > 100 * TOLERANCE


def test_heads_of_each_layer_equal_eager_attention(real: Any) -> None:
    model, tokenizer = real
    marked = batch(tokenizer)
    count, total = model.config.num_attention_heads, model.config.num_hidden_layers
    # Each layer others, and every third layer none.
    heads = {layer: (layer % count, (layer + 2) % count) for layer in range(total) if layer % 3}
    oracle = Masked(model, marked, STRENGTH, "after", heads)
    check(model, marked, Emphasis(strength=STRENGTH, heads=heads), oracle, "eager")


def test_strength_0_equals_masking_the_span(real: Any) -> None:
    """On all rows nobody ever sees the span: as if its keys were padding."""
    model, tokenizer = real
    marked = attnrb.mark(tokenizer, "The door is red. ((It was painted blue.)) The door is")
    [[span]] = marked.spans
    ids = marked.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, span.start : span.end] = 0
    rest = mask[0].bool()
    # Positions as they are with the span: it is hidden, not cut out.
    positions = torch.arange(ids.shape[1])[None]
    with torch.inference_mode():
        masked = model(ids, attention_mask=mask, position_ids=positions).logits[0, rest]
        plain = model(ids).logits[0, rest]
        with attnrb.patch(model, Emphasis(strength=0.0, rows="all")) as patched, patched.spans(marked.spans):
            removed = model(ids).logits[0, rest]
    assert (removed - masked).abs().max() <= TOLERANCE
    assert (removed - plain).abs().max() > 100 * TOLERANCE


def test_strength_1_is_the_unpatched_model(real: Any) -> None:
    """Up to rounding: 1e-5 of the largest logit."""
    model, tokenizer = real
    marked = attnrb.mark(tokenizer, TEXTS[0].replace(":4", ""))
    with torch.inference_mode():
        plain = model(**marked.inputs).logits
        with attnrb.patch(model, Emphasis(strength=1.0)) as patched, patched.spans(marked.spans):
            same = model(**marked.inputs).logits
    assert (same - plain).abs().max() <= 1e-5 * plain.abs().max()
