"""The short way through a layer against the long one, which an observer makes it take: the same bits."""

from __future__ import annotations

from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb.hosts.transformers import routine
from test_patch_models import CONFIG
from tiny_models import LAYERS, tiny, tokens


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that went the short way, in order."""
    layers: list[int] = []
    real = routine.Routine.attention

    def recorder(self: Any, forward: Any, layer: int, *args: Any) -> Any:
        layers.append(layer)
        return real(self, forward, layer, *args)

    monkeypatch.setattr(routine.Routine, "attention", recorder)
    return layers


def ignore(_: attnrb.AttentionCall) -> None:
    """An observer."""


@torch.no_grad()
def prefill_and_decode(model: Any, config: attnrb.RebalanceConfig, observer: Any = None) -> list[torch.Tensor]:
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    logits, cache = [], None
    with attnrb.patch(model, config, observer=observer):
        for start, end in ((0, 12), (12, 13), (13, 20)):
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return logits


@pytest.mark.parametrize("source", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "stablelm"])
def test_both_ways_give_the_same_bits(name: str, source: int, short: list[int]) -> None:
    model = tiny(name)
    config = attnrb.RebalanceConfig(CONFIG.alpha, CONFIG.threshold, source_layer=source, normalize=source > 0)
    expected = prefill_and_decode(model, config, ignore)
    assert not short
    got = prefill_and_decode(model, config)
    assert short == [*range(LAYERS)] * 3 or name == "gpt2"  # which gives no scale before transformers 5
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_gradients_and_casts_take_the_long_way(short: list[int]) -> None:
    model, ids = tiny("llama"), tokens(1, 8)
    with attnrb.patch(model, CONFIG):
        model(ids).logits.sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(ids)
        with torch.no_grad():
            model.double()(ids)
    assert not short


def test_gradients_switched_on_between_layers(short: list[int]) -> None:
    """The lower layers frozen, as in training the upper ones alone: those record gradients all the same."""
    model, ids = tiny("llama"), tokens(1, 8)
    upper = model.model.layers[3]

    def switch_on(*_: Any) -> None:
        torch.set_grad_enabled(True)

    upper.register_forward_pre_hook(switch_on)
    with attnrb.patch(model, CONFIG):
        with torch.no_grad():
            logits = model(ids).logits
        assert short == [0, 1, 2]
        logits.sum().backward()
    assert upper.self_attn.q_proj.weight.grad.abs().max() > 0
