"""What else must hold of gradients: exact zeros, no NaN from padding, the same bits every time, and torch's rules."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from attnrb import Outliers, Visibility, functional, reference
from cases import sample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.emulated

ops = torch.ops.attnrb
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
REPEATS = int(os.environ.get("ATTNRB_TEST_REPEATS", "50"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(
    dtype: torch.dtype = torch.float32, *, queries: int = 150, keys: int = 150, width: int = 24
) -> list[Tensor]:
    sizes = ((2, 4, queries, width), (2, 2, keys, width), (2, 2, keys, width))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


def everything(query: Tensor, key: Tensor, value: Tensor, outliers: Outliers, **options: Any) -> Tensor:
    """A loss in which all three ops take part, with a learnable gain."""
    output, lse, _ = functional.source_attention(query, key, value, **options)
    below = functional.rebalanced_attention(query, key, value, outliers, 0.3, **options)
    normalised = functional.rebalanced_attention(query, key, value, outliers, 0.3, normalize=True, **options)
    received = functional.received_attention(query, key, **options)
    shown = torch.where(torch.isfinite(lse), lse, 0.0)
    total: Tensor = sum((x.float() ** 2).sum() for x in (output, shown, below, normalised, received * 30))  # type: ignore[assignment]
    return total


def outliers_of(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Outliers:
    with torch.no_grad():
        return functional.source_attention(query, key, value, **options)[2]


# ----------------------------------------------------------------------------------------------- zeros, and no NaN


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_padding_reaches_no_gradient(dtype: torch.dtype) -> None:
    leaves = tensors(dtype)
    options: dict[str, Any] = {
        "visibility": Visibility(key_start=torch.tensor([0, 40]), key_end=torch.tensor([130, 150])),
        "sinks": torch.randn(4),
    }
    outliers = outliers_of(*leaves, **options)
    expected = torch.autograd.grad(everything(*leaves, outliers, **options), leaves)
    query, key, value = (leaf.detach().clone() for leaf in leaves)
    for rows in (key, value):
        rows[0, :, 130:] = NAN
        rows[1, :, :40] = NAN
    query[1, :, :40] = NAN  # left padding sees nothing; queries behind the end still see the keys before it
    poisoned = [x.requires_grad_() for x in (query, key, value)]
    found = torch.autograd.grad(everything(*poisoned, outliers, **options), poisoned)
    for came, clean in zip(found, expected, strict=True):
        assert torch.equal(came, clean)
    grad_query, grad_key, grad_value = found
    assert not grad_query[1, :, :40].any()
    for gradient in (grad_key, grad_value):
        assert not gradient[0, :, 130:].any()
        assert not gradient[1, :, :40].any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_what_is_masked_has_a_gradient_of_exactly_zero(dtype: torch.dtype) -> None:
    leaves = tensors(dtype, queries=20, keys=30)
    mask = torch.rand(2, 1, 20, 30) > 0.3
    mask[0, :, 3:5] = False  # queries that see nothing
    mask[..., 7] = False  # a key that no query sees
    options = {"visibility": Visibility(mask=mask)}
    outliers = outliers_of(*leaves, **options)
    query, key, value = torch.autograd.grad(everything(*leaves, outliers, **options), leaves)
    assert not query[0, :, 3:5].any()
    assert not key[:, :, 7].any()
    assert not value[:, :, 7].any()
    assert query[0, :, 6].any()


def test_a_nan_stays_with_those_who_see_it() -> None:
    query, key, value = tensors(queries=60, keys=60)
    with torch.no_grad():
        key[:, :, 30] = NAN
    output = functional.source_attention(query, key, value)[0]
    grad_query, _, grad_value = torch.autograd.grad(output[:, :, :30].sum(), (query, key, value), retain_graph=True)
    assert torch.isfinite(grad_query).all(), "queries before it do not see it"
    assert torch.isfinite(grad_value).all()
    (grad_query,) = torch.autograd.grad(output.sum(), query)
    assert torch.isnan(grad_query[:, :, 30:]).all()
    assert torch.isfinite(grad_query[:, :, :30]).all()


# -------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_repeat_bit_by_bit_on_one_thread_and_two(dtype: torch.dtype) -> None:
    leaves = tensors(dtype, queries=300, keys=400) if REPEATS > 2 else tensors(dtype, queries=70, keys=90)
    outliers = outliers_of(*leaves)
    first: list[Tensor] | None = None
    for repeat in range(REPEATS):
        torch.set_num_threads(1 + repeat % 2)
        found = torch.autograd.grad(everything(*leaves, outliers), leaves)
        first = first or list(found)
        for came, expected in zip(found, first, strict=True):
            assert torch.equal(came, expected), f"repeat {repeat}"


@pytest.mark.autograd
def test_several_forwards_before_one_backward() -> None:
    first, second = tensors(), tensors()
    loss = everything(*first, outliers_of(*first)) + everything(*second, outliers_of(*second))
    together = torch.autograd.grad(loss, [*first, *second])
    apart = [
        gradient
        for leaves in (first, second)
        for gradient in torch.autograd.grad(everything(*leaves, outliers_of(*leaves)), leaves)
    ]
    for came, expected in zip(together, apart, strict=True):
        assert torch.equal(came, expected)


# ------------------------------------------------------------------------------------------------- torch's rules

VISIBILITY: dict[str, Any] = {"causal": True, "query_offset": 3}


def training_cases() -> list[Any]:
    """(op, tensors, options) of the ops that have a gradient."""
    torch.manual_seed(2)
    found = []
    for dtype in DTYPES:
        query, key, value = tensors(dtype, queries=6, keys=9, width=8)
        outliers = outliers_of(query, key, value, threshold=0.05)
        lists = {"indices": outliers.indices, "counts": outliers.counts}
        for score in ({"scale": 0.4}, {"scale": 0.4, "softcap": 3.0, "sinks": torch.randn(4).requires_grad_()}):
            gain = torch.rand(4 if "sinks" in score else 1).requires_grad_()
            name = f"{str(dtype)[6:]}-{'sinks' if 'sinks' in score else 'plain'}"
            options = VISIBILITY | score
            older = (True, 3, 0, 0, None, None, None, 0.4, score.get("softcap", 0.0), score.get("sinks"))
            attention, received = ops.attention_training.default, ops.received_attention_training.default
            for kind, op, operands, given in (
                ("source", attention, (query, key, value), {"emit": 0.05, **options}),
                ("rebalanced", attention, (query, key, value), {**lists, "gain": gain, "rule": 1, **options}),
                ("received", received, (query, key, *older), {}),
            ):
                found.append(pytest.param(op, operands, given, id=f"{kind}-{name}"))
    return found


@pytest.mark.parametrize(("op", "operands", "options"), training_cases())
@pytest.mark.slow
def test_opcheck_forward(op: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.library.opcheck(op, operands, options)


@pytest.mark.parametrize(("op", "operands", "options"), training_cases())
@pytest.mark.slow
def test_opcheck_backward(op: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> None:
    operands = tuple(each.detach() if isinstance(each, Tensor) else each for each in operands)
    options = {name: each.detach() if isinstance(each, Tensor) else each for name, each in options.items()}
    results = op(*operands, **options)
    if "received" in str(op):
        backward, arguments = ops.received_attention_backward.default, (*operands[:2], results[1], *operands[2:])
    else:
        backward = ops.attention_backward.default
        options.pop("emit", None)
        arguments = (torch.randn_like(results[1]), *operands, *results[:2])
    arguments = (torch.randn_like(results[0]), *arguments)
    torch.library.opcheck(backward, arguments, options)
    real = backward(*arguments, **options)
    shapes = [each.to("meta") if isinstance(each, Tensor) else each for each in arguments]
    fake = backward(
        *shapes, **{n: each.to("meta") if isinstance(each, Tensor) else each for n, each in options.items()}
    )
    for told, came in zip(fake, real, strict=True):
        assert (told.shape, told.dtype, told.stride()) == (came.shape, came.dtype, came.stride())


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((0, 3, 5), "batch"), ((2, 0, 5), "queries"), ((2, 3, 0), "keys")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_empty_operands_have_empty_or_zero_gradients(sizes: tuple[int, int, int], name: str) -> None:
    batch, queries, keys = sizes
    leaves = [torch.randn(batch, h, n, 8).requires_grad_() for h, n in ((4, queries), (2, keys), (2, keys))]
    outliers = outliers_of(*leaves)
    for leaf, gradient in zip(leaves, torch.autograd.grad(everything(*leaves, outliers), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_a_second_derivative_raises_and_says_what_to_do() -> None:
    leaves = tensors(queries=9, keys=9)
    outliers = outliers_of(*leaves)
    for function in (
        lambda q, k, v: functional.source_attention(q, k, v)[0],
        lambda q, k, v: functional.rebalanced_attention(q, k, v, outliers, 0.2),
        lambda q, k, v: functional.received_attention(q, k) + 0 * v.sum(),
    ):
        (first,) = torch.autograd.grad((function(*leaves) ** 2).sum(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"no second derivative.*float64"):
            torch.autograd.grad(first.sum(), leaves[0])


class NoGradient(torch.autograd.Function):
    """Passes its input on, and leaves its gradient undefined, which is not the same as zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@pytest.mark.parametrize("of", ["output", "lse", "both"])
