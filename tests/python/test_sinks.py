"""Damping of attention sinks on whole models, against the published equations: prompts, decoding, caches, batches."""

from __future__ import annotations

import math
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import Compose, Emphasis, Rebalance, SinkDamping
from edit_oracle import Scores, attached
from test_emphasis import ENDS, LENGTH, LOG_STRENGTHS, SPANS, STRENGTH, padding
from test_patch_models import assert_close
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor

HEADS, NEW = 4, 8


class Published:
    """ACT (arXiv 2406.15765) with ZeroTuning's factor (arXiv 2505.11739), dense and in float64, for one text."""

    def __init__(
        self,
        strength: float = 0.4,
        threshold: float = 0.1,
        first_key: float = 1.0,
        heads: dict[int, tuple[int, ...]] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.strength, self.threshold, self.first_key = strength, threshold, first_key
        self.heads, self.bias = heads, bias
        self.sinks: dict[int, Tensor] = {}  # bool [B, H, slots of the prompt]
        self.first: Tensor | None = None  # slot of each row's first token
        self.closest = 1.0

    def __call__(self, scores: Scores) -> Tensor:
        plain = scores.softmax()
        if scores.layer not in self.sinks:
            seen = scores.table > -torch.inf
            received = plain.sum(2) / seen.sum(2).clamp(min=1)
            self.first = seen.any(1).any(1).int().argmax(1)
            other = (torch.arange(plain.shape[3]) != self.first[:, None])[:, None]
            self.closest = min(self.closest, float((received.detach() - self.threshold).abs().min()))
            self.sinks[scores.layer] = (received > self.threshold) & other
        assert self.first is not None
        heed = torch.zeros(HEADS, dtype=torch.bool)
        heed[list(range(HEADS) if self.heads is None else self.heads.get(scores.layer, ()))] = True
        bias: Tensor | float = 0.0
        if self.bias is not None:
            bias = torch.where(scores.rows_from(ENDS), scores.at_keys(self.bias.double()), 0.0)
        first = (scores.key_slots == self.first[:, None])[:, None, None]
        factor = torch.where(first & heed[:, None, None], self.first_key, 1.0)
        weights, sink = scores.softmax(bias), scores.sink_share(bias)
        total = (factor * weights).sum(3, keepdim=True) + sink
        weights, sink = (factor * weights / total).nan_to_num(0.0), (sink / total).nan_to_num(0.0)

        sinks = scores.at_keys(self.sinks[scores.layer].double()).bool() & heed[:, None, None]
        mass = torch.where(sinks, weights, 0.0).sum(3, keepdim=True)
        # 1 - mass, but not as a difference, which would be nothing but rounding where it is small.
        rest = torch.where(sinks, 0.0, weights).sum(3, keepdim=True) + sink
        shared = weights * (1 + (1 - self.strength) * mass / torch.where(rest > 0, rest, 1.0))
        return torch.where(rest > 0, torch.where(sinks, self.strength * weights, shared), weights)


def logits_of(model: Any, policy: attnrb.Policy) -> Tensor:
    with torch.no_grad(), attnrb.patch(model, policy) as patched, patched.spans(SPANS):
        logits: Tensor = model(tokens(2, LENGTH), attention_mask=padding()).logits
    return logits[padding().bool()]


def published(model: Any, method: Published) -> Tensor:
    with torch.no_grad(), attached(model, method):
        logits: Tensor = model(tokens(2, LENGTH), attention_mask=padding()).logits
    found = torch.stack([sinks.any(2) for sinks in method.sinks.values()])
    assert found.any(), "a prompt without sinks tests nothing"
    assert method.closest > 1e-6, "a mean within a rounding of the threshold"
    return logits[padding().bool()]


@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.0}, {"threshold": 0.25}, {"first_key": 3.0}, {"strength": 1.0, "first_key": 0.2}],
    ids=str,
)
def test_the_published_equations(options: dict[str, float]) -> None:
    model = tiny("llama")
    assert_close(logits_of(model, SinkDamping(**options)), published(model, Published(**options)))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_windows_softcaps_and_sinks_of_the_model(name: str) -> None:
    model = tiny(name)
    assert_close(logits_of(model, SinkDamping()), published(model, Published()))


def test_heads_and_layers() -> None:
    model, heads = tiny("llama"), {1: (0, 2), 3: (0, 2)}
    policy = SinkDamping(first_key=2.0, heads=[0, 2], layers=[1, 3])
    assert_close(logits_of(model, policy), published(model, Published(first_key=2.0, heads=heads)))


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
)
def test_decoding_keeps_the_sinks_of_the_prompt(options: dict[str, Any]) -> None:
    model, inputs = tiny("llama"), {"input_ids": tokens(2, LENGTH), "attention_mask": padding()}
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    with attnrb.patch(model, SinkDamping(first_key=2.0)):
        torch.manual_seed(1)
        got = model.generate(**inputs, **options)
        torch.manual_seed(1)
        again = model.generate(**inputs, **options)  # a text of its own, though static caches are used again
    with attached(model, Published(first_key=2.0)):
        torch.manual_seed(1)
        truth = model.generate(**inputs, **options)
    assert got.tolist() == truth.tolist()
    assert again.tolist() == got.tolist()


