"""The ops as torch knows them: schemas, fakes, `torch.library.opcheck`, and `torch.compile` over public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnrb import Outliers, Visibility, functional
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.attnrb

OPS = {
    "outlier_mask": ops.outlier_mask.default,
    "rebalance": ops.rebalance.default,
    "rebalance.per_head": ops.rebalance.per_head,
    "source_attention": ops.source_attention.default,
    "rebalanced_attention": ops.rebalanced_attention.default,
    "received_attention": ops.received_attention.default,
}

# name: (batch, heads, key heads, queries, keys, width, value width, dtype)
SHAPES = {
    "prefill": (2, 4, 2, 9, 9, 16, 16, torch.float32),
    "chunk": (1, 3, 1, 5, 33, 24, 8, torch.bfloat16),
    "decode": (2, 6, 2, 1, 70, 32, 32, torch.float16),
    "one": (1, 1, 1, 1, 1, 1, 1, torch.float32),
    "no queries": (2, 2, 1, 0, 5, 8, 8, torch.float32),
    "no keys": (2, 2, 1, 3, 0, 8, 8, torch.float32),
    "no batch": (0, 2, 1, 3, 5, 8, 8, torch.float32),
    "no value width": (1, 2, 1, 3, 5, 8, 0, torch.float32),
}


def qkv(shape: str, layout: str = "plain") -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys, width, value_width, dtype = SHAPES[shape]
    sizes = ((heads, queries, width), (key_heads, keys, width), (key_heads, keys, value_width))
    if layout == "plain":
        query, key, value = (torch.randn(batch, *each, dtype=dtype) for each in sizes)
    elif layout == "heads inside":  # what a projection of a model leaves: [B, rows, heads, width]
        query, key, value = (torch.randn(batch, r, h, w, dtype=dtype).transpose(1, 2) for h, r, w in sizes)
    else:  # columns apart, rows innermost
        query, key, value = (torch.randn(batch, h, w, r, dtype=dtype).transpose(2, 3) for h, r, w in sizes)
    return query, key, value


def visibility_variants(shape: str) -> dict[str, tuple[Any, ...]]:
    """The seven visibility arguments of an op, of every kind."""
    batch, heads, _, queries, keys, *_ = SHAPES[shape]
    start = torch.arange(batch) % max(keys, 1)
    end = torch.full((batch,), keys, dtype=torch.int32)
    return {
        "causal": (True, keys - queries, 0, 0, None, None, None),
        "offset window": (True, keys - queries + 7, 7, 3, None, None, None),
        "ranges": (False, 0, 0, 0, start, end, None),
        "mask": (False, 0, 0, 0, None, None, torch.rand(batch, 1, queries, keys) > 0.3),
        "narrow mask": (True, 0, 0, 0, None, None, torch.rand(heads, 1, keys) > 0.3),
    }


def cases() -> list[Any]:
    """(op, arguments) for opcheck and for the comparison of fakes with the real thing."""
    torch.manual_seed(1)
    found = []

    def add(op: str, name: str, *arguments: Any) -> None:
        found.append(pytest.param(op, arguments, id=f"{op}-{name}"))

    for shape, (batch, heads, _, queries, keys, *_rest, dtype) in SHAPES.items():
        weights = torch.rand(batch, heads, queries, keys).softmax(-1).to(dtype)
        add("outlier_mask", shape, weights, 0.1, keys - queries)
        add("rebalance", shape, weights, torch.rand(queries, keys) > 0.5, 0.3, True)
        add("rebalance.per_head", shape, weights, torch.rand(weights.shape) > 0.5, torch.rand(heads), False)
        layouts = ["plain", "heads inside", "rows inside"] if shape in ("prefill", "decode") else ["plain"]
        kinds = visibility_variants(shape)
        variants = [(layout, "causal") for layout in layouts]
        variants += [("plain", kind) for kind in kinds if kind != "causal" and len(layouts) > 1]
        for layout, kind in variants:
            query, key, value = qkv(shape, layout)
            visibility = kinds[kind]
            score = (0.25, 5.0 if kind == "ranges" else 0.0, torch.randn(heads) if kind == "mask" else None)
            name = f"{shape}-{layout}-{kind}"
            add("source_attention", name, query, key, value, 0.05, *visibility, *score)
            outliers = ops.source_attention(query, key, value, 0.05, *visibility, *score)[2:]
            gain = torch.rand(1 if kind == "causal" else heads)
            add("rebalanced_attention", name, query, key, value, *outliers, gain, True, *visibility, *score)
            add("received_attention", name, query, key, *visibility, *score)
    return found


CASES = cases()


@pytest.mark.parametrize(("op", "arguments"), CASES)
@pytest.mark.slow
def test_opcheck(op: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(OPS[op], arguments)


@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_fakes_tell_the_truth(op: str, arguments: tuple[Any, ...]) -> None:
    real = OPS[op](*arguments)
    fake = OPS[op](*(each.to("meta") if isinstance(each, Tensor) else each for each in arguments))
    for told, came in zip(*((x,) if isinstance(x, Tensor) else x for x in (fake, real)), strict=True):
        assert told.device.type == "meta"
        assert (told.shape, told.dtype, told.stride()) == (came.shape, came.dtype, came.stride())


# Dense, or called once a forward at most.
DIFFERENTIABLE = (
    "rebalance",
    "rebalance.per_head",
    "source_attention",
    "rebalanced_attention",
    "received_attention",
)


@pytest.mark.parametrize("op", OPS)
def test_inference_ops_stay_free_of_autograd(op: str) -> None:
    """A registered gradient costs every call several microseconds, which what decodes must not pay."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"attnrb::{op}", "Autograd")
    assert registered == (op in DIFFERENTIABLE)


