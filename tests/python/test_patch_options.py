"""Every option of RebalanceConfig on a whole model, against the dense oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attnrb
import pytest
import torch
from attnrb import RebalanceConfig
from attnrb.hosts.transformers.patch import AttentionCall

pytest.importorskip("transformers")

from dense_oracle import DenseOracle, linear_gains
from test_patch_models import ROUNDING
from tiny_models import LAYERS, tiny, tokens

pytestmark = pytest.mark.oldest

HEADS = 4
LINEAR = linear_gains(LAYERS, 0.5)


def only(layers: dict[int, Sequence[int]]) -> list[list[float]]:
    """The linear gains for these heads of these layers, 0 for others."""
    return [[LINEAR[layer] * (head in layers.get(layer, ())) for head in range(HEADS)] for layer in range(LAYERS)]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize(
    ("options", "gains", "changes"),
    [
        ({"depth": 31}, linear_gains(LAYERS, 0.5, 31), {}),
        ({"depth": 2}, linear_gains(LAYERS, 0.5, 2), {}),
        ({"alpha": -0.5}, linear_gains(LAYERS, -0.5), {}),
        ({"normalize": True}, LINEAR, {"normalize": True}),
        ({"boost_all": True}, LINEAR, {"boost_all": True}),
        ({"source_layer": 2}, LINEAR, {"source_layer": 2}),
        ({"layers": [1, 3]}, only({1: range(HEADS), 3: range(HEADS)}), {}),
        ({"heads": [0, 3]}, only({layer: [0, 3] for layer in range(LAYERS)}), {}),
        ({"heads": {2: [1], 3: [0, 2]}}, only({2: [1], 3: [0, 2]}), {}),
        ({"gains": [0.0, 0.1, -0.2, 0.3, 0.4]}, [0.0, 0.1, -0.2, 0.3, 0.4], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_option(name: str, options: dict[str, Any], gains: list[Any], changes: dict[str, Any]) -> None:
    model = tiny(name)
    ids = tokens(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
        with DenseOracle(gains, threshold=0.05, **changes).attached(model):
            expected = model(ids).logits
        with attnrb.patch(model, RebalanceConfig(**{"alpha": 0.5, "threshold": 0.05, **options})) as patched:
            got = model(ids).logits
    tolerance = ROUNDING * expected.abs().max()
    assert (got - expected).abs().max() <= tolerance
    assert (expected - plain).abs().max() > 10 * tolerance, "this case would not notice"
    touched = [
        layer
        for layer, gain in enumerate(gains)
        if layer > changes.get("source_layer", 0) and torch.as_tensor(gain).any()
    ]
    assert patched.stats.rebalanced_layers == tuple(touched)


def test_normalising_takes_back_boosting_all() -> None:
    model = tiny("llama")
    ids = tokens(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
        with attnrb.patch(model, RebalanceConfig(boost_all=True, normalize=True)):
            assert (model(ids).logits - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_normalising_and_boosting_all_with_sinks_leaves_the_sinks_their_part() -> None:
    """Rows whose entries are all strengthened and then divided by their sums, which the sink is part of."""
    model, ids = tiny("gpt_oss"), tokens(1, 24)
    with torch.no_grad(), attnrb.patch(model, RebalanceConfig(alpha=0.5, boost_all=True, normalize=True)):
        got = model(ids, output_attentions=True)
    with torch.no_grad(), attnrb.patch(model, RebalanceConfig(alpha=0.0)):
        plain = model(ids, output_attentions=True)
    for layer, (weights, before) in enumerate(zip(got.attentions, plain.attentions, strict=True)):
        if layer == 1:  # the first that is strengthened, on what the plain model computed so far
            gain, taken = 0.5 * (1 - 1 / (LAYERS - 1)), before.sum(3, keepdim=True)
            torch.testing.assert_close(weights, before * (1 + gain) / (1 + gain * taken), rtol=1e-5, atol=1e-6)
            assert (taken < 0.999).any(), "the sinks take a part"
    assert (got.logits - plain.logits).abs().max() > 1e-4


def test_an_observer_sees_every_layer_and_can_run_it_again() -> None:
    model = tiny("gemma2")
    ids = tokens(1, 20)
    truth = DenseOracle(LINEAR, threshold=0.05, keep_weights=True)
    with torch.no_grad(), truth.attached(model):
        model(ids)

    shares: dict[int, torch.Tensor] = {}

    def observe(call: AttentionCall) -> None:
        # The weight on the first key is the output for values that are 1 there and 0 elsewhere.
        value = torch.zeros_like(call.value[..., :1])
        value[:, :, 0] = 1
        shares[call.layer] = call.attention(value)[..., 0]

    with torch.no_grad(), attnrb.patch(model, RebalanceConfig(alpha=0.5, threshold=0.05), observer=observe):
        model(ids)
    assert sorted(shares) == list(range(LAYERS))
    for layer, share in shares.items():
        expected = truth.weights[layer][..., 0]
        assert (share - expected).abs().max() <= ROUNDING