@pytest.mark.autograd
def test_the_older_op_has_the_gradients_of_its_function(of: str) -> None:
    leaves = tensors(queries=9, keys=9)
    older = (True, 0, 0, 0, None, None, None, 0.2, 0.0, None)
    found = ops.source_attention(*leaves, 0.01, *older)[:2]
    expected = functional.source_attention(*leaves, threshold=0.01, scale=0.2)[:2]
    chosen = {"output": slice(0, 1), "lse": slice(1, 2), "both": slice(0, 2)}[of]
    upstream = [torch.randn_like(each) for each in found[chosen]]
    came = torch.autograd.grad(found[chosen], leaves, upstream, allow_unused=True)
    wanted = torch.autograd.grad(expected[chosen], leaves, upstream, allow_unused=True)
    for one, other in zip(came, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert came[0] is not None
    assert came[0].any()


@pytest.mark.parametrize("op", ["source", "rebalanced", "received", "attention", "older source", "older rebalanced"])
@pytest.mark.autograd
def test_an_undefined_gradient_stays_undefined(op: str) -> None:
    query, key, value = tensors(queries=9, keys=9)
    outliers, gain = outliers_of(query, key, value), torch.full((4,), 0.3)
    older = (True, 0, 0, 0, None, None, None, 0.2, 0.0, None)
    results = {
        "source": lambda: functional.source_attention(query, key, value)[0],
        "rebalanced": lambda: functional.rebalanced_attention(query, key, value, outliers, 0.3),
        "received": lambda: functional.received_attention(query, key),
        "attention": lambda: functional.attention(query, key, value).output,
        "older source": lambda: ops.source_attention(query, key, value, 0.01, *older)[0],
        "older rebalanced": lambda: ops.rebalanced_attention(query, key, value, *outliers, gain, False, *older),
    }
    NoGradient.apply(results[op]()).sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is key.grad is value.grad is None


def test_outliers_and_inference_carry_no_gradient() -> None:
    leaves = tensors(queries=9, keys=9)
    _, _, outliers = functional.source_attention(*leaves)
    assert not outliers.indices.requires_grad
    with torch.no_grad():
        assert not functional.source_attention(*leaves)[0].requires_grad
    frozen = [leaf.detach() for leaf in leaves]
    assert not functional.rebalanced_attention(*frozen, outliers, 0.2).requires_grad
    gain = torch.tensor(0.2, requires_grad=True)
    assert functional.rebalanced_attention(*frozen, outliers, gain).requires_grad


def test_sinks_of_any_dtype_get_their_gradient_in_it() -> None:
    query, key, value = (leaf.detach() for leaf in tensors(torch.bfloat16, queries=9, keys=9))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        sinks = torch.zeros(4, dtype=dtype, requires_grad=True)
        output = functional.source_attention(query, key, value, sinks=sinks)[0]
        found.append(torch.autograd.grad(output.float().sum(), sinks)[0])
        assert found[-1].dtype == dtype
    assert torch.equal(found[0].bfloat16(), found[1])


def test_one_gain_for_all_heads_gets_the_sum() -> None:
    query, key, value = (leaf.detach() for leaf in tensors(queries=40, keys=40))
    outliers = outliers_of(query, key, value)
    one, each = torch.tensor([0.2], requires_grad=True), torch.full((4,), 0.2, requires_grad=True)
    for gain in (one, each):
        functional.rebalanced_attention(query, key, value, outliers, gain).sum().backward()
    assert one.grad is not None
    assert each.grad is not None
    torch.testing.assert_close(one.grad, each.grad.sum(0, keepdim=True))


@pytest.mark.autograd
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant: bool) -> None:
    leaves = tensors()
    outliers = outliers_of(*leaves)
    expected = torch.autograd.grad(everything(*leaves, outliers), leaves)
    loss = checkpoint(partial(everything, outliers=outliers), *leaves, use_reentrant=use_reentrant)
    loss.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


