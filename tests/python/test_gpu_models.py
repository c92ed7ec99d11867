"""Patched models on a GPU: against the CPU, in CUDA graphs, with static caches and from several threads.

Skipped, with the reason, where there is no device.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import Emphasis, LearnedGains, RebalanceConfig
from tiny_models import tiny, tokens
from torch import Tensor
from transformers import DynamicCache

REASON = "torch finds no CUDA device (ATTNRB_REQUIRE_CUDA=1 makes this a failure)"
CONFIG = RebalanceConfig(alpha=0.5, threshold=0.05)
ARCHITECTURES = ["llama", "mistral", "gemma3_text", "gpt_oss"]


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        if os.environ.get("ATTNRB_REQUIRE_CUDA") == "1":
            pytest.fail(REASON)
        pytest.skip(REASON)


def generate(model: Any, ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """Greedy, 20 tokens, on the model's device."""
    ids = ids.to(model.device)
    given = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    with attnrb.patch(model, CONFIG):
        found: Tensor = model.generate(ids, attention_mask=given, max_new_tokens=20, do_sample=False, **options)
    return found.cpu()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generated_text_is_that_of_the_cpu(name: str) -> None:
    """In float32; with a row that is padded on its left, too."""
    ids = tokens(2, 12)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    for mask in (None, padded):
        expected = generate(tiny(name), ids, mask)
        assert torch.equal(generate(tiny(name).cuda(), ids, mask), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_static_cache_records_no_graph_for_each_token(name: str) -> None:
    """Transformers compiles such a forward by itself, for CUDA graphs."""
    from torch._inductor import cudagraph_trees

    ids = tokens(1, 12)
    expected = generate(tiny(name), ids, None)
    model = tiny(name).cuda()
    assert torch.equal(generate(model, ids, None, cache_implementation="static"), expected)
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    recorded = 0 if manager is None else manager.new_graph_id().id
    assert recorded <= 8 * model.config.num_hidden_layers, "a graph for every token"


def test_a_forward_is_captured_and_replayed() -> None:
    model, ids = tiny("llama").cuda(), tokens(2, 16).cuda()
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        for masked in (False, True):
            mask = torch.ones_like(ids) if masked else None
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = model(ids, attention_mask=mask, use_cache=False).logits
            logits.zero_()
            graph.replay()
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_token_waits_for_nothing() -> None:
    model, ids = tiny("llama").cuda(), tokens(1, 16).cuda()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        model(ids, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(3):
                mask = torch.ones(1, 17 + step, dtype=torch.int64, device="cuda")
                model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_threads_with_models_of_two_widths() -> None:
    """Kernels of one name ask for other amounts of shared memory."""
    narrow = tiny("llama", torch.bfloat16, head_dim=128).cuda()
    wide = tiny("llama", torch.bfloat16, head_dim=256).cuda()
    ids = tokens(1, 100).cuda()

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids, use_cache=False).logits
        torch.cuda.synchronize()
        return found

    with attnrb.patch(narrow, CONFIG), attnrb.patch(wide, CONFIG):
        expected = [logits(model) for model in (narrow, wide)]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(20):
                found = list(pool.map(logits, (narrow, wide)))
                assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_learnt_gains_train_where_the_model_is() -> None:
    def step(model: Any) -> Tensor:
        learned = LearnedGains(model, CONFIG)
        ids = tokens(2, 20).to(model.device)
        with attnrb.patch(model, learned):
            model(ids, labels=ids).loss.backward()
        assert learned.gains.device.type == model.device.type
        assert learned.gains.grad is not None
        return learned.gains.grad.cpu()

    torch.testing.assert_close(step(tiny("llama").cuda()), step(tiny("llama")), rtol=1e-3, atol=1e-5)


def test_emphasis_is_that_of_the_cpu() -> None:
    ids, policy, spans = tokens(1, 30), Emphasis(strength=4.0), [[(3, 9)]]
    with torch.no_grad():
        found = []
        for model in (tiny("llama"), tiny("llama").cuda()):
            with attnrb.patch(model, policy) as patched, patched.spans(spans):
                found.append(model(ids.to(model.device)).logits.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
