"""The configuration of a patched model is that of a plain one, whoever reads, copies or writes it, and how."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import tiny, tokens
from transformers import AutoModelForCausalLM, StaticCache

POLICY = attnrb.Rebalance(alpha=0.5, threshold=0.05)
NAMES = ["llama", "gemma3_text", "gpt2", "qwen3_next"]

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "from_dict": lambda config: type(config).from_dict(config.to_dict()),
    "class": lambda config: config.__class__(**config.to_dict()),
}


def configurations(model: Any) -> list[Any]:
    """Those that users read: the model's own and its decoder's."""
    return [model.config, model.base_model.config]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_plain(name: str, duplicate: Callable[[Any], Any]) -> None:
    model = tiny(name)
    config = model.config
    kind, implementation, said = type(config), config._attn_implementation, config.to_dict()
    before = [id(module.config) for module in model.modules() if "config" in vars(module)]
    with attnrb.patch(model, POLICY):
        assert model.config is config
        for held in configurations(model):
            twin = duplicate(held)
            assert type(twin) is kind
            assert twin._attn_implementation != "attnrb"
            assert held == config
            assert config == held
            assert held._attn_implementation == implementation
            assert held.to_dict() == said
            assert "attnrb" not in json.dumps(held.to_diff_dict(), default=str) + repr(held)
        inner = [module.config for module in model.modules() if "config" in vars(module)]
        assert all(type(duplicate(held)) is kind for held in inner)
    assert [id(module.config) for module in model.modules() if "config" in vars(module)] == before


@pytest.mark.parametrize("name", NAMES)
def test_a_model_made_of_it_is_plain(name: str) -> None:
    model, ids = tiny(name), tokens(1, 9)
    with torch.no_grad():
        plain = model(ids).logits
        with attnrb.patch(model, POLICY):
            edited = model(ids).logits
            makers = [lambda held: AutoModelForCausalLM.from_config(held), lambda held: type(model)(held)]
            for held in configurations(model):
                for make in makers:
                    other = make(held).eval()
                    other.load_state_dict(model.state_dict())
                    assert torch.equal(other(ids).logits, plain)
                    with attnrb.patch(other, POLICY):
                        assert torch.equal(other(ids).logits, edited)
                    assert torch.equal(other(ids).logits, plain)
            assert torch.equal(model(ids).logits, edited)
        assert torch.equal(other(ids).logits, plain)


def test_one_made_of_the_configuration_of_its_attention_leaves_no_name_behind() -> None:
    model = tiny("llama")
    with attnrb.patch(model, POLICY):
        held = model.model.layers[0].self_attn.config
        assert held._attn_implementation == "attnrb"
        type(model)(held)
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_the_name_leaves_with_the_forward() -> None:
    """Also where the forward fails, before its layers or within."""
    from attnrb.hosts.session import current_forward

    model, ids = tiny("llama").base_model, tokens(1, 6)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), attnrb.patch(model, POLICY):
        seen = []
        handle = model.layers[2].register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
        model(ids)
        handle.remove()
        assert seen == ["attnrb"]
        for where in (model, model.embed_tokens, model.layers[1]):
            handle = where.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model(ids)
            handle.remove()
            assert model.config._attn_implementation == "sdpa"
            assert current_forward() is None
        with pytest.raises(TypeError):
            model(ids, spans=3)
        assert model.config._attn_implementation == "sdpa"


def test_a_thread_sees_the_plain_configuration_while_another_runs() -> None:
    model, ids = tiny("llama").base_model, tokens(1, 6)
    seen: list[str] = []

    def look(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(model.config._attn_implementation))
        thread.start()
        thread.join()

    with torch.no_grad(), attnrb.patch(model, POLICY):
        handle = model.layers[1].register_forward_hook(look)
        model(ids)
        handle.remove()
    assert seen == ["sdpa"]


def test_a_configuration_taken_before_the_patch_is_the_one_that_counts() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    config = model.config
    with torch.no_grad(), attnrb.patch(model, POLICY):
        whole = model(ids, output_hidden_states=True).hidden_states
        config.num_hidden_layers = 3
        assert model.base_model.config.num_hidden_layers == 3
        assert torch.equal(model.base_model(ids).last_hidden_state, model.base_model.norm(whole[3]))
        model.base_model.config.num_hidden_layers = 5
    assert config.num_hidden_layers == 5


@pytest.mark.parametrize("patched_before", [True, False])
def test_weights_by_the_configuration(patched_before: bool, tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(1, 7)
    model.set_attn_implementation("eager")
    if not patched_before:
        model.config.output_attentions = True
    with torch.no_grad(), attnrb.patch(model, POLICY):
        model.config.output_attentions = True
        weights = model(ids).attentions
        assert weights is not None
        assert len(weights) == 5
        model.save_pretrained(tmp_path)
    assert "attnrb" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_masks_for_a_static_cache_are_attnrbs_own(name: str) -> None:
    """``generate`` makes them with the model's own configuration: in numbers, not of all queries and keys."""
    model, ids = tiny(name), tokens(2, 9)
    with attnrb.patch(model, POLICY) as patched:
        inputs = model.prepare_inputs_for_generation(
            ids,
            past_key_values=StaticCache(config=model.config, max_cache_len=16),
            attention_mask=torch.ones_like(ids),
            is_first_iteration=True,
            **({} if _new() else {"cache_position": torch.arange(9)}),
        )
        masks = inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            assert mask.numel() < ids.shape[1] * 16
        twin = copy.deepcopy(model)
        assert patched.stats.general_masks == 0
    with torch.no_grad():
        options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
        assert torch.equal(twin.generate(ids, **options), model.generate(ids, **options))
    assert "create_masks_for_generate" not in vars(model)


