"""Bad input: each refusal names the argument, what was expected and what came. Empty input is not bad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attnrb import Outliers, Visibility, functional
from attnrb.ops import rebalancing
from attnrb.ops.refusals import REFUSAL
from torch import Tensor

pytestmark = pytest.mark.emulated

BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, WIDTH, VALUE_WIDTH = 2, 4, 2, 5, 7, 16, 6


def operands(**changes: Any) -> dict[str, Any]:
    """Good query, key and value, with `changes` put in their places."""
    good: dict[str, Any] = {
        "query": torch.randn(BATCH, HEADS, QUERIES, WIDTH),
        "key": torch.randn(BATCH, KEY_HEADS, KEYS, WIDTH),
        "value": torch.randn(BATCH, KEY_HEADS, KEYS, VALUE_WIDTH),
    }
    return good | changes


def source(**changes: Any) -> Any:
    return functional.source_attention(**operands(**changes))


def rebalanced(**changes: Any) -> Any:
    good: dict[str, Any] = {"outliers": functional.source_attention(**operands())[2], "gain": 0.1}
    return functional.rebalanced_attention(**operands(**(good | changes)))


def received(**changes: Any) -> Any:
    arguments = operands(**changes)
    del arguments["value"]
    return functional.received_attention(**arguments)


ATTENTION: list[Callable[..., Any]] = [source, rebalanced, received]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def slots(*values: int) -> Tensor:
    return torch.tensor(values)


# What all three attention functions refuse: (changed arguments, exception, pattern).
COMMON: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query rank": ({"query": zeros(4, 5, 16)}, ValueError, r"query: expected 4 dimensions.*got 3: \(4, 5, 16\)"),
    "key rank": ({"key": zeros(2, 2, 7, 16, 1)}, ValueError, r"key: expected 4 dimensions.*got 5"),
    "query is a list": ({"query": [1.0]}, TypeError, r"query: expected a tensor.*got list"),
    "key is None": ({"key": None}, TypeError, r"key: expected a tensor.*got NoneType"),
    "integers": ({"query": zeros(2, 4, 5, 16, dtype=torch.int64)}, TypeError, r"query: .*float64, got.*int64"),
    "mixed dtypes": (
        {"key": zeros(2, 2, 7, 16).half()},
        TypeError,
        r"key: expected the dtype of query, .*32, got .*16",
    ),
    "sparse": (
        {"query": zeros(2, 4, 5, 16).to_sparse()},
        TypeError,
        r"query: expected a dense .* layout torch.sparse_",
    ),
    "jagged": (
        {"key": torch.nested.nested_tensor([zeros(2, 7, 16)] * 2, layout=torch.jagged)},
        TypeError,
        r"key: expected a dense tensor, got one of the layout torch.jagged",
    ),
    "mixed devices": ({"key": zeros(2, 2, 7, 16).to("meta")}, ValueError, r"key: expected on cpu.*got meta"),
    "batches differ": ({"key": zeros(1, 2, 7, 16)}, ValueError, r"key: expected the batch size of query, 2, got \[1"),
    "widths differ": (
        {"key": zeros(2, 2, 7, 8)},
        ValueError,
        r"key: expected the width of query, 16, got \[2, 2, 7, 8\]",
    ),
    "H no multiple of Hk": ({"query": zeros(2, 3, 5, 16)}, ValueError, r"query: .*multiple of Hk = 2 of key, got 3"),
    "no key heads": ({"key": zeros(2, 0, 7, 16)}, ValueError, r"key: expected at least one head"),
    "no width": ({"query": zeros(2, 4, 5, 0), "key": zeros(2, 2, 7, 0)}, ValueError, r"query: expected a width"),
    "infinite scale": ({"scale": float("inf")}, ValueError, r"scale: expected a finite .*got inf"),
    "NaN scale": ({"scale": float("nan")}, ValueError, r"scale: expected a finite .*got nan"),
    "scale beyond float32": ({"scale": 1e39}, ValueError, r"scale: expected a finite .*got 1e\+39"),
    "text for a scale": ({"scale": "big"}, RuntimeError, r"argument 'scale'.*'str'"),
    "negative softcap": ({"softcap": -1.0}, ValueError, r"softcap: expected 0 \(none\) or a positive number, got -1"),
    "NaN softcap": ({"softcap": float("nan")}, ValueError, r"softcap: expected a finite .*got nan"),
    "sinks of another size": ({"sinks": zeros(3)}, ValueError, r"sinks: expected the shape \[H\] = \[4\], got \[3\]"),
    "integer sinks": ({"sinks": slots(1, 2, 3, 4)}, TypeError, r"sinks: expected a floating-point tensor.*int64"),
    "mask that does not broadcast": (
        {"visibility": Visibility(mask=torch.ones(3, 7, dtype=torch.bool))},
        ValueError,
        r"mask: expected a shape that broadcasts to \[B, H, M, N\] = \[2, 4, 5, 7\], got \[3, 7\]",
    ),
    "additive mask": ({"visibility": zeros(5, 7)}, TypeError, r"visibility: expected a bool tensor.*float32"),
    "visibility of another kind": ({"visibility": "causal"}, TypeError, r"visibility: expected a Visibility.*'causal'"),
    "key_start of another size": (
        {"visibility": Visibility(key_start=slots(0, 1, 2))},
        ValueError,
        r"key_start: expected the shape \[B\] = \[2\], got \[3\]",
    ),
    "key_end on another device": (
        {"visibility": Visibility(key_end=slots(7, 7).to("meta"))},
        ValueError,
        r"key_end: expected on cpu, where query is, got meta",
    ),
    "query_offset beyond int32": (
        {"visibility": Visibility(query_offset=2**31)},
        ValueError,
        r"query_offset: expected a slot .*got 2147483648",
    ),
    "key_offset beyond int32": (
        {"visibility": Visibility(key_offset=2**31 - 4)},
        ValueError,
        r"(query|key)_offset: expected a slot .*got 21474836",
    ),
}


@pytest.mark.parametrize("case", COMMON)
@pytest.mark.parametrize("function", ATTENTION)
def test_attention_functions_refuse(function: Callable[..., Any], case: str) -> None:
    changes, exception, pattern = COMMON[case]
    with pytest.raises(exception, match=pattern):
        function(**changes)


def rows(*shape: int) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


def outliers(indices: Tensor, counts: Tensor) -> dict[str, Any]:
    return {"outliers": Outliers(indices, counts)}


COUNTS = torch.zeros(BATCH, HEADS, QUERIES, dtype=torch.int32)
NOT_ASCENDING = rows(BATCH, HEADS, QUERIES, 2)
NOT_ASCENDING[1, 3, 4] = torch.tensor([3, 2])

SPECIFIC: dict[str, tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = {
    "value keys": (
        source,
        {"value": zeros(2, 2, 6, 6)},
        ValueError,
        r"value: .*\[2, 2, 7\], then Dv, got \[2, 2, 6, 6\]",
    ),
    "value heads": (rebalanced, {"value": zeros(2, 4, 7, 6)}, ValueError, r"value: .*\[2, 2, 7\].*got \[2, 4, 7, 6\]"),
    "value rank": (source, {"value": zeros(2, 7, 6)}, ValueError, r"value: expected 4 dimensions.*got 3: \[2, 7, 6\]"),
    "value dtype": (source, {"value": zeros(2, 2, 7, 6).half()}, TypeError, r"value: expected the dtype of query"),
    "threshold 0": (source, {"threshold": 0.0}, ValueError, r"threshold: expected a number between 0 and 1.*got 0.0"),
    "threshold 1": (source, {"threshold": 1.0}, ValueError, r"threshold: expected a number between 0 and 1.*got 1.0"),
    "threshold NaN": (source, {"threshold": float("nan")}, ValueError, r"threshold: .*got nan"),
    "gain NaN": (rebalanced, {"gain": float("nan")}, ValueError, r"gain: expected a finite number, got nan"),
    "gain infinite in a list": (rebalanced, {"gain": [1, 2, 3, float("inf")]}, ValueError, r"gain: .*finite.*inf"),
    "gains of another size": (
        rebalanced,
        {"gain": [0.1, 0.2]},
        ValueError,
        r"gain: .*\[1\] or \[H\] = \[4\], got \[2\]",
    ),
    "gain matrix": (rebalanced, {"gain": zeros(4, 1)}, ValueError, r"gain: .*\[1\] or \[H\] = \[4\], got \[4, 1\]"),
    "gain text": (rebalanced, {"gain": "much"}, TypeError, r"gain: expected a number, or one for each head"),
    "gain integers": (
        rebalanced,
        {"gain": slots(1, 2, 3, 4)},
        TypeError,
        r"gain: expected numbers or a floating-point",
    ),
    "gain on another device": (rebalanced, {"gain": zeros(4).to("meta")}, ValueError, r"gain: expected on cpu"),
    "indices alone": (rebalanced, {"outliers": rows(2, 4, 5, 3)}, TypeError, r"outliers: expected a tuple"),
    "indices of long": (
        rebalanced,
        outliers(rows(2, 4, 5, 3).long(), COUNTS),
        ValueError,
        r"indices: .*int32, got int64",
    ),
    "counts of long": (
        rebalanced,
        outliers(rows(2, 4, 5, 3), COUNTS.long()),
        ValueError,
        r"counts: .*int32, got int64",
    ),
    "indices rank": (rebalanced, outliers(rows(2, 4, 5), COUNTS), ValueError, r"indices: expected 4 dimensions"),
    "indices heads": (rebalanced, outliers(rows(2, 2, 5, 3), COUNTS), ValueError, r"indices: .*got \[2, 2, 5, 3\]"),
    "indices queries": (rebalanced, outliers(rows(2, 4, 4, 3), COUNTS), ValueError, r"indices: .*got \[2, 4, 4, 3\]"),
    "counts shape": (rebalanced, outliers(rows(2, 4, 5, 3), COUNTS[:1]), ValueError, r"counts: .*got \[1, 4, 5\]"),
    "unsorted rows": (
        rebalanced,
        outliers(NOT_ASCENDING, COUNTS + 2),
        ValueError,
        r"indices: expected each row to ascend",
    ),
    "repeated index": (
        rebalanced,
        outliers(NOT_ASCENDING * 0 + 1, COUNTS + 2),
        ValueError,
        r"indices: .*ascend strictly",
    ),
}


@pytest.mark.parametrize("case", SPECIFIC)
def test_one_function_refuses(case: str) -> None:
    function, changes, exception, pattern = SPECIFIC[case]
    with pytest.raises(exception, match=pattern):
        function(**changes)


WEIGHTS, MASK = torch.rand(2, 3, 4, 5), torch.ones(2, 3, 4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "exception", "pattern"),
    [
        (
            lambda: functional.outlier_mask(WEIGHTS[0]),
            ValueError,
            r"weights: expected 4 dimensions, got 3: \(3, 4, 5\)",
        ),
        (lambda: functional.outlier_mask(WEIGHTS.long()), TypeError, r"weights: .*got.*int64"),
        (lambda: functional.outlier_mask(WEIGHTS, 1.5), ValueError, r"threshold: .*got 1.5"),
        (
            lambda: functional.outlier_mask(WEIGHTS, query_offset=2**40),
            ValueError,
            r"query_offset: .*got 1099511627776",
        ),
        (
            lambda: functional.rebalance(WEIGHTS, MASK[..., :3], 0.1),
            ValueError,
            r"mask: .*\[2, 3, 4, 5\], got \[2, 3, 4, 3\]",
        ),
        (lambda: functional.rebalance(WEIGHTS, MASK.float(), 0.1), TypeError, r"mask: expected a bool tensor.*float32"),
        (lambda: functional.rebalance(WEIGHTS, MASK[None], 0.1), ValueError, r"mask: .*got \[1, 2, 3, 4, 5\]"),
        (lambda: functional.rebalance(WEIGHTS, MASK, [0.1, 0.2]), ValueError, r"gain: .*\[H\] = \[3\], got \[2\]"),
        (lambda: functional.rebalance(WEIGHTS, MASK, float("nan")), ValueError, r"gain: expected a finite.*got nan"),
        (lambda: functional.rebalance(WEIGHTS.long(), MASK, 0.1), TypeError, r"weights: .*int64"),
    ],
)
def test_dense_functions_refuse(call: Callable[[], Any], exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        call()


@pytest.mark.parametrize(
    ("arguments", "exception", "pattern"),
    [
        ({"causal": 1}, TypeError, "causal: expected True, False or None, got 1"),
        ({"window": 0}, ValueError, "window: expected at least 1, or None for no limit, got 0"),
        ({"window": -3}, ValueError, "window: expected at least 1, or None for no limit, got -3"),
        ({"window": 2.0}, TypeError, r"window: expected an int or None, got float \(2.0\)"),
        ({"window": True}, TypeError, r"window: expected an int or None, got bool"),
        ({"query_offset": "0"}, TypeError, r"query_offset: expected an int, an int64 tensor \[B\] or None, got str"),
        ({"query_offset": zeros(2)}, TypeError, r"query_offset: expected an int64 or int32 tensor \[B\], got.*float32"),
        ({"query_offset": slots(1, 2)[None]}, ValueError, r"query_offset: .*\[B\], got the shape \(1, 2\)"),
        ({"chunk": 0}, ValueError, "chunk: expected at least 1, or None for no limit, got 0"),
        ({"chunk": 2.0}, TypeError, r"chunk: expected an int or None, got float \(2.0\)"),
        ({"key_offset": None}, TypeError, "key_offset: expected an int, got NoneType"),
        ({"key_offset": -1}, ValueError, "key_offset: expected a slot of at least 0, got -1"),
        ({"key_start": [0, 1]}, TypeError, "key_start: expected an int64 or int32 tensor"),
        ({"key_end": zeros(2)}, TypeError, r"key_end: expected an int64 or int32 tensor \[B\], got.*float32"),
        ({"key_end": slots(1, 2)[None]}, ValueError, r"key_end: .*\[B\], got the shape \(1, 2\)"),
        ({"mask": zeros(5, 7)}, TypeError, "mask: expected a bool tensor.*float32"),
        ({"mask": torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)}, ValueError, "mask: expected at most 4 dimensions"),
    ],
)
def test_visibility_refuses(arguments: dict[str, Any], exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        Visibility(**arguments)


_DENSE = ("batches differ", "widths differ", "sinks of another size", "mask that does not broadcast")


@pytest.mark.parametrize("case", [*_DENSE, "H no multiple of Hk", "key_start of another size"])
@pytest.mark.parametrize("function", ATTENTION)
def test_float64_is_refused_as_the_others_are(function: Callable[..., Any], case: str) -> None:
    """It takes another path, on which PyTorch would broadcast some of these."""
    changes, exception, pattern = COMMON[case]
    wide = {name: each.double() if torch.is_tensor(each) else each for name, each in (operands() | changes).items()}
    with pytest.raises(exception, match=pattern.partition(":")[0]):
        function(**wide)


# The ops themselves are public too and must hold without the Python checks.
VISION = (True, 2, 0, 0, None, None, None)
SCORE = (0.25, 0.0, None)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"query": zeros(2, 4, 5, 16).double()}, "query: expected the dtype float32, bfloat16 or float16, got float64"),
        ({"query": zeros(4, 5, 16)}, r"query: expected 4 dimensions \[B, H, M, D\], got 3: \[4, 5, 16\]"),
        ({"key": zeros(2, 2, 7, 16).half()}, "key: expected the dtype of query, float32, got float16"),
        ({"value": zeros(2, 2, 7, 6).to("meta")}, "value: expected on cpu, where query is, got meta"),
        ({"threshold": float("nan")}, r"threshold: expected a number in \(0, 1\), got nan"),
        ({"vision": (True, 2, -1, 0, None, None, None)}, "key_offset: expected a slot from 0"),
        (
            {"vision": (True, 2, 0, -1, None, None, None)},
            r"window: expected 0 \(no limit\) or a positive number, got -1",
        ),
        ({"vision": (True, 2, 0, 0, zeros(2), None, None)}, "key_start: expected the dtype int64, got float32"),
        ({"vision": (True, 2, 0, 0, None, None, zeros(5, 7))}, "mask: expected the dtype bool, got float32"),
    ],
)
def test_ops_refuse(changes: dict[str, Any], pattern: str) -> None:
    arguments = operands(threshold=0.01, vision=VISION) | changes
    vision = arguments.pop("vision")
    # Where an operand is on meta, the fake refuses, which is Python: a ValueError under every torch.
    with pytest.raises((REFUSAL, ValueError), match=pattern):
        torch.ops.attnrb.source_attention(*arguments.values(), *vision, *SCORE)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "value_width"), [(0, 5, 7, 6), (2, 0, 7, 6), (2, 5, 0, 6), (2, 5, 7, 0), (0, 0, 0, 0)]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_empty_is_legal(batch: int, queries: int, keys: int, value_width: int, sinks: bool) -> None:
    query, key = torch.randn(batch, 4, queries, 16), torch.randn(batch, 2, keys, 16)
    value = torch.randn(batch, 2, keys, value_width)
    options: dict[str, Any] = {"sinks": torch.randn(4) if sinks else None}
    output, lse, found = functional.source_attention(query, key, value, **options)
    below = functional.rebalanced_attention(query, key, value, found, 0.3, normalize=True, **options)
    assert output.shape == below.shape == (batch, 4, queries, value_width)
    assert lse.shape == found.counts.shape == (batch, 4, queries)
    assert found.indices.shape == (batch, 4, queries, min(99, keys))
    weight = functional.received_attention(query, key, **options)
    assert weight.shape == (batch, 4, keys)
    if keys == 0:  # queries that see nothing
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(below, torch.zeros_like(below))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
        assert torch.equal(found.counts, torch.zeros_like(found.counts))
    if queries == 0:
        assert torch.equal(weight, torch.zeros_like(weight))


def test_no_outliers_at_all_leave_plain_attention() -> None:
    inputs = operands()
    plain, _, found = functional.source_attention(**inputs)
    nothing = Outliers(found.indices[..., :0], torch.zeros_like(found.counts))
    assert torch.equal(functional.rebalanced_attention(**inputs, outliers=nothing, gain=0.5), plain)
    nothing = Outliers(found.indices, torch.zeros_like(found.counts))
    assert torch.equal(functional.rebalanced_attention(**inputs, outliers=nothing, gain=0.5), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gains_of_a_tensor_are_finite_for_weights_in_memory(dtype: torch.dtype, value: float) -> None:
    weights = torch.rand(1, 2, 3, 3).to(dtype)
    for gain in (torch.tensor([value]), torch.tensor([0.5, value])):
        with pytest.raises(ValueError, match="gain: expected finite numbers"):
            functional.rebalance(weights, weights > 0.5, gain)


@pytest.mark.parametrize("op", ["attention_backward", "received_attention_backward"])
def test_backward_ops_refuse_operands_of_two_devices(op: str) -> None:
    query, key, value = (torch.randn(1, 2, 3, 8) for _ in range(3))
    rows = torch.randn(1, 2, 3)
    if op == "attention_backward":
        arguments = (value, None, query, key, value, value, rows.to("meta"))
    else:
        arguments = (rows, query, key.to("meta"), rows, True, 0, 0, 0, None, None, None, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="expected on cpu"):
        getattr(torch.ops.attnrb, op)(*arguments)


def test_on_the_meta_device_results_have_shapes() -> None:
    query, key, value = (zeros(*shape).to("meta") for shape in ((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 6)))
    attended = functional.attention(query, key, value, emit=0.1)
    assert (attended.output.shape, attended.lse.shape) == ((2, 4, 5, 6), (2, 4, 5))
    assert attended.outliers.counts.shape == (2, 4, 5) and attended.output.is_meta
    assert (
        functional.received_attention(query, key).shape
        == functional.received_attention(
            torch.zeros_like(query, device="cpu"), torch.zeros_like(key, device="cpu")
        ).shape
    )


# ------------------------------------------------------------------------------------------------------ short calls


@pytest.mark.parametrize(
    "gain",
    [0.1, [0.1] * HEADS, torch.tensor(0.1), torch.full((HEADS,), 0.1), torch.full((1,), 0.1, dtype=torch.float64)],
    ids=["number", "list", "no dimension", "heads", "float64"],
)
def test_a_gain_of_any_form_is_the_same(gain: Any) -> None:
    given = operands() | {"outliers": functional.source_attention(**operands())[2]}
    wanted = functional.rebalanced_attention(**given, gain=torch.full((1,), 0.1))
    assert torch.equal(functional.rebalanced_attention(**given, gain=gain), wanted)


def test_what_the_op_serves_is_not_looked_at_before(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands() | {"outliers": functional.source_attention(**operands())[2], "gain": torch.full((1,), 0.1)}
    wanted = functional.rebalanced_attention(**given)

    def looked_at(*_: Any) -> Any:
        raise AssertionError("operands were looked at")

    monkeypatch.setattr(rebalancing, "operands", looked_at)
    assert torch.equal(functional.rebalanced_attention(**given), wanted)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="looked at"):
        functional.rebalanced_attention(**given)
    with pytest.raises(AssertionError, match="looked at"):
        functional.rebalanced_attention(**given | {"query": given["query"].requires_grad_()})