def test_names_and_orders_that_users_rely_on() -> None:
    def names(op: Any) -> list[str]:
        return [argument.name for argument in op._schema.arguments]

    visibility = ["causal", "query_offset", "key_offset", "window", "key_start", "key_end", "mask"]
    score = ["scale", "softcap", "sinks"]
    assert names(ops.outlier_mask.default) == ["weights", "threshold", "query_offset"]
    assert names(ops.rebalance.default) == ["weights", "mask", "gain", "normalize"]
    assert names(ops.rebalance.per_head) == ["weights", "mask", "gain", "normalize"]
    assert names(ops.source_attention.default) == ["query", "key", "value", "threshold", *visibility, *score]
    assert names(ops.rebalanced_attention.default) == [
        *("query", "key", "value", "indices", "counts", "gain", "normalize"),
        *visibility,
        *score,
    ]
    assert names(ops.received_attention.default) == ["query", "key", *visibility, *score]


def test_overloads_agree() -> None:
    weights, mask = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5) > 0.5
    assert torch.equal(ops.rebalance(weights, mask, 0.5, True), ops.rebalance(weights, mask, torch.tensor([0.5]), True))
    assert torch.equal(functional.rebalance(weights, mask, 0.5), functional.rebalance(weights, mask, [0.5, 0.5, 0.5]))


# --------------------------------------------------------------------------------------------------- torch.compile


def two_layers(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    output, lse, outliers = functional.source_attention(query, key, value, threshold=0.05)
    below = functional.rebalanced_attention(output + query, key, value, outliers, 0.2, normalize=True)
    return output, lse, outliers.indices, outliers.counts, below


def every_option(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    start = torch.zeros(key.shape[0], dtype=torch.int32, device=key.device)
    visibility = Visibility(query_offset=key.shape[2] - query.shape[2] + 3, key_offset=3, window=5, key_start=start)
    sinks = torch.zeros(query.shape[1])
    score: dict[str, Any] = {"scale": 0.3, "visibility": visibility, "softcap": 20.0, "sinks": sinks}
    output, _, outliers = functional.source_attention(query, key, value, **score)
    gains = [0.1 * (1 + head) for head in range(query.shape[1])]
    below = functional.rebalanced_attention(query, key, value, outliers, gains, **score)
    return output, below, functional.received_attention(query, key, **score)


def dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    weights = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)).softmax(-1)
    mask = functional.outlier_mask(weights, 0.05)
    return mask, functional.rebalance(weights, mask, 0.2), functional.rebalance(weights, mask, torch.ones(1))


PROGRAMS: list[Callable[..., tuple[Tensor, ...]]] = [two_layers, every_option, dense]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
def test_compiles_whole(program: Callable[..., tuple[Tensor, ...]], dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = [torch.randn(2, h, r, 16) for h, r in ((4, 7), (2, 12), (2, 12))]
    compiled = torch.compile(program, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for came, expected in zip(compiled(*inputs), program(*inputs), strict=True):
        assert came.stride() == expected.stride()
        assert torch.equal(came, expected)


def test_one_dynamic_graph_serves_every_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for queries, keys in ((7, 12), (5, 31), (9, 150), (40, 400)):
            inputs = [torch.randn(2, h, r, 16) for h, r in ((4, queries), (2, keys), (2, keys))]
            for came, expected in zip(compiled(*inputs), two_layers(*inputs), strict=True):
                assert torch.equal(came, expected)


def test_compiles_with_inductor() -> None:
    """The default backend once: it checks the strides that the fakes promise, and writes code around the ops."""
    torch._dynamo.reset()
    inputs = [torch.randn(2, h, r, 16) for h, r in ((4, 7), (2, 12), (2, 12))]

    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        below = two_layers(query, key, value)[-1]
        return below.transpose(1, 2).flatten(2) * 2.0  # a view of the promised layout

    assert torch.equal(torch.compile(layer, fullgraph=True, dynamic=True)(*inputs), layer(*inputs))


def test_numbers_may_be_dynamic() -> None:
    """A float argument of a compiled function is a symbol, of which not every Python function can be asked."""
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))

    def program(query: Tensor, gain: float, threshold: float, gains: list[float]) -> Tensor:
        outliers = functional.source_attention(query, key, value, threshold=threshold)[2]
        first = functional.rebalanced_attention(query, key, value, outliers, gain)
        return functional.rebalanced_attention(first, key, value, outliers, gains)

    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (0.1, 0.2, 0.3):
        assert torch.equal(
            compiled(query, number, number, [number, 0.5]), program(query, number, number, [number, 0.5])
        )


def test_decoding_steps_share_a_graph() -> None:
    """A new Visibility with every token: one graph for the first, one for all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 40, 16)
    outliers = functional.source_attention(query, key, key)[2]

    def step(query: Tensor, key: Tensor, visibility: Visibility) -> Tensor:
        return functional.rebalanced_attention(query, key, key, outliers, 0.1, visibility=visibility)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(20, 30):
        visibility = Visibility(query_offset=length - 1, window=9)
        held = key[:, :, :length]
        assert torch.equal(compiled(query, held, visibility), step(query, held, visibility))
    assert counter.frame_count == 2


def test_visibility_and_outliers_cross_the_border_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    outliers = functional.source_attention(query, key, value)[2]
    visibility = Visibility(window=3)

    def program(query: Tensor, key: Tensor, outliers: Outliers, visibility: Visibility) -> Tensor:
        return functional.rebalanced_attention(query, key, key, outliers, 0.1, visibility=visibility)

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, outliers, visibility), program(query, key, outliers, visibility))
