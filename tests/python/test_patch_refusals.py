"""Models and uses that cannot be served: each raises and says why, and none runs plainly in silence."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny_models import tiny, tokens
from torch import Tensor
from transformers.models.llama import modeling_llama

pytestmark = pytest.mark.oldest


class BypassingAttention(modeling_llama.LlamaAttention):
    """Computes attention itself, in a file that knows the interface."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.q_proj(hidden_states)), None


class MaskMakingAttention(modeling_llama.LlamaAttention):
    """Has a mask of its own."""

    def prepare_own_mask(self, mask: Tensor) -> Tensor:
        return torch.zeros_like(mask, dtype=torch.float32)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **others: Any) -> Any:
        return super().forward(hidden_states, attention_mask=self.prepare_own_mask(attention_mask), **others)


class MaskSayingAttention(modeling_llama.LlamaAttention):
    """Has a method for masks that changes none."""

    def say_mask(self) -> None: ...


class DetachedAttention(torch.nn.Module):
    """Computes attention itself, and does not inherit from a class that reaches the interface."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None


# So this file knows the interface, as those of models do.
ALL_ATTENTION_FUNCTIONS = modeling_llama.ALL_ATTENTION_FUNCTIONS


class ForgetfulLayer(modeling_llama.LlamaDecoderLayer):
    """Drops the keyword arguments it does not know."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
        )


def become(model: Any, layer: int, attention: type | None = None, decoder_layer: type | None = None) -> Any:
    if attention is not None:
        model.model.layers[layer].self_attn.__class__ = attention
    if decoder_layer is not None:
        model.model.layers[layer].__class__ = decoder_layer
    return model


def refused(model: Any, error: type[Exception], message: str, config: Any = None, **inputs: Any) -> None:
    with torch.no_grad(), pytest.raises(error, match=message), attnrb.patch(model, config):
        model(tokens(1, 6), **inputs)


@pytest.mark.parametrize("layer", [0, 2])
def test_attention_that_bypasses_the_interface(layer: int) -> None:
    model = become(tiny("llama"), layer, attention=BypassingAttention)
    if layer == 0:
        refused(model, RuntimeError, "layer 1 ran before the source layer 0")
    else:
        refused(model, NotImplementedError, r"the attention of layers \[2\] did not go through .* AttentionInterface")


def test_a_layer_that_is_left_out_may_bypass_it() -> None:
    model = become(tiny("llama"), 2, attention=BypassingAttention)
    with torch.no_grad(), attnrb.patch(model, attnrb.RebalanceConfig(layers=[1, 3])) as patched:
        model(tokens(1, 6))
    assert patched.stats.rebalanced_layers == (1, 3)


def test_attention_in_a_file_without_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.delattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS")
    refused(model, NotImplementedError, "LlamaAttention computes attention by itself")


def test_attention_with_masks_of_its_own() -> None:
    model = become(tiny("llama"), 1, attention=MaskMakingAttention)
    refused(model, NotImplementedError, "MaskMakingAttention makes masks of its own, which attnrb cannot know")


def test_methods_for_masks_alone_are_no_reason() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    with torch.no_grad(), attnrb.patch(model):
        expected = model(ids).logits
    become(model, 1, attention=MaskSayingAttention)
    with torch.no_grad(), attnrb.patch(model):
        assert torch.equal(model(ids).logits, expected)


def test_no_attention_of_the_model_reaches_the_interface() -> None:
    """Its file knows the interface, so only a trial run tells."""
    model = tiny("llama")
    for number, layer in enumerate(model.model.layers):
        layer.self_attn = DetachedAttention(number)
    with pytest.raises(NotImplementedError, match="DetachedAttention computes attention by itself"):
        attnrb.patch(model)