def test_autocast_computes_in_its_dtype() -> None:
    leaves = tensors(queries=30, keys=30)
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    outliers = outliers_of(*low)
    mixed = [leaves[0], leaves[1], low[2]]  # as rotary embeddings and projections leave them
    with torch.autocast("cpu", torch.bfloat16):
        output = functional.rebalanced_attention(*mixed, outliers, 0.3)
    assert output.dtype == torch.bfloat16
    expected = functional.rebalanced_attention(*low, outliers, 0.3)
    assert torch.equal(output, expected)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, mixed, upstream)
    for came, clean in zip(found, torch.autograd.grad(expected, low, upstream), strict=True):
        assert torch.equal(came, clean.to(came.dtype))


@pytest.mark.autograd
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False), ("inductor", True)]
)
@pytest.mark.slow
def test_a_compiled_training_step_is_one_graph(backend: str, dynamic: bool) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs g++, which is not here")
    torch._dynamo.reset()

    def step(query: Tensor, key: Tensor, value: Tensor, gain: Tensor) -> Tensor:
        output, lse, outliers = functional.source_attention(query, key, value, threshold=0.05)
        below = functional.rebalanced_attention(output + query, key, value, outliers, gain, normalize=True)
        weights = functional.rebalance((query @ query.transpose(2, 3)).softmax(-1), mask, gain, normalize=True)
        received = functional.received_attention(query, key)
        return (below**2).sum() + lse.sum() + (received**2).sum() + (weights**2).sum()

    mask = torch.rand(20, 20) > 0.5

    leaves = [*tensors(queries=20, keys=30), torch.rand(4, requires_grad=True)]
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    expected = torch.autograd.grad(step(*leaves), leaves)
    for came, eager in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(came, eager)


