"""Patched models of many architectures against the dense oracle: forwards, padding, chunked prefill, generation."""

from __future__ import annotations

from itertools import count
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from dense_oracle import DenseOracle, linear_gains
from tiny_models import ARCHITECTURES, HYBRIDS, LAYERS, source_layer, tiny, tokens
from torch import Tensor

pytestmark = pytest.mark.oldest

ALPHA, THRESHOLD = 0.5, 0.05
CONFIG = attnrb.RebalanceConfig(alpha=ALPHA, threshold=THRESHOLD)

# Float32 rounding, amplified by five layers of large random weights, stays below this share of the largest logit.
# Re-balancing moves logits by hundreds of times as much, which the tests check.
ROUNDING = 1e-4

# An attention weight nearer the threshold than this could fall either way in float32.
DECIDABLE = 2e-6

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def oracle(name: str = "llama") -> DenseOracle:
    return DenseOracle(linear_gains(LAYERS, ALPHA), threshold=THRESHOLD, source_layer=source_layer(name))


def decidable(model: Any, batch: int, length: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Random token ids for which no weight is too near the threshold, and the logits that the oracle says."""
    for seed in count():
        ids = tokens(batch, length, seed)
        truth = oracle(model.config.model_type)
        with torch.no_grad(), truth.attached(model):
            logits = model(ids, **inputs).logits
        if truth.closest > DECIDABLE:
            return ids, logits
    raise AssertionError


def assert_close(got: Tensor, expected: Tensor) -> None:
    error, scale = float((got - expected).abs().max()), float(expected.abs().max())
    assert error <= ROUNDING * scale, f"logits differ by {error:.2e}, of {scale:.2e} at most"


def run(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        logits: Tensor = model(ids, **inputs).logits
    return logits


@every_architecture
def test_forward_is_the_oracles(name: str) -> None:
    model = tiny(name)
    ids, expected = decidable(model, 2, 20)
    assert_close(run(model, ids), expected)
    with torch.no_grad():
        plain = model(ids).logits
    assert (expected - plain).abs().max() > 100 * ROUNDING * expected.abs().max(), "this case would not notice"


@every_architecture
def test_alpha_zero_is_the_plain_model(name: str) -> None:
    model = tiny(name)
    if name == "gemma2":
        model.set_attn_implementation("eager")  # the default of transformers 4 leaves the softcap out
    ids = tokens(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
        with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.0)):
            rebalanced = model(ids).logits
    assert (rebalanced - plain).abs().max() <= 1e-5 * plain.abs().max()


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(name: str, side: str) -> None:
    model = tiny(name)
    length, lengths = 18, [18, 11, 1]
    mask = torch.zeros(3, length, dtype=torch.int64)
    texts = [slice(length - n, length) if side == "left" else slice(0, n) for n in lengths]
    for row, text in zip(mask, texts, strict=True):
        row[text] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    ids, expected = decidable(model, 3, length, **inputs)
    padded = run(model, ids, **inputs)
    for row, text in enumerate(texts):
        assert_close(padded[row, text], expected[row, text])
        alone = run(model, ids[row : row + 1, text])
        assert_close(padded[row, text], alone[0])


@every_architecture
def test_greedy_text_is_the_oracles(name: str) -> None:
    """Prefill and decoding with the model's own dynamic cache, in a batch with padding on the left."""
    model = tiny(name)
    ids = tokens(3, 10)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    truth = oracle(name)
    with truth.attached(model):
        expected = model.generate(ids, **options)
    with attnrb.patch(model, CONFIG) as patched:
        text = model.generate(ids, **options)
    assert text.tolist() == expected.tolist()
    found = torch.cat([counts.flatten() for counts in truth.counts])
    assert patched.stats.outliers == int(found.sum())
    assert patched.stats.max_outliers_per_row == int(found.max())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in HYBRIDS])  # whose own state forbids it
def test_chunks_of_a_prompt_are_the_whole_prompt(name: str) -> None:
    model = tiny(name)
    ids, expected = decidable(model, 2, 20)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        cache, logits = None, []
        for chunk in ids.split([7, 1, 8, 4], dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_low_precision_is_no_worse_than_the_oracle_in_it(name: str, dtype: torch.dtype) -> None:
    """Both against the float32 oracle: the patched model errs at most twice as much as exact attention in its dtype."""
    ids, exact = decidable(tiny(name), 2, 20)
    model = tiny(name, dtype)
    with torch.no_grad(), oracle().attached(model):
        rounded = model(ids).logits.float()
    error = (run(model, ids).float() - exact).square().mean().sqrt()
    assert error <= 2 * (rounded - exact).square().mean().sqrt()