def test_a_trial_run_leaves_no_trace() -> None:
    from attnrb.hosts.transformers.probe import probe

    model = tiny("llama").train()
    model.model.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook of the user's was called"))
    weights, state = {name: each.clone() for name, each in model.state_dict().items()}, torch.get_rng_state()
    configuration = dict(vars(model.config))
    seen = probe(model.model)
    assert seen is not None
    assert seen.reached == ["LlamaAttention"] * 5
    assert seen.own_masks == []
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None and each.device.type == "cpu" for each in model.parameters())
    assert dict(vars(model.config)) == configuration


class Failing(torch.nn.Module):
    def forward(self, *_: Any) -> None:
        raise ZeroDivisionError


def test_a_trial_run_that_fails_says_what_it_saw() -> None:
    from attnrb.hosts.transformers.probe import probe

    model = tiny("llama")
    model.model.norm = Failing()
    seen = probe(model.model)
    assert seen is not None
    assert seen.reached == ["LlamaAttention"] * 5
    model.model.layers[0].input_layernorm = Failing()
    assert probe(model.model) is None


def test_keyword_arguments_that_get_lost_do_no_harm() -> None:
    """The forward is found by the thread that it runs in; in a layer that runs again on its own there is none."""
    model, ids = tiny("llama"), tokens(1, 6)
    with torch.no_grad():
        with attnrb.patch(model):
            expected = model(ids).logits
        become(model, 1, decoder_layer=ForgetfulLayer)
        with attnrb.patch(model) as patched:
            assert torch.equal(model(ids).logits, expected)
            assert patched.stats.rebalanced_layers == (1, 2, 3)
            hidden = torch.randn(1, 4, 32)
            position = model.model.rotary_emb(hidden, torch.arange(4)[None])
            with pytest.raises(RuntimeError, match="no forward of a patched model runs in this thread"):
                model.model.layers[1](hidden, position_embeddings=position)


