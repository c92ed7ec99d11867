"""Paged attention as torch knows it, and what it refuses: nothing outside the pools is read or written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attnrb import Edit, Outliers, Paging, Visibility, functional
from attnrb.ops.refusals import REFUSAL
from library_kernels import ON_CUDA
from torch import Tensor

pytestmark = pytest.mark.emulated
ops = torch.ops.attnrb
BLOCKS, BLOCK_ROWS, HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 6, 4, 4, 2, 16, 8


def tables() -> dict[str, Tensor]:
    """Sequences of 3 queries on 9 keys, 1 on 7, 2 that are skipped, and one without queries."""
    return {
        "block_table": torch.tensor([[1, 3, 0], [5, 2, -9], [7, 7, 7], [4, 99, -1]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 3, 4, 6, 6]),
        "seq_lens": torch.tensor([9, 7, 0, 2], dtype=torch.int32),
    }


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "query": normal(6, HEADS, WIDTH),
        "key": normal(BLOCKS, KEY_HEADS, BLOCK_ROWS, WIDTH),
        "value": normal(BLOCKS, KEY_HEADS, BLOCK_ROWS, VALUE_WIDTH),
    }


def edit_options() -> dict[str, Any]:
    return {
        "indices": torch.tensor([0, 2, 5], dtype=torch.int32).expand(6, HEADS, 3).contiguous(),
        "counts": torch.full((6, HEADS), 2, dtype=torch.int32),
        "gain": torch.rand(4, HEADS),
        "rule": 2,
        "key_bias": torch.randn(4, 1, 8),
        "first_query": torch.tensor([7, 0, 0, 0]),
        "emit": 0.1,
        "window": 5,
        "sinks": torch.randn(HEADS),
    }


# What is wrong with the tables, by name, for the op and the dense path.
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "negative block": ({"block_table": torch.tensor([[1, -1, 0]] * 4).int()}, "block_table: .*0 to 5"),
    "block beyond the pools": ({"block_table": torch.tensor([[1, 6, 0]] * 4).int()}, "block_table: .*0 to 5"),
    "far block": ({"block_table": torch.tensor([[1, 2**31 - 1, 0]] * 4).int()}, "block_table: .*0 to 5"),
    "too short a table": ({"block_table": torch.tensor([[1, 2]] * 4).int()}, "seq_lens: .*W P = 8.*got 9"),
    "no table": ({"block_table": torch.zeros(4, 0).int()}, "seq_lens: .*W P = 0.*got 9"),
    "table of others": ({"block_table": torch.zeros(3, 3).int()}, r"block_table: expected .*\[B, W\]"),
    "negative length": ({"seq_lens": torch.tensor([9, -1, 0, 2])}, "seq_lens: expected numbers from 0 .*got -1"),
    "too long": ({"seq_lens": torch.tensor([9, 13, 0, 2])}, "seq_lens: expected numbers from 0 .*got 13"),
    "far too long": ({"seq_lens": torch.tensor([9, 2**62, 0, 2])}, "seq_lens: expected numbers from 0"),
    "more queries than keys": ({"seq_lens": torch.tensor([2, 7, 0, 2])}, "seq_lens: .*at least the queries.*got 2"),
    "starts of others": ({"query_starts": torch.tensor([0, 3, 4, 6])}, r"query_starts: expected the shape \[B \+ 1\]"),
    "starts later": ({"query_starts": torch.tensor([1, 3, 4, 6, 6])}, "query_starts: expected 0 first"),
    "ends early": ({"query_starts": torch.tensor([0, 3, 4, 5, 5])}, "query_starts: expected 0 first.*T = 6 last"),
    "descends": ({"query_starts": torch.tensor([0, 3, 2, 6, 6])}, "query_starts: expected ascending numbers"),
    "leaps": ({"query_starts": torch.tensor([0, 2**40, 4, 6, 6])}, "query_starts: expected ascending|seq_lens"),
    "falls below": ({"query_starts": torch.tensor([0, -(2**40), 4, 6, 6])}, "query_starts: expected ascending"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_hostile_tables(name: str, dtype: torch.dtype) -> None:
    wrong, pattern = WRONG[name]
    out = torch.zeros(6, HEADS, VALUE_WIDTH, dtype=dtype)
    with pytest.raises(ValueError, match=pattern):
        functional.attention(**operands(dtype), paging=Paging(**(tables() | wrong)), out=out)
    assert not out.any()


# Other arguments: what they are changed to, the exception, and what it says.
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query of a batch": ({"query": torch.zeros(1, HEADS, 6, WIDTH)}, ValueError, "query: expected 3 dimensions"),
    "dtypes": ({"key": torch.zeros(BLOCKS, KEY_HEADS, BLOCK_ROWS, WIDTH).half()}, TypeError, "key: .*dtype of query"),
    "width": ({"key": torch.zeros(BLOCKS, KEY_HEADS, BLOCK_ROWS, 8)}, ValueError, "key: expected"),
    "heads": ({"query": torch.zeros(6, 3, WIDTH)}, ValueError, "query: expected a number of heads"),
    "value": ({"value": torch.zeros(BLOCKS, KEY_HEADS, 3, 8)}, ValueError, "value: expected"),
    "no rows in blocks": (
        {"key": torch.zeros(BLOCKS, KEY_HEADS, 0, WIDTH), "value": torch.zeros(BLOCKS, KEY_HEADS, 0, 8)},
        ValueError,
        "key: expected .*at least one row",
    ),
    "mask": ({"visibility": torch.ones(6, 9).bool()}, ValueError, "mask: expected none with"),
    "offset": ({"visibility": Visibility(query_offset=3)}, ValueError, "query_offset: expected none with"),
    "offsets": (
        {"visibility": Visibility(query_offset=torch.zeros(4).long())},
        ValueError,
        "query_offset: expected none with",
    ),
    "key offset": ({"visibility": Visibility(key_offset=3)}, ValueError, "key_offset: expected none with"),
    "key start": ({"visibility": Visibility(key_start=torch.zeros(4).long())}, ValueError, "key_start: expected none"),
    "key end": ({"visibility": Visibility(key_end=torch.zeros(4).long())}, ValueError, "key_end: expected none"),
    "sinks": ({"sinks": torch.zeros(3)}, ValueError, "sinks: expected the shape"),
    "out shape": ({"out": torch.zeros(6, HEADS, 9)}, ValueError, r"out: expected the shape \[T, H, Dv\]"),
    "out dtype": ({"out": torch.zeros(6, HEADS, 8).half()}, TypeError, "out: expected a tensor of the dtype"),
    "out columns": ({"out": torch.zeros(6, HEADS, 16)[..., ::2]}, ValueError, "out: expected a contiguous last axis"),
    "outliers of a batch": (
        {"edit": Edit(Outliers(torch.zeros(4, HEADS, 1, 3).int(), torch.zeros(4, HEADS, 1).int()), 1.0)},
        ValueError,
        r"indices: expected .*\[T, H, C\]",
    ),
    "outliers of other rows": (
        {"edit": Edit(Outliers(torch.zeros(5, HEADS, 3).int(), torch.zeros(5, HEADS).int()), 1.0)},
        ValueError,
        r"indices: expected .*\[T, H, C\]",
    ),
    "counts": (
        {"edit": Edit(Outliers(torch.zeros(6, HEADS, 3).int(), torch.zeros(6, 1).int()), 1.0)},
        ValueError,
        r"counts: expected .*\[T, H\]",
    ),
    "counts above the capacity": (
        {"edit": Edit(Outliers(torch.zeros(6, HEADS, 3).int(), torch.full((6, HEADS), 4).int()), 1.0)},
        ValueError,
        "counts: expected numbers from 0 to C = 3",
    ),
    "unsorted": (
        {"edit": Edit(Outliers(torch.full((6, HEADS, 3), 1).int(), torch.full((6, HEADS), 3).int()), 1.0)},
        ValueError,
        "indices: expected each row to ascend",
    ),
    "gains of others": (
        {"edit": Edit(Outliers(torch.zeros(6, HEADS, 1).int(), torch.zeros(6, HEADS).int()), torch.ones(3, HEADS))},
        ValueError,
        r"gain: expected",
    ),
    "gains of others for all keys": ({"edit": Edit(None, torch.ones(3, HEADS))}, ValueError, "gain: expected"),
    "gains that are not finite": (
        {
            "edit": Edit(
                Outliers(torch.zeros(6, HEADS, 1).int(), torch.zeros(6, HEADS).int()),
                torch.full((4, HEADS), torch.inf),
            )
        },
        ValueError,
        "gain: expected finite numbers",
    ),
    "bias of others": ({"edit": Edit(key_bias=torch.zeros(3, 1, 4))}, ValueError, "key_bias: expected"),
    "first query of others": (
        {"edit": Edit(key_bias=torch.zeros(4, 1, 4), first_query=torch.zeros(3).long())},
        ValueError,
        "first_query: expected",
    ),
    "no paging": ({"paging": 3}, TypeError, "paging: expected a Paging or None"),
    "a gradient": ({"query": torch.zeros(6, HEADS, WIDTH, requires_grad=True)}, RuntimeError, "forward only"),
    "a gradient of sinks": ({"sinks": torch.zeros(HEADS, requires_grad=True)}, RuntimeError, "forward only"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    if ON_CUDA and name == "gains that are not finite":
        pytest.skip("numbers in tensors are not looked at on CUDA")
    changed, exception, pattern = CALLS[name]
    arguments: dict[str, Any] = {**operands(), "paging": Paging(**tables())} | changed
    with pytest.raises(exception, match=pattern):
        functional.attention(**arguments)


def test_columns_of_pools_follow_each_other() -> None:
    arguments = operands()
    arguments["key"] = arguments["key"].repeat_interleave(2, 3)[..., ::2]
    with pytest.raises(ValueError, match="key: expected a last axis whose elements follow each other"):
        functional.attention(**arguments, paging=Paging(**tables()))


@pytest.mark.parametrize(
    ("name", "value", "exception"),
    [
        ("block_table", torch.zeros(4, 3).long(), TypeError),
        ("block_table", torch.zeros(4).int(), ValueError),
        ("query_starts", torch.zeros(5), TypeError),
        ("query_starts", torch.zeros(5, 1).int(), ValueError),
        ("seq_lens", [1, 2], TypeError),
        ("seq_lens", torch.zeros(4, 1).int(), ValueError),
    ],
)
def test_what_a_paging_is(name: str, value: Any, exception: type[Exception]) -> None:
    with pytest.raises(exception, match=f"{name}: expected an int"):
        Paging(**(tables() | {name: value}))


def test_out_needs_a_paging() -> None:
    rows = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="out: expected None without a paging"):
        functional.attention(rows, rows, rows, out=rows)
    with pytest.raises(REFUSAL, match="block_table: expected a tensor where there is out"):
        ops.attention.into(rows, rows, rows, out=rows)


@pytest.mark.parametrize("missing", ["block_table", "query_starts", "seq_lens"])
def test_the_op_wants_all_tables(missing: str) -> None:
    given = {name: tensor for name, tensor in tables().items() if name != missing}
    with pytest.raises(REFUSAL, match=f"{missing}: expected a tensor where .* got None"):
        ops.attention(*operands().values(), **given)


def test_the_op_names_what_paging_says_itself() -> None:
    for name, value in (
        ("query_offset", 3),
        ("query_offsets", torch.zeros(4).long()),
        ("key_offset", 2),
        ("key_start", torch.zeros(4).long()),
        ("key_end", torch.zeros(4).long()),
        ("mask", torch.ones(1, 1, 1, 1).bool()),
    ):
        with pytest.raises(REFUSAL, match=f"{name}: expected none with a block_table"):
            ops.attention(*operands().values(), **tables(), **{name: value})


WRITES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "below": ({"slot_mapping": torch.tensor([0, 1, -2])}, ValueError, "slot_mapping: expected -1 or numbers below 24"),
    "beyond": ({"slot_mapping": torch.tensor([0, 1, 24])}, ValueError, "slot_mapping: expected -1 or numbers below 24"),
    "far": ({"slot_mapping": torch.tensor([0, 1, 2**62])}, ValueError, "slot_mapping: expected -1 or numbers below 24"),
    "count": ({"slot_mapping": torch.tensor([0, 1])}, ValueError, "slot_mapping: expected the shape"),
    "int32": ({"slot_mapping": torch.tensor([0, 1, 2]).int()}, TypeError, "slot_mapping: expected an int64 tensor"),
    "heads": ({"key": torch.zeros(3, 1, WIDTH)}, ValueError, "(value|key_pool): expected the shape"),
    "width": ({"value": torch.zeros(3, KEY_HEADS, 5)}, ValueError, "value_pool: expected the shape"),
    "dtype": ({"value": torch.zeros(3, KEY_HEADS, 8).half()}, TypeError, "value: expected the dtype of key"),
    "rank": ({"key": torch.zeros(1, 3, KEY_HEADS, WIDTH)}, ValueError, "key: expected 3 dimensions"),
    "a gradient": ({"key": torch.zeros(3, KEY_HEADS, WIDTH, requires_grad=True)}, RuntimeError, "no gradient"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str, dtype: torch.dtype) -> None:
    changed, exception, pattern = WRITES[name]
    whole = torch.zeros(BLOCKS, KEY_HEADS, BLOCK_ROWS, WIDTH + VALUE_WIDTH, dtype=dtype)
    arguments = {
        "key": torch.ones(3, KEY_HEADS, WIDTH, dtype=dtype),
        "value": torch.ones(3, KEY_HEADS, VALUE_WIDTH, dtype=dtype),
        "slot_mapping": torch.tensor([0, 5, 23]),
    }
    for key, each in changed.items():
        arguments[key] = each.to(dtype) if each.dtype == torch.float32 else each
    with pytest.raises(exception, match=pattern):
        functional.write_keys(key_pool=whole[..., :WIDTH], value_pool=whole[..., WIDTH:], **arguments)
    assert not whole.any()


def test_opcheck() -> None:
    dtype = torch.bfloat16
    given, options = tuple(operands(dtype).values()), {**tables(), **edit_options()}
    out = torch.zeros(6, HEADS, VALUE_WIDTH, dtype=dtype)
    torch.library.opcheck(ops.attention.default, given, options)
    torch.library.opcheck(ops.attention.default, given, tables())
    torch.library.opcheck(ops.attention.into, given, {**options, "out": out})
    del options["emit"]
    torch.library.opcheck(ops.attention.output, given, options)
    torch.library.opcheck(ops.attention.output_into, given, {**options, "out": out})
    key, value = torch.randn(3, KEY_HEADS, WIDTH).to(dtype), torch.randn(3, KEY_HEADS, VALUE_WIDTH).to(dtype)
    torch.library.opcheck(ops.write_keys.default, (key, value, *given[1:], torch.tensor([0, -1, 23])))


@pytest.mark.parametrize("emit", [None, 0.01, 0.1])
def test_fakes_tell_the_truth(emit: float | None) -> None:
    given, options = operands(), tables()
    real = ops.attention(*given.values(), **options, emit=emit)
    meta = {name: each.to("meta") for name, each in options.items()}
    fake = ops.attention(*(each.to("meta") for each in given.values()), **meta, emit=emit)
    for told, came in zip(fake, real, strict=True):
        assert (told.shape, told.dtype, told.stride()) == (came.shape, came.dtype, came.stride())


def test_overloads_agree() -> None:
    given, options = operands().values(), {**tables(), **edit_options()}
    output, lse, indices, counts = ops.attention(*given, **options)
    out = torch.full_like(output, 5)
    for came, expected in zip(ops.attention.into(*given, **options, out=out), (lse, indices, counts), strict=True):
        assert torch.equal(came, expected)
    served = [0, 1, 2, 3]
    assert torch.equal(out[served], output[served]) and bool((out[4:] == 5).all())
    del options["emit"]
    assert torch.equal(ops.attention.output(*given, **options), output)
    out.fill_(5)
    assert ops.attention.output_into(*given, **options, out=out) is None
    assert torch.equal(out[served], output[served]) and bool((out[4:] == 5).all())
    with pytest.raises(REFUSAL, match="emit: expected none where only the output is returned"):
        ops.attention.output(*given, **options, emit=0.1)
    with pytest.raises(REFUSAL, match="emit: expected none where only the output is returned"):
        ops.attention.output_heads_first(*given, emit=0.1)


def test_compiles() -> None:
    given, paging = operands(), Paging(**tables())

    def call(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        functional.attention(query, key, value, paging=paging, out=out)
        return out * 2

    found = torch.zeros(6, HEADS, VALUE_WIDTH)
    expected = call(*given.values(), torch.zeros_like(found))
    with torch.no_grad():
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given.values(), found), expected)


def test_nothing_is_touched_outside_of_operands_and_tables() -> None:
    """Each lies against a page that ends the process; hostile tables raise before they lead anywhere."""
    program = Path(__file__).with_name("guarded_memory.py")
    ran = subprocess.run([sys.executable, str(program), "0", "160"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])


def test_the_pages_around_them_do_end_the_process() -> None:
    program = (
        "import ctypes, torch, guarded_memory as g; t = g.guarded(torch.ones(5), at_end=True); "
        "ctypes.string_at(t.data_ptr() + 20, 1)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert ran.returncode == -signal.SIGSEGV
