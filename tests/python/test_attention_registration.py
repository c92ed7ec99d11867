"""The op `attention` as torch knows it: schema, fakes, opcheck, compilation without recompiling, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnrb import Edit, Outliers, Visibility, functional
from attnrb.ops.attention import OPTIONS
from attnrb.ops.paging import PagingArguments
from attnrb.ops.refusals import REFUSAL
from process_memory import growth
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.attnrb
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("none", "row", "rest")


def tensors(dtype: torch.dtype = torch.float32, *, queries: int = 7, keys: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    query, key = torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16)
    return query.to(dtype), key.to(dtype), torch.randn(2, 2, keys, 8).to(dtype)


def lists(rows: int) -> dict[str, Tensor]:
    indices = torch.tensor([0, 3, 7], dtype=torch.int32).expand(2, 4, rows, 3).contiguous()
    return {"indices": indices, "counts": torch.full((2, 4, rows), 2, dtype=torch.int32)}


def option_sets() -> dict[str, dict[str, Any]]:
    torch.manual_seed(3)
    slots = torch.tensor([2, 5])
    return {
        "nothing": {},
        "emit": {"emit": 0.05},
        "rows": {**lists(7), "gain": torch.rand(4), "rule": 1},
        "shared": {**lists(1), "gain": torch.rand(1), "rule": 2, "emit": 0.1},
        "bias": {"key_bias": torch.randn(1, 4, 9), "first_query": slots},
        "bias of all": {"key_bias": torch.randn(2, 1, 20), "query_offsets": slots, "chunk": 4, "causal": True},
        "everything": {
            **lists(1),
            "gain": torch.rand(4),
            "key_bias": torch.randn(2, 4, 12),
            "first_query": slots,
            "emit": 0.02,
            "key_offset": 2,
            "window": 5,
            "key_start": slots,
            "key_end": slots + 9,
            "mask": torch.rand(7, 12) > 0.2,
            "scale": 0.3,
            "softcap": 5.0,
            "sinks": torch.randn(4),
        },
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", option_sets())
@pytest.mark.slow
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    operands, options = tensors(dtype), option_sets()[name]
    torch.library.opcheck(ops.attention.default, operands, options)
    for op in (ops.attention.output, ops.attention.output_heads_first):
        torch.library.opcheck(op, operands, {name: each for name, each in options.items() if name != "emit"})
    learnt = {n: each.requires_grad_() for n, each in options.items() if n in ("gain", "key_bias", "sinks")}
    leaves = [each.requires_grad_() for each in operands]
    torch.library.opcheck(ops.attention_training.default, leaves, options | learnt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", option_sets())
@pytest.mark.slow
def test_opcheck_backward(name: str, dtype: torch.dtype) -> None:
    operands, options = tensors(dtype), option_sets()[name]
    output, lse, *_ = ops.attention(*operands, **options)
    options.pop("emit", None)
    arguments = (torch.randn_like(output), torch.randn_like(lse), *operands, output, lse)
    torch.library.opcheck(ops.attention_backward.default, arguments, options)


def sized(name: str, queries: int, keys: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Operands with so many queries and keys, and a set of options that fits them."""
    operands, options = tensors(queries=queries, keys=keys), option_sets()[name]
    if "mask" in options:
        options["mask"] = torch.ones(queries, keys, dtype=torch.bool)
    if queries == 0 and name == "rows":
        options |= {key: each[:, :, :0] for key, each in lists(7).items()}
    return operands, options


def on_meta(options: dict[str, Any]) -> dict[str, Any]:
    return {name: each.to("meta") if isinstance(each, Tensor) else each for name, each in options.items()}


@pytest.mark.parametrize("name", option_sets())
@pytest.mark.parametrize(("queries", "keys"), [(7, 12), (0, 12), (7, 0)])
def test_fakes_tell_the_truth(name: str, queries: int, keys: int) -> None:
    operands, options = sized(name, queries, keys)
    real = ops.attention(*operands, **options)
    fake = ops.attention(*(each.to("meta") for each in operands), **on_meta(options))
    for told, came in zip(fake, real, strict=True):
        assert (told.device.type, told.shape, told.dtype) == ("meta", came.shape, came.dtype)
        assert told.stride() == came.stride()


@pytest.mark.parametrize("name", option_sets())
@pytest.mark.parametrize(("queries", "keys"), [(7, 12), (0, 12), (7, 0)])
def test_overloads_lay_the_same_output_out(name: str, queries: int, keys: int) -> None:
    operands, options = sized(name, queries, keys)
    options.pop("emit", None)
    wanted = ops.attention(*operands, **options)[0]
    for op, expected in (
        (ops.attention.output_heads_first, wanted),
        (ops.attention.output, wanted.transpose(1, 2)),
    ):
        came, told = op(*operands, **options), op(*(each.to("meta") for each in operands), **on_meta(options))
        assert torch.equal(came, expected)
        assert told.shape == came.shape == expected.shape
        assert told.stride() == came.stride() == expected.stride()


