"""A patched forward on a device waits for it nowhere, so that a CUDA graph can hold it.

``meta`` stands for the device: no number can be read there, so whatever looked at one would raise. Its masks take the
same way as those of a GPU; what they say is compared on the CPU, where masks are made to take it too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import LearnedGains, RebalanceConfig
from attnrb.hosts.transformers import decoder, masks
from attnrb.hosts.transformers.geometry import Geometry, MadeMasks, from_numbers, queries_at_tokens, to_numbers
from attnrb.ops.visibility import Visibility
from attnrb.policies.base import ModelShape
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, StaticCache

META = torch.device("meta")
CONFIG = RebalanceConfig(alpha=0.5, threshold=0.05)
ARCHITECTURES = ["llama", "mistral", "gemma3_text"]


def learned_on_cpu(folder: Path) -> Path:
    """A file of gains."""
    return LearnedGains(ModelShape(LAYERS, 4, (True,) * LAYERS), CONFIG).save(folder)


def by_attnrb() -> bool:
    """Whether attnrb asked for what is done, and not transformers for itself, as where a cache is made."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("attnrb", "transformers")):
            return name.startswith("attnrb")
        frame = frame.f_back  # type: ignore[assignment]
    return True


class NothingIsCopied(TorchDispatchMode):
    """Refuses copies from the host, which wait for the device: those of memory that is not pinned."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            target = args[0].device if function.overloadpacket is torch.ops.aten.copy_ else options.get("device")
            away = target is not None and torch.device(target).type != "cpu"
            if source.device.type == "cpu" and away and by_attnrb():
                raise AssertionError(f"{function} copies {tuple(source.shape)} to the device")
        return function(*args, **options)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are where their weights are; else ``meta`` means that these are offloaded."""
    monkeypatch.setattr(decoder, "_devices", lambda _, layers: (META,) * layers)


