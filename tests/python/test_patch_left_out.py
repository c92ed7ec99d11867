"""Layers that a forward leaves out, and caches whose layers hold other tokens: served or refused, never wrong."""

from __future__ import annotations

import copy
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from test_patch_models import ALPHA, CONFIG, THRESHOLD, assert_close, decidable, run
from test_patch_refusals import BypassingAttention, become
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

PLAIN = attnrb.RebalanceConfig(alpha=0.0, threshold=THRESHOLD)


def dropping() -> Any:
    """A model in training that leaves out about half of its layers, at random."""
    config = AutoConfig.for_model(
        "opt",
        vocab_size=97,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        layerdrop=0.5,
        init_std=0.4,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def draws(model: Any, ids: Tensor, seeds: range) -> list[tuple[Tensor, tuple[int, ...]]]:
    """For each seed the logits, and the layers that ran."""
    ran: list[int] = []
    layers = model.model.decoder.layers
    hooks = [layer.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    found = []
    for seed in seeds:
        ran.clear()
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append((model(ids, use_cache=False).logits, tuple(ran)))
    for hook in hooks:
        hook.remove()
    return found


def test_layers_that_training_drops_are_left_out() -> None:
    """Without the source layer nothing is strengthened; with it, those of the others that run are."""
    model, ids, seeds = dropping(), tokens(2, 12), range(12)
    plain = draws(model, ids, seeds)
    with attnrb.patch(model, CONFIG) as patched:
        edited = draws(model, ids, seeds)
    with attnrb.patch(model, PLAIN):
        zero = draws(model, ids, seeds)
    kinds = set()
    for (logits, ran), (other, same), (unchanged, again) in zip(plain, edited, zero, strict=True):
        assert ran == same == again, "the same layers must run"
        assert_close(unchanged, logits)
        strengthens = 0 in ran and bool({1, 2, 3} & set(ran))
        kinds.add(strengthens)
        if not strengthens:
            assert_close(other, logits)
        else:
            assert (other - logits).abs().max() > 1e-3 * logits.abs().max()
    assert kinds == {True, False}, "these seeds must show both"
    assert patched.stats.forwards == len(seeds)


def test_training_with_dropped_layers_has_gradients() -> None:
    model, ids = dropping(), tokens(2, 9)
    with attnrb.patch(model, CONFIG):
        for seed in range(6):
            torch.manual_seed(seed)
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            grad = model.lm_head.weight.grad
            assert grad is not None
            assert grad.isfinite().all()


def test_dropped_layers_leave_no_hook_behind() -> None:
    model, ids = dropping().eval(), tokens(1, 6)
    with torch.no_grad():
        plain = model(ids).logits
        with attnrb.patch(model, CONFIG):
            twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, plain)
    assert not any(layer._forward_pre_hooks for layer in model.model.decoder.layers)


def test_attention_that_bypasses_the_interface_is_not_left_out() -> None:
    """A layer that began and did not call its attention function was not dropped."""
    model = become(tiny("llama"), 2, attention=BypassingAttention).train()
    model.model.layerdrop = 0.5  # which this model does not heed
    message = r"the attention of layers \[2\] did not go through"
    with torch.no_grad(), attnrb.patch(model, CONFIG), pytest.raises(NotImplementedError, match=message):
        model(tokens(1, 6))


class Skipped(torch.nn.Module):
    """A layer that somebody took out by other means."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return hidden_states


@pytest.mark.parametrize("gone", [1, 2, LAYERS - 1])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_layer_that_was_taken_out_is_left_out(gone: int, meanwhile: bool) -> None:
    """The others are strengthened as in a model whose layer adds nothing."""
    model, ids = tiny("llama"), tokens(2, 12)
    with torch.no_grad():
        for weights in (model.model.layers[gone].self_attn.o_proj, model.model.layers[gone].mlp.down_proj):
            weights.weight.zero_()
        with attnrb.patch(model, CONFIG):
            expected = model(ids, use_cache=False).logits
        rest = [each for at, each in enumerate(model.model.layers) if at != gone]
        if not meanwhile:
            model.model.layers = torch.nn.ModuleList(rest)
        with attnrb.patch(model, CONFIG) as patched:
            if meanwhile:
                model.model.layers[gone] = Skipped()
            assert_close(model(ids, use_cache=False).logits, expected)
            assert gone not in patched.stats.rebalanced_layers


def test_a_source_layer_that_was_taken_out() -> None:
    model = tiny("llama")
    model.model.layers[0] = Skipped()
    refusal = pytest.raises(RuntimeError, match=r"before the source layer 0.* was taken out of the model, name another")
    with torch.no_grad(), attnrb.patch(model, CONFIG), refusal:
        model(tokens(1, 6), use_cache=False)
    with torch.no_grad(), attnrb.patch(model, attnrb.RebalanceConfig(source_layer=1, threshold=THRESHOLD, alpha=ALPHA)):
        model(tokens(1, 6), use_cache=False)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_fewer_layers_than_the_model_has(depth: int) -> None:
    """The layers that run are strengthened as in the whole model."""
    model = tiny("llama")
    whole, few = model.model.layers, torch.nn.ModuleList(list(model.model.layers)[:depth])
    model.model.layers = few
    ids, expected = decidable(model, 2, 12)  # by an oracle that has the gains of the whole model
    model.model.layers = whole
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        model.config.num_hidden_layers = depth
        logits = model(ids).logits
        assert patched.stats.rebalanced_layers == tuple(range(1, min(depth, LAYERS - 1)))
        model.config.num_hidden_layers = LAYERS
    assert_close(logits, expected)


def test_fewer_layers_than_it_takes_to_the_source_layer() -> None:
    model, ids = tiny("llama"), tokens(2, 9)
    with torch.no_grad():
        model.config.num_hidden_layers = 2
        plain = model(ids).logits
        model.config.num_hidden_layers = LAYERS
        with attnrb.patch(model, attnrb.RebalanceConfig(source_layer=3, threshold=THRESHOLD, alpha=ALPHA)):
            model.config.num_hidden_layers = 2
            assert_close(model(ids).logits, plain)


def test_early_exit_drafts_for_a_patched_model() -> None:
    model, ids = tiny("llama"), tokens(1, 10)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with attnrb.patch(model, CONFIG):
        expected = model.generate(ids, **options)
        drafted = model.generate(ids, assistant_early_exit=2, **options)
    assert drafted.tolist() == expected.tolist()
    assert model.config.num_hidden_layers == LAYERS


# ------------------------------------------------------------------------------------------------------------ caches


def pruned(model: Any, ids: Tensor, first: Tensor, others: Tensor) -> DynamicCache:
    """A cache of these tokens that keeps some keys in the first layer, and others in the others."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for number, layer in enumerate(cache.layers):
        keep = first if number == 0 else others
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    return cache


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize(
    ("first", "others", "message"),
    [
        (range(0, 20, 2), range(1, 20, 2), "the first new token has the position 20, and the cache holds 10 keys"),
        (range(6), range(20), "the first new token has the position 20, and the cache holds 6 keys"),
        (range(20), range(6), "layer 1 has 7 keys where its mask is for 21"),
        (range(20), range(0, 20, 2), "layer 1 has 11 keys where its mask is for 21"),
    ],
    ids=["other tokens", "fewer in the first", "fewer in the others", "half in the others"],
)
def test_caches_pruned_apart_are_refused(first: range, others: range, message: str, alpha: float) -> None:
    model, ids, new = tiny("llama"), tokens(1, 20), tokens(1, 1, seed=5)
    cache = pruned(model, ids, torch.tensor(first), torch.tensor(others))
    config = attnrb.RebalanceConfig(alpha=alpha, threshold=THRESHOLD)
    refusal = pytest.raises(NotImplementedError, match=f"past_key_values: {message}")
    with torch.no_grad(), attnrb.patch(model, config), refusal:
        model(new, past_key_values=cache, position_ids=torch.tensor([[20]]))


def test_a_cache_pruned_between_two_steps_is_refused() -> None:
    model, ids, new = tiny("llama"), tokens(1, 20), tokens(1, 1, seed=5)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        cache = model(ids, use_cache=True).past_key_values
        model(new, past_key_values=cache, position_ids=torch.tensor([[20]]))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
        with pytest.raises(NotImplementedError, match="has the position 21, and the cache holds 17 keys"):
            model(new, past_key_values=cache, position_ids=torch.tensor([[21]]))


def test_caches_with_all_their_tokens_are_served() -> None:
    """Cropped, and with padding on the left: a position is never beyond its slot."""
    model, ids = tiny("llama"), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = run(model, ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        cache = model(ids[:, :14], attention_mask=mask[:, :14], position_ids=positions[:, :14]).past_key_values
        for _ in range(2):
            cache.crop(10 - cache.get_seq_length())
            last = model(ids[:, 10:], attention_mask=mask, position_ids=positions[:, 10:], past_key_values=cache).logits
            assert_close(last, expected[:, 10:])