def test_the_schema_can_grow() -> None:
    """Options are by name and have defaults; the structures of Python have them in the same order."""
    arguments = ops.attention.default._schema.arguments
    assert [each.name for each in arguments[:3]] == ["query", "key", "value"]
    assert all(each.kwarg_only and each.has_default_value() for each in arguments[3:])
    assert tuple(each.name for each in arguments[3:]) == (*OPTIONS, *PagingArguments._fields)
    arguments = arguments[: 3 + len(OPTIONS)]  # with blocks there is no gradient
    training = ops.attention_training.default._schema.arguments
    assert [each.name for each in training] == [each.name for each in arguments]
    assert [each.default_value for each in training] == [each.default_value for each in arguments]
    assert not any(each.kwarg_only for each in training)
    heads_first = ops.attention.output_heads_first._schema.arguments
    assert [(each.name, each.default_value) for each in heads_first] == [
        (each.name, each.default_value) for each in training
    ]


def test_overloads_differ_in_more_than_their_name() -> None:
    """Torch's registry looks operators up by their types and arguments, without the name of the overload."""
    signatures: dict[object, str] = {}
    for each in torch._C._dispatch_get_all_op_names():
        if each.startswith("attnrb::"):
            name, _, overload = each.partition(".")
            schema = torch._C._get_schema(name, overload)
            arguments = tuple((each.name, str(each.type), each.kwarg_only) for each in schema.arguments)
            returns = tuple(str(each.type) for each in schema.returns)
            assert signatures.setdefault((name, arguments, returns), each) == each
    assert len(signatures) > 15


def test_inference_stays_free_of_autograd() -> None:
    """A kernel for gradients costs every call several microseconds: what decodes tokens has none."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for overload in ("output", "output_heads_first"):
        assert not registered(f"attnrb::attention.{overload}", "Autograd")
        assert not registered(f"attnrb::attention.{overload}", "ADInplaceOrView")
    assert registered("attnrb::attention", "Autograd")
    assert registered("attnrb::attention_training", "Autograd")


def test_the_op_itself_refuses_what_makes_no_sense() -> None:
    operands = tensors()
    for options, pattern in (
        ({**lists(1)}, "gain: expected a tensor where indices is given, got None"),
        ({"gain": torch.ones(4)}, "indices: expected a tensor where counts or gain is given, got None"),
        ({**lists(1), "gain": torch.ones(4), "rule": 3}, r"rule: expected 0 \(none\), 1 \(row\) or 2 \(rest\), got 3"),
        (
            {**lists(1), "gain": torch.tensor([-1.5]), "rule": 2},
            "gain: expected finite numbers of at least -1, got -1.5",
        ),
        ({"first_query": torch.tensor([1, 2])}, "first_query: expected None where there is no key_bias"),
        ({"key_bias": torch.ones(3, 4, 5)}, r"key_bias: expected the shape .* with B = 2 and H = 4, got \[3, 4, 5\]"),
        ({"chunk": -1}, r"chunk: expected 0 \(no limit\) or a positive number, got -1"),
        ({"query_offset": 1, "query_offsets": torch.tensor([1, 2])}, "query_offset: expected None where query_offsets"),
    ):
        with pytest.raises(REFUSAL, match=pattern):
            ops.attention(*operands, **options)


# --------------------------------------------------------------------------------------------------- torch.compile


def layer(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, first: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    found = functional.attention(query, key, value, edit=Edit(key_bias=bias, first_query=first), emit=0.05)
    assert found.outliers is not None
    results: list[Tensor] = [found.output, found.lse, *found.outliers]
    for rule in RULES:
        edit = Edit(found.outliers, gain, rule, bias, first)
        results += functional.attention(query, key, value, edit=edit, visibility=Visibility(chunk=64))[:2]
    return tuple(results)


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    query, key, value = tensors(dtype, queries=queries, keys=keys)
    first = torch.randint(0, keys, (2,))
    return [query, key, value, torch.randn(2, 4, keys), first, torch.rand(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_whole(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    arguments = inputs(7, 12, dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for came, expected in zip(compiled(*arguments), layer(*arguments), strict=True):
        assert came.stride() == expected.stride()
        torch.testing.assert_close(came, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 0)


def test_one_graph_serves_every_length_span_and_strength() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for queries, keys in ((7, 12), (5, 31), (9, 150), (40, 400)):
            for _ in range(2):
                arguments = inputs(queries, keys)
                for came, expected in zip(compiled(*arguments), layer(*arguments), strict=True):
                    assert torch.equal(came, expected)


def test_numbers_may_be_dynamic() -> None:
    """Numbers may be symbols; a first query makes no graph of its own, a gain does, as torch has it with floats."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    query, *others = tensors()
    bias, shared = torch.randn(1, 1, 12), Outliers(*lists(1).values())

    def strengthened(query: Tensor, gain: float, gains: list[float]) -> Tensor:
        output = functional.attention(query, *others, edit=Edit(shared, gain, "row")).output
        return functional.attention(output.repeat(1, 1, 1, 2), *others, edit=Edit(shared, gains, "rest")).output

    def later(query: Tensor, first: int) -> Tensor:
        return functional.attention(query, *others, edit=Edit(key_bias=bias, first_query=first)).output

    compiled = torch.compile(strengthened, fullgraph=True, dynamic=True, backend="aot_eager")
    for gain in (0.1, 0.2, 0.3):
        gains = [gain, 0.5, 1.0, 0.0]
        assert torch.equal(compiled(query, gain, gains), strengthened(query, gain, gains))
    compiled = torch.compile(later, fullgraph=True, dynamic=True, backend=counter)
    for first in range(3, 12):
        assert torch.equal(compiled(query, first), later(query, first))
    assert counter.frame_count == 1


