"""A patch that is taken off, or put on, while a forward runs: by a hook, an observer or another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import tiny, tokens

POLICY = attnrb.Rebalance(alpha=0.5, threshold=0.05)
WAYS: dict[str, Callable[[Any, attnrb.Patch], Any]] = {
    "remove": lambda model, patched: patched.remove(),
    "unpatch": lambda model, patched: attnrb.unpatch(model),
    "with": lambda model, patched: patched.__exit__(None, None, None),
}


class Case:
    """A model, a text, and its logits without and with the patch."""

    def __init__(self, name: str = "llama", implementation: str = "sdpa") -> None:
        self.model, self.ids = tiny(name), tokens(2, 9)
        self.model.set_attn_implementation(implementation)
        self.model.requires_grad_(False)
        self.hooks = self.count_hooks()
        self.plain = self.run()
        with attnrb.patch(self.model, POLICY):
            self.edited = self.run()
        assert not torch.equal(self.plain, self.edited)

    def run(self) -> torch.Tensor:
        found: torch.Tensor = self.model(self.ids).logits
        return found

    def count_hooks(self) -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        return sum(len(getattr(module, kind)) for module in self.model.modules() for kind in kinds)

    def check_plain(self) -> None:
        assert attnrb.patched(self.model) is None
        assert self.count_hooks() == self.hooks
        assert torch.equal(self.run(), self.plain)
        with attnrb.patch(self.model, POLICY):
            assert torch.equal(self.run(), self.edited)
        assert torch.equal(self.run(), self.plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "where", ["model.embed_tokens", "model.layers.0", "model.layers.1.self_attn", "model.norm", "model", "lm_head", ""]
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_forward_ends_as_it_began(way: Callable[[Any, Any], Any], where: str, implementation: str) -> None:
    case = Case(implementation=implementation)
    patched = attnrb.patch(case.model, POLICY)
    handle = case.model.get_submodule(where).register_forward_hook(lambda *_: way(case.model, patched) and None)
    assert torch.equal(case.run(), case.edited)
    handle.remove()
    assert not patched.active
    case.check_plain()


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "qwen3_next"])
def test_other_models(name: str) -> None:
    case = Case(name)
    patched = attnrb.patch(case.model, POLICY)
    layer = next(module for module in case.model.base_model.modules() if isinstance(module, torch.nn.ModuleList))[1]
    handle = layer.register_forward_pre_hook(lambda *_: patched.remove())
    assert torch.equal(case.run(), case.edited)
    handle.remove()
    case.check_plain()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("where", "edited"), [("", False), ("model", None), ("model.layers.0", True)])
def test_before_a_module(where: str, edited: bool | None, first: bool) -> None:
    """Before the decoder's own forward the patch is gone at once; a hook behind that of the patch comes too late."""
    case = Case()
    patched = attnrb.patch(case.model, POLICY)
    handle = case.model.get_submodule(where).register_forward_pre_hook(lambda *_: patched.remove(), prepend=first)
    edited = not first if edited is None else edited
    assert torch.equal(case.run(), case.edited if edited else case.plain)
    handle.remove()
    case.check_plain()


def test_by_an_observer() -> None:
    case = Case()
    patched = attnrb.patch(case.model, POLICY, observer=lambda call: patched.remove() if call.layer == 1 else None)
    assert torch.equal(case.run(), case.edited)
    case.check_plain()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("kept", [False, True], ids=["", "traceback kept"])
def test_in_a_forward_that_fails(error: type[BaseException], kept: bool) -> None:
    case = Case()
    patched = attnrb.patch(case.model, POLICY)

    def fail(*_: Any) -> None:
        patched.remove()
        raise error

    handle = case.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error) as raised:
        case.run()
    if not kept:
        del raised
    handle.remove()
    assert torch.equal(case.run(), case.plain)
    case.check_plain()