class ElsewhereLayer(ForgetfulLayer):
    """Runs in a thread of its own, besides."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(super().forward, *args, **kwargs).result()


def test_keyword_arguments_that_get_lost_between_threads() -> None:
    """Neither the argument nor the thread tells the forward, so the layer cannot be served."""
    model = become(tiny("llama"), 1, decoder_layer=ElsewhereLayer)
    message = "LlamaAttention called its attention without the argument 'attnrb_forward'"
    refused(model, RuntimeError, message, use_cache=False)


def test_a_forward_that_failed_is_not_found_again() -> None:
    model = tiny("llama")

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), attnrb.patch(model, observer=fail):
        with pytest.raises(ZeroDivisionError):
            model(tokens(1, 4))
        hidden = torch.randn(1, 4, 32)
        position = model.model.rotary_emb(hidden, torch.arange(4)[None])
        with pytest.raises(RuntimeError, match="no forward of a patched model runs in this thread"):
            model.model.layers[0](hidden, position_embeddings=position)


def test_no_layer_idx() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        del layer.self_attn.layer_idx
    refused(
        model, NotImplementedError, r"the attention modules of LlamaForCausalLM \(LlamaAttention\) have no layer_idx"
    )


def test_no_layer_idx_in_one_layer() -> None:
    model = tiny("llama")
    del model.model.layers[3].self_attn.layer_idx
    refused(model, NotImplementedError, "LlamaAttention has no layer_idx", use_cache=False)


def test_a_layer_idx_that_no_layer_has() -> None:
    model = tiny("llama")
    model.model.layers[4].self_attn.layer_idx = 9
    refused(model, NotImplementedError, "layer_idx 9, which is none of the model's 5", use_cache=False)


def other_head_count() -> Any:
    model = tiny("llama")
    attention = model.model.layers[2].self_attn
    attention.q_proj = torch.nn.Linear(32, 16, bias=False)
    attention.o_proj = torch.nn.Linear(16, 32, bias=False)
    return model


def test_layers_with_another_number_of_heads() -> None:
    refused(other_head_count(), NotImplementedError, "layer 2 .LlamaAttention. has 2 query heads, others 4")


def test_layers_with_another_number_of_heads_may_be_left_out() -> None:
    model = other_head_count()
    with torch.no_grad(), attnrb.patch(model, attnrb.RebalanceConfig(layers=[1, 3])):
        model(tokens(1, 6))


def test_no_one_number_of_heads() -> None:
    model = tiny("llama")
    vars(model.config)["num_attention_heads"] = [4, 4, 2, 4, 4]  # past the validation that some versions have
    refused(model, NotImplementedError, r"no one number of heads \(num_attention_heads\)")


def test_options_beyond_the_model() -> None:
    refused(tiny("llama"), ValueError, "layers: the model's layers are 0 to 4", attnrb.RebalanceConfig(layers=[7]))


def test_nothing_above_the_source_layer() -> None:
    config = attnrb.RebalanceConfig(source_layer=4)
    refused(tiny("llama"), ValueError, "source_layer: this model has no attention above layer 4", config)


def test_no_layer_of_a_known_kind() -> None:
    model = tiny("llama")
    vars(model.config)["layer_types"] = ["linear_attention"] * 5
    refused(model, NotImplementedError, "none of the layers of LlamaModel .* their kinds are linear_attention")


def test_dropout_in_training_mode() -> None:
    model = tiny("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    refused(model, NotImplementedError, r"attention dropout of 0.1, which attnrb does not support: call model.eval\(\)")


def test_position_biases_and_the_like() -> None:
    refused(tiny("llama"), NotImplementedError, "position biases added to the scores", position_bias=torch.zeros(1))


def test_encoders_and_decoders() -> None:
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(
        transformers.T5ForConditionalGeneration(config), NotImplementedError, "attends to an encoder; attnrb serves"
    )


def test_a_model_that_is_none() -> None:
    refused(torch.nn.Linear(2, 2), TypeError, "model: expected a model of transformers, got Linear")
    refused("llama", TypeError, "model: expected a model of transformers, got str")


def test_other_arguments() -> None:
    with pytest.raises(TypeError, match=r"policy: expected an attnrb\.Policy .*, a mapping or None, got float"):
        attnrb.patch(tiny("llama"), 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy: expected it once"):
        attnrb.patch(tiny("llama"), attnrb.Rebalance(), alpha=0.1)
    with pytest.raises(ValueError, match="unknown 'apha'; known are alpha"):
        attnrb.patch(tiny("llama"), apha=0.1)
    with pytest.raises(TypeError, match="observer: expected a function or None, got int"):
        attnrb.patch(tiny("llama"), observer=3)  # type: ignore[arg-type]


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"needs transformers 4.57 or newer, below 6: run `pip install 'attnrb\[hf\]'`"
    ):
        attnrb.patch(model)


def test_a_second_patch() -> None:
    model = tiny("llama")
    with attnrb.patch(model):
        for part in (model, model.model):
            with pytest.raises(RuntimeError, match="is patched already; remove that patch first"):
                attnrb.patch(part)
        with torch.no_grad():
            model(tokens(1, 4))
    with attnrb.patch(model):
        pass


def test_a_part_of_a_patched_model() -> None:
    model = tiny("llama")
    hidden = torch.randn(1, 4, 32)
    with torch.no_grad(), attnrb.patch(model):
        position = model.model.rotary_emb(hidden, torch.arange(4)[None])
        with pytest.raises(RuntimeError, match="a part of a patched model was called by itself"):
            model.model.layers[0](hidden, position_embeddings=position)


def test_another_attention_chosen_while_patched() -> None:
    model = tiny("llama")
    with torch.no_grad(), attnrb.patch(model):
        edited = model(tokens(1, 4)).logits
        model.set_attn_implementation("eager")
        assert torch.equal(model(tokens(1, 4)).logits, edited)
    assert {module.config._attn_implementation for module in model.modules() if "config" in vars(module)} == {"eager"}


def test_a_removed_patch_is_not_entered_again() -> None:
    patched = attnrb.patch(tiny("llama"))
    patched.remove()
    patched.remove()
    with pytest.raises(RuntimeError, match="this patch was removed"), patched:
        pass