def test_an_edit_crosses_the_border_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    operands = tensors()

    def program(query: Tensor, key: Tensor, value: Tensor, edit: Edit) -> Tensor:
        return functional.attention(query, key, value, edit=edit).output

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for rule in RULES:
        edit = Edit(Outliers(*lists(1).values()), 0.5, rule, torch.randn(1, 1, 12), 4)
        assert torch.equal(compiled(*operands, edit), program(*operands, edit))


@pytest.mark.parametrize("rule", RULES)
def test_training_compiles(rule: str) -> None:
    torch._dynamo.reset()
    shared = Outliers(*lists(1).values())

    def loss(query: Tensor, key: Tensor, value: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        output, lse, _ = functional.attention(query, key, value, edit=Edit(shared, gain, rule, bias, 3))
        return (output**2).sum() + lse.sum()

    leaves = [each.requires_grad_() for each in (*tensors(), torch.rand(4), torch.randn(1, 4, 12))]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for came, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(came, eager, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------- autocast and autograd


def test_under_autocast_it_computes_in_its_dtype() -> None:
    query, key, value = tensors()
    edit = Edit(Outliers(*lists(1).values()), 0.5, "row", torch.randn(1, 1, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        came = functional.attention(query, key, value, edit=edit)
    halves = (each.bfloat16() for each in (query, key, value))
    expected = functional.attention(*halves, edit=edit)
    assert came.output.dtype == torch.bfloat16
    assert torch.equal(came.output, expected.output)
    assert torch.equal(came.lse, expected.lse)


def test_gradients_reach_leaves_of_any_floating_dtype() -> None:
    query, key, value = tensors(torch.bfloat16)
    gain = torch.rand(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 1, 12, dtype=torch.bfloat16, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float16, requires_grad=True)
    edit = Edit(Outliers(*lists(1).values()), gain, "row", bias)
    functional.attention(query, key, value, edit=edit, sinks=sinks).output.float().sum().backward()
    for leaf in (gain, bias, sinks):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.any()


def test_a_second_derivative_raises_and_says_what_to_do() -> None:
    query, key, value = tensors()
    output = functional.attention(query.requires_grad_(), key, value, edit=Edit(key_bias=torch.zeros(1, 1, 12))).output
    (first,) = torch.autograd.grad((output**2).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*float64"):
        torch.autograd.grad(first.sum(), query)


# ----------------------------------------------------------------------------------------------------------- memory

LENGTH = 8192

WORKER = """
import torch
from attnrb import Edit, Outliers, functional

def run(length, rule):
    query = torch.randn(1, 2, length, 16, requires_grad=sys.argv[2] == "training")
    key = torch.randn(2, 1, 1, length, 16)
    slots = torch.arange(5, 25, dtype=torch.int32).expand(1, 2, 1, -1).contiguous()
    bias = torch.randn(1, 2, length, requires_grad=query.requires_grad)
    edit = Edit(Outliers(slots, torch.full((1, 2, 1), 20, dtype=torch.int32)), 0.5, rule, bias, length // 2)
    output = functional.attention(query, *key, edit=edit, emit=0.01).output
    if query.requires_grad:
        output.sum().backward()

torch.set_num_threads(2)
for rule in ("none", "row", "rest"):
    run(64, rule)
before = peak()
for rule in ("none", "row", "rest"):
    run(int(sys.argv[1]), rule)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["inference", "training"])
def test_no_matrix_of_all_queries_and_keys(what: str) -> None:
    """Not even one byte for each pair, in one head."""
    assert growth(WORKER, LENGTH, what) < LENGTH * LENGTH