# ------------------------------------------------------------------------------------------------------- float64


def double_leaves() -> tuple[list[Tensor], Tensor, Tensor]:
    sizes = ((2, 4, 4, 3), (2, 2, 5, 3), (2, 2, 5, 2))
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    gain = torch.rand(4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    return leaves, gain, sinks


@pytest.mark.slow
@pytest.mark.autograd
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vision", ["default", "rows that see nothing"])
def test_gradcheck_of_float64(softcap: float | None, vision: str) -> None:
    leaves, gain, sinks = double_leaves()
    visibility = None if vision == "default" else Visibility(key_start=torch.tensor([0, 4]))
    options: dict[str, Any] = {"softcap": softcap, "visibility": visibility}
    outliers = outliers_of(*leaves, threshold=0.1, **options)

    def source(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        output, lse, _ = functional.source_attention(q, k, v, sinks=s, **options)
        return output, torch.where(torch.isfinite(lse), lse, 0.0)

    def rebalanced(normalize: bool) -> Callable[..., Tensor]:
        return lambda q, k, v, s, g: functional.rebalanced_attention(
            q, k, v, outliers, g, normalize=normalize, sinks=s, **options
        )

    def received(q: Tensor, k: Tensor, s: Tensor) -> Tensor:
        return functional.received_attention(q, k, sinks=s, **options)

    query, key, value = leaves
    assert torch.autograd.gradcheck(source, (query, key, value, sinks))
    assert torch.autograd.gradcheck(rebalanced(False), (query, key, value, sinks, gain))
    assert torch.autograd.gradcheck(rebalanced(True), (query, key, value, sinks, gain))
    assert torch.autograd.gradcheck(received, (query, key, sinks))
    weights = torch.rand(1, 4, 3, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    mask = torch.rand(3, 5) > 0.5
    assert torch.autograd.gradcheck(lambda w, g: functional.rebalance(w, mask, g, normalize=True), (weights, gain))
    assert torch.autograd.gradgradcheck(rebalanced(False), (query, key, value, sinks, gain))


@pytest.mark.parametrize("case", sample(9), ids=lambda case: case.name)
def test_the_plain_path_is_the_reference(case: Any) -> None:
    inputs = case.build(torch.float64)
    options = inputs.options
    weights, lse = reference.attention_weights(inputs.query, inputs.key, **options)
    batch, heads, queries, keys = weights.shape
    seen = reference.visible(batch, heads, queries, keys, options["visibility"])
    resolved = reference.resolve_visibility(queries, keys, options["visibility"])
    output, found_lse, outliers = functional.source_attention(
        inputs.query, inputs.key, inputs.value, threshold=case.threshold, **options
    )
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(found_lse, lse)
    close(output, reference.weighted_values(weights, inputs.value, seen))
    close(
        functional.received_attention(inputs.query, inputs.key, **options),
        reference.received_attention(inputs.query, inputs.key, **options),
    )
    if case.name.startswith("flat"):
        return  # weights of exactly the threshold: rounding decides
    offsets = {"query_offset": resolved.query_offset, "key_offset": resolved.key_offset}
    mask = reference.outlier_mask(weights, case.threshold, **offsets)
    held = reference.held_mask(*outliers, seen, resolved.key_offset)
    assert (held == mask).all()
    for normalize in (False, True):
        boosted = functional.rebalanced_attention(
            inputs.query, inputs.key, inputs.value, outliers, 0.3, normalize=normalize, **options
        )
        expected, _ = reference.rebalanced_weights(weights, lse, mask, 0.3, normalize=normalize)
        close(boosted, reference.weighted_values(expected, inputs.value, seen))


def test_float64_is_refused_where_operands_differ() -> None:
    query, key, value = (leaf.detach() for leaf in tensors(torch.float64, queries=3, keys=3))
    with pytest.raises(TypeError, match=r"key: expected the dtype of query, torch\.float64"):
        functional.source_attention(query, key.float(), value)
    with pytest.raises(ValueError, match=r"key: expected \[B, Hk, N, D\] with B = 2 and D = 24"):
        functional.source_attention(query, key[..., :8], value)
    with pytest.raises(ValueError, match=r"value: expected \[B, Hk, N\] of key"):
        functional.source_attention(query, key, value[:, :, :2])
    with pytest.raises(ValueError, match=r"query: expected a number of heads"):
        functional.source_attention(query[:, :3], key, value)
