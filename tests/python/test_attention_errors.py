"""What `Edit` and `functional.attention` refuse: the message names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnrb import Edit, Outliers, functional
from attnrb.ops.attention import attention_weights
from torch import Tensor

BATCH, HEADS, QUERIES, KEYS = 2, 4, 5, 7


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(BATCH, HEADS, QUERIES, 16, dtype=dtype),
        torch.zeros(BATCH, 2, KEYS, 16, dtype=dtype),
        torch.zeros(BATCH, 2, KEYS, 6, dtype=dtype),
    )


def lists(batch: int = BATCH, heads: int = HEADS, rows: int = QUERIES, capacity: int = 3) -> Outliers:
    indices = torch.arange(capacity, dtype=torch.int32).expand(batch, heads, rows, capacity).contiguous()
    return Outliers(indices, torch.full((batch, heads, rows), capacity, dtype=torch.int32))


def slots(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


BIAS = torch.zeros(1, 1, KEYS)

# What is wrong with an edit by itself.
EDITS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rule": ({"rule": "rows"}, ValueError, r"rule: expected one of 'none', 'row', 'rest', got 'rows'"),
    "rule as a number": ({"rule": 1}, ValueError, r"rule: expected one of 'none', 'row', 'rest', got 1"),
    "outliers without a gain": ({"outliers": lists()}, ValueError, "gain: expected where there are outliers, got None"),
    "a tensor for outliers": (
        {"outliers": lists().indices, "gain": 1.0},
        TypeError,
        r"outliers: expected a tuple \(indices, counts\), got a tensor",
    ),
    "indices int64": (
        {"outliers": (lists().indices.long(), lists().counts), "gain": 1.0},
        TypeError,
        "outliers: expected indices to be an int32 tensor, got .*int64",
    ),
    "counts of another rank": (
        {"outliers": (lists().indices, lists().counts[..., None]), "gain": 1.0},
        ValueError,
        r"outliers: expected counts of shape \[B, H, M\] or \[B, H, 1\], got \(2, 4, 5, 1\)",
    ),
    "gain as text": ({"gain": "big"}, TypeError, r"gain: expected a number, or one for each head, got str \('big'\)"),
    "gain NaN": ({"gain": float("nan")}, ValueError, "gain: expected a finite number, got nan"),
    "gain of integers": ({"gain": slots(1, 2)}, TypeError, "gain: expected numbers or a floating-point tensor.*int64"),
    "gain with three axes": (
        {"gain": torch.ones(2, 4, 1)},
        ValueError,
        r"gain: .*\[B, H\], got the shape \(2, 4, 1\)",
    ),
    "gain below -1, rest": (
        {"outliers": lists(), "gain": [0.5, -2, 0, 0], "rule": "rest"},
        ValueError,
        "gain: expected at least -1 with the rule 'rest', got -2.0",
    ),
    "bias as a list": ({"key_bias": [0.0]}, TypeError, r"key_bias: expected a floating-point tensor \[B, H, N'\], got"),
    "bias of integers": ({"key_bias": slots(1)[None, None]}, TypeError, "key_bias: expected a floating-point tensor"),
    "bias with one axis": ({"key_bias": BIAS[0, 0]}, ValueError, r"key_bias: expected 3 axes \[B, H, N'\].*got \(7,\)"),
    "first query alone": ({"first_query": 3}, ValueError, "key_bias: expected where there is first_query, got None"),
    "first query as text": (
        {"key_bias": BIAS, "first_query": "3"},
        TypeError,
        r"first_query: expected an int, an int64 tensor \[B\] or None, got str \('3'\)",
    ),
    "first query of floats": (
        {"key_bias": BIAS, "first_query": torch.ones(2)},
        TypeError,
        r"first_query: expected an int64 or int32 tensor \[B\], got .*float32",
    ),
    "first query of two axes": (
        {"key_bias": BIAS, "first_query": slots(1, 2)[None]},
        ValueError,
        r"first_query: expected one slot for each batch row, \[B\], got the shape \(1, 2\)",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_refuses(name: str) -> None:
    arguments, exception, pattern = EDITS[name]
    with pytest.raises(exception, match=pattern):
        Edit(**arguments)


# What is wrong with an edit for these operands: indices, gain and so on are named by the native op and the dense path.
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "gains of sequences": (
        {"edit": Edit(lists(), torch.ones(2, 4))},
        ValueError,
        r"gain: expected the shape \[1\] or \[H\]",
    ),
    "outliers of another batch": (
        {"edit": Edit(lists(batch=1), 1.0)},
        ValueError,
        r"indices: expected the shape \[B, H, M, C\].*got [\[(]1, 4, 5, 3",
    ),
    "outliers of other heads": ({"edit": Edit(lists(heads=2), 1.0)}, ValueError, r"indices: .*got [\[(]2, 2, 5, 3"),
    "outliers of other queries": ({"edit": Edit(lists(rows=4), 1.0)}, ValueError, r"indices: .*got [\[(]2, 4, 4, 3"),
    "counts of other rows": (
        {"edit": Edit((lists().indices, lists(rows=1).counts), 1.0)},
        ValueError,
        r"counts: expected the shape .*got [\[(]2, 4, 1",
    ),
    "gains of other heads": (
        {"edit": Edit(lists(), [0.5, 1.0])},
        ValueError,
        r"gain: expected the shape \[1\] or \[H\] = \[4\], got [\[(]2",
    ),
    "a gain tensor below -1": (
        {"edit": Edit(lists(), torch.full((4,), -2.0), "rest")},
        ValueError,
        "gain: expected .*at least -1.*got .*-2",
    ),
    "a gain tensor with NaN": (
        {"edit": Edit(lists(), torch.full((4,), torch.nan))},
        ValueError,
        "gain: expected finite numbers, got .*nan",
    ),
    "a bias of another batch": (
        {"edit": Edit(key_bias=torch.zeros(3, 1, KEYS))},
        ValueError,
        r"key_bias: expected the shape .*B = 2.*got [\[(]3, 1, 7",
    ),
    "a bias of other heads": (
        {"edit": Edit(key_bias=torch.zeros(1, 2, KEYS))},
        ValueError,
        r"key_bias: .*got [\[(]1, 2, 7",
    ),
    "first queries of another batch": (
        {"edit": Edit(key_bias=BIAS, first_query=slots(1, 2, 3))},
        ValueError,
        r"first_query: expected the shape \[B\] = \[2\], got [\[(]3",
    ),
    "a bias on another device": (
        {"edit": Edit(key_bias=BIAS.to("meta"))},
        ValueError,
        "key_bias: expected on cpu, where query is, got meta",
    ),
    "something else for an edit": ({"edit": {"gain": 1.0}}, TypeError, r"edit: expected an Edit or None, got dict"),
    "emit 0": ({"emit": 0.0}, ValueError, "emit: expected a number between 0 and 1, both excluded, got 0.0"),
    "emit 1": ({"emit": 1.0}, ValueError, "emit: expected a number between 0 and 1, both excluded, got 1.0"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_attention_refuses(name: str, dtype: torch.dtype) -> None:
    options, exception, pattern = CALLS[name]
    with pytest.raises(exception, match=pattern):
        functional.attention(*tensors(dtype), **options)


@pytest.mark.parametrize("name", [name for name in CALLS if "emit" not in name])
def test_weights_on_request_refuse_the_same(name: str) -> None:
    options, exception, pattern = CALLS[name]
    with pytest.raises(exception, match=pattern):
        attention_weights(*tensors()[:2], **options)


@pytest.mark.parametrize("rule", ["none", "row", "rest"])
def test_everything_has_the_range_of_its_rule(rule: str) -> None:
    edit = Edit(gain=torch.tensor([-2.0]), rule=rule)
    for dtype in (torch.float32, torch.float64):
        if rule != "rest":
            assert functional.attention(*tensors(dtype), edit=edit).output.isfinite().all()
            continue
        with pytest.raises(ValueError, match=f"gain: expected at least -1 with the rule '{rule}'"):
            functional.attention(*tensors(dtype), edit=edit)


def test_rows_that_do_not_ascend_are_refused() -> None:
    outliers = lists()
    outliers.indices[1, 3, 4] = torch.tensor([5, 3, 6])
    with pytest.raises(ValueError, match="indices: expected each row to ascend strictly"):
        functional.attention(*tensors(), edit=Edit(outliers, 0.5, "rest"))
    shared = lists(rows=1)
    shared.counts[0, 1, 0] = 4
    with pytest.raises(ValueError, match="counts: expected numbers from 0 to C = 3"):
        functional.attention(*tensors(), edit=Edit(shared, 0.5))
