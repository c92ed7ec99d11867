"""Two real models against the dense oracle: logits and greedy text of prompts of 5, 300 and 4,000 tokens."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="reading the models' files needs the package gguf")

from dense_oracle import DenseOracle, linear_gains

ALPHA = 0.2
CONFIG = attnrb.RebalanceConfig(alpha=ALPHA)
TOLERANCE = 2e-3
KEPT = 128  # last positions whose logits are compared: a large vocabulary would fill the memory otherwise

# The longest take minutes and gigabytes, mostly the oracle's.
LONG = pytest.mark.skipif("ATTNRB_LONG" not in os.environ, reason="minutes long: `make test-long` runs it")
# (tokens, what the oracle computes in)
PROMPTS = [
    (5, torch.float64),
    (300, torch.float64),
    pytest.param((4000, torch.float32), marks=LONG),
]


def prompt(tokenizer: Any, length: int) -> torch.Tensor:
    root = Path(__file__).parents[2]
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in ("LICENSE", "docs/method.md"))
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    assert ids.shape[1] == length
    return ids


def oracle(model: Any, **options: Any) -> DenseOracle:
    gains = linear_gains(model.config.get_text_config().num_hidden_layers, ALPHA)
    return DenseOracle(gains, threshold=CONFIG.threshold, **options)


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: str(case[0]))
def test_logits_and_text_are_the_oracles(real: Any, case: tuple[int, torch.dtype]) -> None:
    model, tokenizer = real
    length, dtype = case
    ids = prompt(tokenizer, length)
    options = {"max_new_tokens": 12 if length < 1000 else 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        with oracle(model, dtype=dtype).attached(model):
            expected = model(ids, logits_to_keep=KEPT).logits
            text = model.generate(ids, **options)
        with attnrb.patch(model, CONFIG):
            error = float((model(ids, logits_to_keep=KEPT).logits - expected).abs().max())
            assert error <= TOLERANCE, f"logits differ by {error:.1e}"
            assert model.generate(ids, **options).tolist() == text.tolist()


@pytest.mark.parametrize("length", [5, 200, pytest.param(4000, marks=LONG)])
def test_bfloat16_is_no_worse_than_the_oracle_in_it(real: Any, length: int) -> None:
    """Both against the float32 oracle: attnrb errs at most twice as much as exact attention in a bfloat16 model."""
    model, tokenizer = real
    ids = prompt(tokenizer, length)
    with torch.inference_mode():
        with oracle(model).attached(model):
            exact = model(ids, logits_to_keep=KEPT).logits
        half = copy.deepcopy(model).to(torch.bfloat16)
        with oracle(half).attached(half):
            rounded = half(ids, logits_to_keep=KEPT).logits.float()
        with attnrb.patch(half, CONFIG):
            logits = half(ids, logits_to_keep=KEPT).logits.float()
    error = (logits - exact).square().mean().sqrt()
    assert error <= 2 * (rounded - exact).square().mean().sqrt()