def _new() -> bool:
    import inspect

    from transformers import masking_utils

    return "cache_position" not in inspect.signature(masking_utils.create_causal_mask).parameters


@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_a_hook_may_call_the_model_again(name: str) -> None:
    """Layers of the second drop the keyword that names their forward: they look for the one that runs."""
    model, ids, others = tiny(name), tokens(1, 9), tokens(2, 5)
    with torch.no_grad(), attnrb.patch(model, POLICY):
        expected, within = model(ids).logits, model(others).logits
        for where in (model.model.embed_tokens, model.model.layers[1], model.model.layers[0].self_attn):
            seen: list[torch.Tensor] = []

            def again(*_: Any, seen: list[torch.Tensor] = seen) -> None:
                if not seen:
                    seen.append(ids)
                    seen.append(model(others).logits)

            handle = where.register_forward_hook(again)
            assert torch.equal(model(ids).logits, expected)
            handle.remove()
            assert torch.equal(seen[1], within)


def test_a_second_patch_names_the_way_back() -> None:
    model = tiny("llama")
    attnrb.patch(model, POLICY)
    for again in (model, model.base_model):
        with pytest.raises(RuntimeError, match=r"patched already.*attnrb\.unpatch\(model\)"):
            attnrb.patch(again, POLICY)
    assert attnrb.unpatch(model)
    with attnrb.patch(model, POLICY):
        assert attnrb.patched(model) is not None


def test_two_models_that_share_their_layers() -> None:
    """Whichever patch goes first, nothing of it stays."""
    for order in (0, 1):
        model, other = tiny("llama"), tiny("llama")
        other.model.layers = model.model.layers
        config, others = model.config, other.config
        patches = [attnrb.patch(model, POLICY), attnrb.patch(other, POLICY)]
        for each in (order, 1 - order):
            patches[each].remove()
        assert model.config is config
        assert other.config is others
        assert all(module.config is config for module in model.modules() if "config" in vars(module))


def test_a_failure_within_an_early_exit_gives_the_layers_back() -> None:
    """The library lowers the number of layers while it drafts, and forgets it where a forward fails."""
    model, ids = tiny("llama"), tokens(1, 9)
    forwards = 0

    def fail(call: attnrb.AttentionCall) -> None:
        nonlocal forwards
        forwards += call.layer == 0
        if forwards > 1:
            raise ZeroDivisionError

    with attnrb.patch(model, POLICY, observer=fail):
        with pytest.raises(ZeroDivisionError):
            model.generate(ids, max_new_tokens=6, do_sample=False, assistant_early_exit=2)
        assert model.config.num_hidden_layers == 5
    assert model.config.num_hidden_layers == 5


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kept", [False, True], ids=["", "traceback kept"])
@pytest.mark.parametrize("where", ["model.layers.1", "model.embed_tokens", "lm_head", "model"])
def test_an_interrupt_leaves_nothing_behind(where: str, kept: bool) -> None:
    """PyTorch calls no hook after one. A notebook keeps the traceback, and so all that the call held."""
    model, ids = tiny("llama"), tokens(1, 9)
    plain = model(ids).logits
    with torch.no_grad(), attnrb.patch(model, POLICY):
        expected = model(ids).logits
        handle = model.get_submodule(where).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt) as error:
            model(ids)
        if not kept:
            del error
        handle.remove()
        if not kept:
            assert model.model.config._attn_implementation != "attnrb"
        assert torch.equal(model(ids).logits, expected)
        assert model.model.config._attn_implementation != "attnrb"
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("removed", [False, True])
def test_an_interrupt_within_an_early_exit_gives_the_layers_back(removed: bool, number: int) -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    calls = 0

    def interrupted(call: attnrb.AttentionCall) -> None:
        nonlocal calls
        calls += call.layer == 0
        if calls == number:
            raise KeyboardInterrupt

    patched = attnrb.patch(model, POLICY, observer=interrupted)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=6, do_sample=False, assistant_early_exit=2)
        if removed:
            patched.remove()
            found, wanted = model(ids).logits, tiny("llama")(ids).logits
        else:
            other = tiny("llama")
            with attnrb.patch(other, POLICY):
                wanted = other(ids).logits
            found = model(ids).logits
    assert torch.equal(found, wanted)
    assert model.config.num_hidden_layers == 5


def test_a_patch_made_in_inference_mode_serves_training() -> None:
    model, ids = tiny("llama"), tokens(1, 9)
    with torch.inference_mode():
        patched = attnrb.patch(model, POLICY)
        model(ids)
    model(ids, labels=ids).loss.backward()
    patched.remove()
    assert all(weight.grad is not None for weight in model.parameters())