@pytest.fixture
def no_tensors_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.tensor`` copies what it makes, out of sight of dispatch."""
    make = torch.tensor

    def tensor(data: Any, **options: Any) -> Tensor:
        device = options.get("device")
        here = device is None or torch.device(device).type == "cpu"
        assert here or not by_attnrb(), f"torch.tensor({data}, device={device}) copies"
        return make(data, **options)

    monkeypatch.setattr(torch, "tensor", tensor)


def forward(model: Any, queries: int, *, held: int = 0, cache: Any = None, masked: bool = False, batch: int = 2) -> Any:
    ids = torch.zeros(batch, queries, dtype=torch.int64, device=META)
    mask = torch.ones(batch, held + queries, dtype=torch.int64, device=META) if masked else None
    with torch.no_grad(), NothingIsCopied():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)


@pytest.mark.usefixtures("on_meta", "no_tensors_of_numbers")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_and_tokens_wait_for_nothing(name: str) -> None:
    model = tiny(name).to(META)
    with attnrb.patch(model, CONFIG) as patched:
        forward(model, 5)
        forward(model, 80)
        forward(model, 5, masked=True)
        cache = DynamicCache(config=model.config)
        forward(model, 70, cache=cache)
        for step in range(2):
            forward(model, 1, held=70 + step, cache=cache, masked=step == 1)
        assert patched.stats.forwards == 6
        assert patched.stats.general_masks == 0


@pytest.mark.usefixtures("on_meta", "no_tensors_of_numbers")
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_static_caches_wait_for_nothing(name: str) -> None:
    """Once they are there: transformers makes them at the first forward."""
    model = tiny(name).to(META)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with attnrb.patch(model, CONFIG):
        with torch.no_grad():
            model(input_ids=torch.zeros(2, 7, dtype=torch.int64, device=META), past_key_values=cache, use_cache=True)
        forward(model, 1, held=7, cache=cache, masked=True)
        forward(model, 1, held=8, cache=cache)


@pytest.mark.usefixtures("on_meta", "no_tensors_of_numbers")
def test_learnt_gains_are_where_the_model_is(tmp_path: Path) -> None:
    model = tiny("llama").to(META)
    learned = LearnedGains(model, CONFIG)
    assert learned.gains.device == learned.chosen.device == META
    loaded = LearnedGains.load(learned_on_cpu(tmp_path))
    assert loaded.gains.device.type == "cpu"
    with attnrb.patch(model, loaded):
        assert loaded.gains.device == META
        forward(model, 5)


def test_numbers_of_a_graph_are_left_out_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each token of a static cache would record graphs of its own: transformers compiles for them by itself."""
    from torch._inductor import config

    if not hasattr(config, "cudagraph_unsafe_unbacked_ops"):
        pytest.skip("this version of torch has no such setting")
    monkeypatch.setattr(config, "cudagraph_unsafe_unbacked_ops", ["other::op"])
    compiled = torch.compile(lambda slot: torch.zeros(3) + masks.integer(slot), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor(4)), torch.full((3,), 4.0))
    assert config.cudagraph_unsafe_unbacked_ops == ["other::op", "attnrb::integer"]


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("cached", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_on_another_device_wait_for_nothing(name: str, cached: Any, padding: str) -> None:
    """Two layers are here. The others are on a device where each gets copies of its own, as accelerate makes them."""
    model = tiny(name)
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        module.to(META).register_forward_pre_hook(to_meta, with_kwargs=True)
    mask = torch.tensor([[*row, 1, 1] for row in PADDINGS[padding]])
    room = {"max_cache_len": 16} if cached is StaticCache else {}
    cache = cached(config=model.config, **room)
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        for first, last in ((0, 7), (7, 8), (8, 9)):
            model(tokens(2, 9)[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True)
    assert patched.stats.forwards == 3


def to_meta(_: torch.nn.Module, args: Any, options: Any) -> Any:
    return tree_map_only(Tensor, lambda each: each.to(META), (args, options))


def test_a_copy_of_a_mask_is_known_by_its_shape() -> None:
    made, windows = MadeMasks(), (None, 3, 5)
    here = torch.device("cpu")
    start = torch.tensor([1, 0])
    numbers = []
    for window in windows:
        visibility = Visibility(causal=True, query_offset=4, window=window, key_start=start, key_end=start + 9)
        numbers.append(to_numbers(visibility, 2, here, ordinal=len(made)))
        made.add(numbers[-1], Geometry(visibility, queries_at_tokens(visibility, 3), 7))
    assert made.of_copy(numbers[0].clone()) is None, "a copy beside it may have been changed: it is read"
    assert made.of_copy(torch.zeros(2, 1, 1, 30, dtype=torch.int64, device=META)) is None
    assert made.of_copy(numbers[0][:1].to(META)) is None, "a part of the texts"
    for mask, window in zip(numbers, windows, strict=True):
        assert from_numbers(mask, 3).visibility.window == window
        found = made.of_copy(mask.to(META))
        assert found is not None
        assert (found.visibility.window, found.visibility.query_offset, found.keys) == (window, 4, 7)
        assert found.visibility.key_start.device == found.tokens.device == META  # type: ignore[union-attr]
        assert made.of_copy(mask.to(META)) is found, "it is moved once for a device"


def test_copies_of_masks_of_all_queries_and_keys_say_themselves_what_is_visible() -> None:
    made, tokens_seen = MadeMasks(), torch.tensor([[True, False]])
    masks_made = (0, torch.ones(1, 1, 2, 4)), (0, torch.eye(4)[None, None, :2]), (3, torch.ones(1, 1, 2, 5))
    for key_offset, mask in masks_made:
        visibility = Visibility(causal=False, query_offset=2, key_offset=key_offset, mask=mask.bool())
        made.add(mask.bool(), Geometry(visibility, tokens_seen, mask.shape[-1]))
    copy = torch.zeros(1, 1, 2, 4, dtype=torch.bool, device=META)
    found = made.of_copy(copy)
    assert found is not None
    assert found.visibility.mask is copy
    assert (found.visibility.query_offset, found.visibility.key_offset) == (2, 0)
    assert found.tokens is not None
    assert found.tokens.device == META
    wider = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    made.add(wider, Geometry(Visibility(causal=False, query_offset=2, key_offset=0, mask=wider), None, 5))
    assert made.of_copy(wider.to(META)) is None, "two of this shape begin at different slots"


def always_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and slots on the CPU take the way of those on a device."""
    monkeypatch.setattr(masks, "_unread", lambda mask, queries: not torch.compiler.is_compiling())
    monkeypatch.setattr(
        masks, "_slot", lambda offset, batch: torch.as_tensor(offset, dtype=torch.int64).reshape(1).repeat(batch)
    )


PADDINGS = {
    "left": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "none": [[1] * 7, [1] * 7],
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_mask_that_nobody_looked_at_says_the_same(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a prompt, and of two tokens after it."""
    model, ids = tiny(name), tokens(2, 9)
    mask = torch.tensor([[*row, 1, 1] for row in PADDINGS[padding]])

    def logits() -> list[Tensor]:
        found, cache = [], DynamicCache(config=model.config)
        with torch.no_grad(), attnrb.patch(model, CONFIG):
            for first, last in ((0, 7), (7, 8), (8, 9)):
                given = {"input_ids": ids[:, first:last], "attention_mask": mask[:, :last]}
                found.append(model(**given, past_key_values=cache, use_cache=True).logits)
        return found

    read = logits()
    always_unread(monkeypatch)
    seen = mask[:, :7, None].bool()
    for unread, expected, rows in zip(logits(), read, (seen, None, None), strict=True):
        if rows is not None:  # what a query of padding sees is nobody's business
            unread, expected = unread.where(rows, 0.0), expected.where(rows, 0.0)
        torch.testing.assert_close(unread, expected, rtol=1e-4, atol=1e-4)
