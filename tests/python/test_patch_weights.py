"""Attention weights on request: those that the layers apply, re-balanced, and computed only then."""

from __future__ import annotations

from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb.ops import functional
from dense_oracle import DenseOracle, linear_gains
from test_patch_models import CONFIG
from tiny_models import LAYERS, source_layer, tiny, tokens

pytestmark = pytest.mark.oldest

# Weights are at most 1 + alpha; float32 rounding of their scores, amplified through the layers, stays well below this.
ROUNDING = 1e-4

architectures = pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_next"]
)


def oracle(name: str, **options: Any) -> DenseOracle:
    return DenseOracle(
        linear_gains(LAYERS, CONFIG.alpha),
        threshold=CONFIG.threshold,
        source_layer=source_layer(name),
        keep_weights=True,
        **options,
    )


def assert_weights(got: Any, truth: DenseOracle) -> None:
    expected = [truth.weights[layer] for layer in sorted(truth.weights)]
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= ROUNDING


@architectures
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"boost_all": True}], ids=str)
def test_weights_are_the_oracles(name: str, options: dict[str, bool]) -> None:
    model, ids = tiny(name), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    inputs = {"attention_mask": mask, "output_attentions": True}
    config = attnrb.RebalanceConfig(alpha=CONFIG.alpha, threshold=CONFIG.threshold, **options)
    truth = oracle(name, **options)
    with torch.no_grad():
        with truth.attached(model):
            model(ids, attention_mask=mask)
        with attnrb.patch(model, config):
            plain = model(ids, attention_mask=mask)
            output = model(ids, **inputs)
    assert not plain.attentions
    assert torch.equal(plain.logits, output.logits)
    assert_weights(output.attentions, truth)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_weights_of_every_step(name: str) -> None:
    """``generate`` hands out those of each new token; windowed layers have as many keys as they hold."""
    model, ids = tiny(name), tokens(1, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    steps: list[dict[int, torch.Tensor]] = []
    truth = oracle(name)
    with truth.attached(model):
        handle = model.register_forward_hook(lambda *_: steps.append(dict(truth.weights)))
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        handle.remove()
    with attnrb.patch(model, CONFIG):
        output = model.generate(ids, **options)
    assert output.sequences.tolist() == expected.tolist()
    assert len(output.attentions) == len(steps) == 5
    for got, truth.weights in zip(output.attentions, steps, strict=True):
        assert_weights(got, truth)


def test_weights_asked_for_in_the_configuration() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        assert len(model(ids).attentions) == LAYERS


def test_weights_are_computed_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    calls: list[int] = []
    real = functional.attention_weights
    monkeypatch.setattr(
        functional, "attention_weights", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    )
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        model(ids)
        assert not calls
        model(ids, output_attentions=True)
    assert len(calls) == LAYERS
