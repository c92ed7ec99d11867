"""Patched models under torch.compile and torch.export: whole graphs, no recompiling per step, no stale graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from test_patch_models import CONFIG, assert_close, run
from tiny_models import tiny, tokens
from torch._dynamo.utils import counters

pytestmark = pytest.mark.slow

# Tracing is what depends on the model; inductor, which takes many seconds, does the same with all of them. So the
# default run has one architecture of each, and `make test-long` all.
long = pytest.mark.skipif("ATTNRB_LONG" not in os.environ, reason="minutes long: `make test-long` runs it")


def architectures(*names: str, longer: tuple[str, ...]) -> Any:
    return pytest.mark.parametrize("name", [*names, *(pytest.param(name, marks=long) for name in longer)])


some = architectures(
    "llama", "gemma3_text", "stablelm", longer=("llama4_text", "qwen3", "gpt_neox", "gpt_oss", "qwen3_next")
)
compiled_by_inductor = architectures("llama", longer=("gemma3_text", "qwen3", "gpt_neox", "gpt_oss", "qwen3_next"))
TRACED = {"fullgraph": True, "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def left_padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return mask


@torch.no_grad()
def forward(name: str, **options: Any) -> None:
    model, ids = tiny(name), tokens(2, 20)
    mask = left_padding(ids)
    plain, padded = run(model, ids, use_cache=False), run(model, ids, use_cache=False, attention_mask=mask)
    with attnrb.patch(model, CONFIG):
        compiled = torch.compile(model, **options)
        assert_close(compiled(ids, use_cache=False).logits, plain)
        logits = compiled(ids, use_cache=False, attention_mask=mask).logits
    assert_close(logits[mask.bool()], padded[mask.bool()])


@torch.no_grad()
def static_decode(name: str, **options: Any) -> None:
    from transformers import StaticCache

    model, ids = tiny(name), tokens(2, 24)
    expected = run(model, ids)
    with attnrb.patch(model, CONFIG):
        cache = StaticCache(config=model.config, max_cache_len=26)
        logits, graphs = [model(ids[:, :8], past_key_values=cache).logits], []
        compiled = torch.compile(model, **options)
        for slot in range(8, 24):
            position = {"cache_position": torch.tensor([slot])} if before_5_4() else {}
            logits.append(compiled(ids[:, slot : slot + 1], past_key_values=cache, **position).logits)
            graphs.append(counters["stats"]["unique_graphs"])
    assert_close(torch.cat(logits, dim=1), expected)
    # One graph, and one more where the number of keys that a window has let go became a variable.
    assert graphs[-1] <= 2
    assert graphs[2] == graphs[-1], f"recompiled on the way: {graphs}"


def before_5_4() -> bool:
    from transformers import masking_utils

    return "cache_position" in masking_utils.sdpa_mask.__code__.co_varnames


@some
def test_the_whole_forward_is_one_graph(name: str) -> None:
    forward(name, **TRACED)


@some
def test_decoding_with_a_static_cache_does_not_recompile(name: str) -> None:
    static_decode(name, **TRACED)


@compiled_by_inductor
def test_inductor(name: str) -> None:
    forward(name, fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    static_decode(name, fullgraph=True)


def one_graph_for_every_length(name: str, **options: Any) -> None:
    model = tiny(name)
    lengths = [20, 13, 31]
    expected = [run(model, tokens(2, length), use_cache=False) for length in lengths]
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        compiled = torch.compile(model, dynamic=True, fullgraph=True, **options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length, logits in zip(lengths, expected, strict=True):
                assert_close(compiled(tokens(2, length), use_cache=False).logits, logits)


@architectures("gemma3_text", longer=("llama", "qwen3", "gpt_neox", "gpt_oss", "qwen3_next"))
def test_one_graph_for_every_length(name: str) -> None:
    one_graph_for_every_length(name, backend="eager")


@architectures(longer=("llama", "gemma3_text", "qwen3", "gpt_neox", "gpt_oss", "qwen3_next"))
def test_one_graph_of_inductor_for_every_length(name: str) -> None:
    one_graph_for_every_length(name)


def test_a_graph_builds_no_matrix_of_queries_and_keys() -> None:
    """Neither where nothing says that a row is one text, nor for padding."""
    largest = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal largest
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                largest = max(largest, value.numel())
        return graph

    model, ids = tiny("mistral"), tokens(2, 600)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        compiled = torch.compile(model.model, fullgraph=True, backend=backend, dynamic=False)
        compiled(ids, use_cache=False)
        compiled(ids, use_cache=False, attention_mask=left_padding(ids))
    assert 0 < largest < 600 * 600


def test_holes_in_a_compiled_mask_are_told() -> None:
    model, ids = tiny("llama"), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 4] = 0
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        compiled = torch.compile(model, **TRACED)
        with pytest.raises(RuntimeError, match="a row has padding between its tokens"):
            compiled(ids, use_cache=False, attention_mask=mask)


def test_packed_texts_in_a_graph() -> None:
    model, ids = tiny("llama"), tokens(1, 16)
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    expected = run(model, ids, position_ids=positions, use_cache=False)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        compiled = torch.compile(model, **TRACED)
        assert_close(compiled(ids, position_ids=positions, use_cache=False).logits, expected)


def test_patching_and_removing_reach_a_compiled_model() -> None:
    """A graph made before a patch, or under another one, is not used for it."""
    model, ids = tiny("llama"), tokens(2, 20)
    other = attnrb.RebalanceConfig(alpha=-0.4, threshold=0.2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        plain = compiled(ids, use_cache=False).logits
        for config in (CONFIG, other, CONFIG):
            with attnrb.patch(model, config):
                logits = compiled(ids, use_cache=False).logits
                assert_close(logits, model(ids, use_cache=False).logits)
                assert (logits - plain).abs().max() > 1e-2 * plain.abs().max()
        assert_close(compiled(ids, use_cache=False).logits, plain)


@pytest.mark.parametrize(("name", "strict"), [("llama", True), ("llama", False), ("gpt_oss", False)])
def test_export(name: str, strict: bool) -> None:
    model = tiny(name)
    expected = [run(model, tokens(2, length), use_cache=False) for length in (20, 33)]
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        program = torch.export.export(
            model,
            (tokens(2, 20),),
            {"use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
            strict=strict,
        )
        for logits in expected:
            ids = tokens(2, logits.shape[1])
            assert_close(program.module()(ids, use_cache=False).logits, logits)