def test_in_a_forward_within_another() -> None:
    case, others = Case(), tokens(1, 5)
    with attnrb.patch(case.model, POLICY):
        within = case.model(others).logits
    patched = attnrb.patch(case.model, POLICY)
    seen: list[torch.Tensor] = []

    def again(*_: Any) -> None:
        if not seen:
            seen.append(others)
            patched.remove()
            seen.append(case.model(others).logits)

    handle = case.model.model.layers[1].register_forward_hook(again)
    assert torch.equal(case.run(), case.edited)
    handle.remove()
    assert torch.equal(seen[1], within)
    case.check_plain()


def test_by_another_thread() -> None:
    case = Case()
    patched = attnrb.patch(case.model, POLICY)
    reached, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        reached.set()
        assert go_on.wait(60)

    handle = case.model.model.layers[1].register_forward_hook(wait)

    def work() -> None:
        with torch.no_grad():
            found.append(case.run())

    thread = threading.Thread(target=work)
    thread.start()
    assert reached.wait(60)
    patched.remove()
    assert patched.leaving
    go_on.set()
    thread.join()
    handle.remove()
    assert torch.equal(found[0], case.edited)
    case.check_plain()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["", "static cache"])
def test_while_generating(options: dict[str, Any]) -> None:
    """The steps from then on are plain, on the cache of those before: as a loop of single steps has it."""
    case, forwards = Case(), []
    patched = attnrb.patch(case.model, POLICY)

    def remove(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 3:
            patched.remove()

    handle = case.model.model.layers[1].register_forward_hook(remove)
    found = case.model.generate(case.ids, max_new_tokens=6, do_sample=False, **options)
    handle.remove()
    case.check_plain()

    row, cache, expected = case.ids, None, case.ids
    patched = attnrb.patch(case.model, POLICY)
    for step in range(6):
        if step == 3:
            patched.remove()
        output = case.model(row, past_key_values=cache, use_cache=True)
        cache, row = output.past_key_values, output.logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, row], 1)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [5, 9])
def test_before_a_backward_that_runs_the_layers_again(implementation: str, reentrant: bool, length: int) -> None:
    def made(checkpointing: bool) -> Any:
        model = tiny("llama").train()
        model.set_attn_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()  # which a backward that enters again needs
        return model

    def gradient(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.model.layers[1].self_attn.q_proj.weight.grad
        return found

    ids, other = tokens(2, length), made(False)
    with attnrb.patch(other, POLICY):
        other(ids, labels=ids).loss.backward()
    model = made(True)
    with attnrb.patch(model, POLICY):
        loss, again = model(ids, labels=ids).loss, model(ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="the patch was removed before the backward of a forward with gradient"):
        loss.backward()
    assert gradient(model) is None
    with attnrb.patch(model, attnrb.Rebalance()):  # the forward brings its own policy
        again.backward()
    torch.testing.assert_close(gradient(model), gradient(other), rtol=1e-4, atol=1e-5)


def test_a_backward_without_checkpoints_needs_no_patch() -> None:
    model, ids = tiny("llama").train(), tokens(2, 9)
    with attnrb.patch(model, POLICY):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad is not None


def test_a_patch_in_the_middle_of_a_forward_is_refused() -> None:
    case = Case()

    def patch(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="a forward of it runs: patch it before or after"):
            attnrb.patch(case.model, POLICY)

    handle = case.model.model.layers[1].register_forward_hook(patch)
    assert torch.equal(case.run(), case.plain)
    handle.remove()
    case.check_plain()


def test_a_patch_in_place_of_one_that_waits_is_refused() -> None:
    case = Case()
    patched = attnrb.patch(case.model, POLICY)

    def swap(*_: Any) -> None:
        assert attnrb.unpatch(case.model)
        assert patched.active and patched.leaving
        with pytest.raises(RuntimeError, match="its patch goes when that is over: patch it again then"):
            attnrb.patch(case.model, POLICY)

    handle = case.model.model.layers[1].register_forward_hook(swap)
    assert torch.equal(case.run(), case.edited)
    handle.remove()
    case.check_plain()