@torch.no_grad()
def test_a_cache_that_a_forward_made() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    with attnrb.patch(model, SinkDamping()):
        cache = model(ids[:, :16], use_cache=True).past_key_values
        got = [model(ids[:, slot : slot + 1], past_key_values=cache).logits for slot in range(16, 20)]
    with attached(model, Published()):
        cache = model(ids[:, :16], use_cache=True).past_key_values
        truth = [model(ids[:, slot : slot + 1], past_key_values=cache).logits for slot in range(16, 20)]
    assert_close(torch.cat(got, 1), torch.cat(truth, 1))


@torch.no_grad()
def test_keys_that_were_cached_without_it_are_refused() -> None:
    model, ids = tiny("llama"), tokens(1, 12)
    cache = model(ids, use_cache=True).past_key_values
    message = "cached before the policy SinkDamping was in force"
    with attnrb.patch(model, SinkDamping()), pytest.raises(RuntimeError, match=message):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_batch_of_other_rows_is_refused() -> None:
    model = tiny("llama")
    with attnrb.patch(model, SinkDamping()):
        cache = model(tokens(2, 12), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1, 1]))
        with pytest.raises(ValueError, match="read in 2 rows, of which the 3 of this call are no multiple"):
            model(tokens(3, 1), past_key_values=cache)


def test_beside_emphasis_and_rebalancing() -> None:
    model = tiny("llama")
    both = Compose(Emphasis(strength=STRENGTH), SinkDamping())
    assert_close(logits_of(model, both), published(model, Published(bias=LOG_STRENGTHS)))
    with pytest.raises(ValueError, match="two of the composed policies strengthen entries of layer"):
        logits_of(model, Compose(Rebalance(), SinkDamping()))


def test_training() -> None:
    model, ids = tiny("llama"), tokens(2, LENGTH)
    weighting = torch.randn(2, LENGTH, model.config.vocab_size, generator=torch.Generator().manual_seed(5))
    found = []
    for context in (attnrb.patch(model, SinkDamping(first_key=2.0)), attached(model, Published(first_key=2.0))):
        model.zero_grad()
        with context:
            (model(ids, attention_mask=padding()).logits * weighting)[padding().bool()].sum().backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=2e-4 * float(gradient.abs().max()), rtol=2e-3)


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_without_a_cache() -> None:
    model = tiny("llama")
    options = {"attention_mask": padding(), "use_cache": False}
    with attnrb.patch(model, SinkDamping(first_key=2.0)):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = [compiled(tokens(2, LENGTH, seed), **options).logits[padding().bool()] for seed in (0, 1)]
        eager = [model(tokens(2, LENGTH, seed), **options).logits[padding().bool()] for seed in (0, 1)]
    for one, other in zip(got, eager, strict=True):
        assert_close(one, other)


@torch.no_grad()
def test_a_graph_with_a_cache_is_refused() -> None:
    from transformers import StaticCache

    model = tiny("llama")
    with attnrb.patch(model, SinkDamping()):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="which a graph of torch"):
            compiled(tokens(2, 6), past_key_values=StaticCache(config=model.config, max_cache_len=8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": 1.5}, ValueError, "strength: expected a number from 0 to 1"),
        ({"threshold": 0.0}, ValueError, "threshold: expected a number between 0 and 1"),
        ({"first_key": -1.0}, ValueError, "first_key: expected 0 or above"),
        ({"first_key": math.inf}, ValueError, "first_key: expected a finite number"),
        ({"first_key": "2"}, TypeError, "first_key: expected a number"),
        ({"strength": "1"}, TypeError, "strength: expected a number"),
        ({"threshold": "0.1"}, TypeError, "threshold: expected a number"),
        ({"layers": [-1]}, ValueError, "layers: expected 0 or above"),
        ({"heads": "nowhere.json"}, FileNotFoundError, "there is no file"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SinkDamping(**options)


def test_options_beyond_the_model() -> None:
    with pytest.raises(ValueError, match="layers: the model's layers are 0 to 4"):
        attnrb.patch(tiny("llama"), SinkDamping(layers=[LAYERS]))


def test_options_at_the_end_of_their_range() -> None:
    assert (SinkDamping(strength=0).strength, SinkDamping(strength=1).strength) == (0.0, 1.0)
    assert SinkDamping(first_key=0).first_key == 0.0
