"""`torch.func` and forward differentiation through the functions and patched models: right tangents, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attnrb
import pytest
import torch
from attnrb import functional
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

# Results are float32 sums of order 1 in another order than the float64 ones: some hundred roundings of 6e-8.
LIKE = {"rtol": 1e-4, "atol": 1e-4}


def operands(seed: int, heads: int = 4, key_heads: int = 2, rows: int = 5, keys: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(2, heads, rows, 8), draw(2, key_heads, keys, 8), draw(2, key_heads, keys, 6)


def outliers(query: Tensor, key: Tensor, value: Tensor) -> attnrb.Outliers:
    return functional.source_attention(query.float(), key.float(), value.float(), threshold=0.15)[2]


def functions(seed: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Of each operation a function of query, key and value with some of its options."""
    found = outliers(*operands(seed))
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    bias = torch.linspace(-2, 1, 7, dtype=torch.float32).expand(1, 1, 7)
    gain = torch.tensor([0.5, 0.0, 2.0, -0.3], dtype=torch.float32)

    def edited(rule: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        edit = attnrb.ops.edit.Edit(outliers=found, gain=gain, rule=rule, key_bias=bias, first_query=3)
        return lambda q, k, v: functional.attention(q, k, v, edit=edit, sinks=sinks, softcap=3.0).output

    return {
        "source": lambda q, k, v: functional.source_attention(q, k, v, threshold=0.1, visibility=None)[0],
        "lse": lambda q, k, v: functional.source_attention(q, k, v, threshold=0.1)[1],
        "rebalanced": lambda q, k, v: functional.rebalanced_attention(q, k, v, found, gain, normalize=True),
        "none": edited("none"),
        "row": edited("row"),
        "rest": edited("rest"),
        "received": lambda q, k, v: functional.received_attention(q, k, sinks=sinks) * v.mean(),
    }


NAMES = sorted(functions(0))


def at(dtype: torch.dtype, operand: int, values: tuple[Tensor, ...]) -> tuple[Tensor, Callable[..., Tensor]]:
    """One operand in a dtype, and what puts it among the others."""
    rest = [each.to(dtype) for each in values]
    return rest[operand], lambda x: tuple(x if place == operand else each for place, each in enumerate(rest))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
class TestFunctions:
    def expected(self, name: str, operand: int, seed: int) -> Tensor:
        """The Jacobian in float64, where the functions are plain PyTorch: backward, one output at a time."""
        values = operands(seed)
        function = functions(seed)[name]
        with torch.enable_grad():
            x = values[operand].clone().requires_grad_()
            flat = function(*at(torch.float64, operand, values)[1](x)).flatten()
            if not flat.requires_grad:  # the log-sum-exp knows nothing of values
                return torch.zeros(flat.numel(), *x.shape, dtype=torch.float64)
            rows = [torch.autograd.grad(each, x, retain_graph=True, allow_unused=True)[0] for each in flat]
        return torch.stack([torch.zeros_like(x) if row is None else row for row in rows]).detach()

    @pytest.mark.slow
    def test_every_mode(self, name: str, operand: int, seed: int) -> None:
        values = operands(seed)
        x, put = at(torch.float32, operand, values)
        function = functions(seed)[name]
        expected = self.expected(name, operand, seed)
        outputs = expected.shape[0]
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        tangent = torch.einsum("oabcd,abcd->o", expected, direction.double())

        def call(x: Tensor) -> Tensor:
            return function(*put(x)).flatten().float()

        def close(found: Tensor, wanted: Tensor) -> None:
            torch.testing.assert_close(found.double(), wanted, **LIKE)

        close(jvp(call, (x,), (direction,))[1], tangent)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent
        close(torch.zeros(outputs) if dual is None else dual, tangent)
        close(jacfwd(call)(x).reshape(expected.shape), expected)
        close(jacrev(call)(x).reshape(expected.shape), expected)
        close(grad(lambda x: call(x).sum())(x), expected.sum(0))
        close(vmap(grad(lambda x: call(x).sum()))(torch.stack([x, x])), expected.sum(0).expand(2, *x.shape))
        both = torch.stack([x, 2 * x])
        wide, put_wide = at(torch.float64, operand, values)
        close(vmap(call)(both), torch.stack([function(*put_wide(n * wide)).flatten() for n in (1, 2)]))


@pytest.mark.parametrize("name", ["source", "row", "rest"])
def test_second_derivatives_under_transforms(name: str) -> None:
    values = [each[:1, :, :2, :3] for each in operands(3, heads=4, rows=2, keys=7)]
    function = functions(3)["source"] if name == "source" else None
    found = outliers(*operands(3))
    few = attnrb.Outliers(found.indices[:1, :, :2], found.counts[:1, :, :2])

    def of(x: Tensor, dtype: torch.dtype) -> Tensor:
        _, key, value = (each.to(dtype) for each in values)
        if function is not None:
            return function(x, key, value).sin().sum()
        edit = attnrb.ops.edit.Edit(outliers=few, gain=0.5, rule=name)
        return functional.attention(x, key, value, edit=edit).output.sin().sum()

    wanted = torch.autograd.functional.hessian(lambda x: of(x, torch.float64), values[0])
    found_hessian = hessian(lambda x: of(x, torch.float32))(values[0].float())
    torch.testing.assert_close(found_hessian.double(), wanted, **LIKE)


def test_weights_in_memory_under_transforms() -> None:
    weights = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = weights > 0.5
    gain = torch.tensor([0.5, -0.2])

    def call(x: Tensor) -> Tensor:
        return functional.rebalance(x, mask, gain, normalize=True)

    wanted = torch.autograd.functional.jacobian(call, weights)
    for transform in (jacfwd, jacrev):
        torch.testing.assert_close(transform(call)(weights.float()).double(), wanted, **LIKE)
    assert functional.rebalance(weights.bfloat16(), mask, gain).dtype == torch.bfloat16
    assert vmap(lambda x: functional.rebalance(x, mask, gain))(weights.bfloat16()[None]).dtype == torch.bfloat16
    marked = vmap(lambda x: functional.outlier_mask(x, 0.5))(weights.float()[None])[0]
    assert torch.equal(marked, functional.outlier_mask(weights.float(), 0.5))


def test_the_older_ops_differentiate_as_the_functions_do() -> None:
    found = outliers(*operands(5))
    sinks = torch.linspace(-1, 1, 4)
    options: tuple[Any, ...] = (True, 2, 0, 0, None, None, None, 8**-0.5, 2.0)
    weigh = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))

    def gradients(of: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [each.float().requires_grad_() for each in operands(5)]
        inputs += [sinks.clone().requires_grad_(), torch.tensor([0.5, 0.0, 2.0, -0.3], requires_grad=True)]
        (of(*inputs) * weigh).sum().backward()
        return [torch.zeros_like(each) if each.grad is None else each.grad for each in inputs]

    ops = torch.ops.attnrb
    pairs = [
        (
            lambda q, k, v, s, g: ops.source_attention(q, k, v, 0.1, *options, s)[0],
            lambda q, k, v, s, g: functional.source_attention(q, k, v, threshold=0.1, sinks=s, softcap=2.0)[0],
        ),
        (
            lambda q, k, v, s, g: ops.source_attention(q, k, v, 0.1, *options, s)[1][..., None] * weigh,
            lambda q, k, v, s, g: (
                functional.source_attention(q, k, v, threshold=0.1, sinks=s, softcap=2.0)[1][..., None] * weigh
            ),
        ),
    ]
    for normalize in (False, True):
        pairs.append(
            (
                lambda q, k, v, s, g, n=normalize: ops.rebalanced_attention(q, k, v, *found, g, n, *options, s),
                lambda q, k, v, s, g, n=normalize: functional.rebalanced_attention(
                    q, k, v, found, g, normalize=n, sinks=s, softcap=2.0
                ),
            )
        )
    for op, function in pairs:
        for mine, theirs in zip(gradients(op), gradients(function), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        query, key, value = (each.float() for each in operands(5))
        assert not ops.source_attention(query, key, value, 0.1, *options, sinks)[0].requires_grad


# ------------------------------------------------------------------------------------------------ a patched model


def test_a_patched_model_under_transforms() -> None:
    pytest.importorskip("transformers")
    from saved_tiny_model import tiny_model
    from torch.func import functional_call

    model = tiny_model()
    ids = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.self_attn.q_proj.weight"
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        found: Tensor = functional_call(model, weights, (), inputs).loss
        return found

    def one(row: Tensor, model: Any = model) -> Tensor:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        found: Tensor = dict(model.named_parameters())[name].grad.clone()
        return found

    with attnrb.patch(model, attnrb.RebalanceConfig(alpha=2.0, threshold=0.05)):
        wanted = torch.stack([one(row) for row in ids])
        each = torch.stack([grad(loss)(weights, row)[name] for row in ids])
        together = vmap(grad(loss), in_dims=(None, 0))(weights, ids)[name]
        direction = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(2))
        tangent = jvp(lambda w: loss({**weights, name: w}, ids[0]), (weights[name],), (direction,))[1]
    scale = wanted.abs().max()
    torch.testing.assert_close(each / scale, wanted / scale, **LIKE)
    torch.testing.assert_close(together / scale, wanted / scale, **LIKE)
    torch.testing.assert_close(tangent / scale, (wanted[0] * direction).sum() / scale, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(wanted, torch.stack([one(row) for row in ids]))  # re-balancing counted


OLDER: tuple[Any, ...] = (True, 2, 0, 0, None, None, None, 8**-0.5, 0.0, None)


def raw_ops() -> dict[
    str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]
]:
    """Of each op by its own name a call of it, and of the function that computes the same."""
    ops, found, gain = torch.ops.attnrb, outliers(*operands(7)), torch.tensor([0.5])
    lists = {"indices": found.indices, "counts": found.counts, "gain": gain}

    def rebalanced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.rebalanced_attention(q, k, v, found, 0.5)

    def received(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.received_attention(q, k)

    return {
        "attention": (lambda q, k, v: ops.attention(q, k, v, **lists)[0], rebalanced),
        "output": (lambda q, k, v: ops.attention.output(q, k, v, **lists).transpose(1, 2), rebalanced),
        "output_heads_first": (lambda q, k, v: ops.attention.output_heads_first(q, k, v, **lists), rebalanced),
        "training": (lambda q, k, v: ops.attention_training(q, k, v, **lists)[0], rebalanced),
        "source": (
            lambda q, k, v: ops.source_attention(q, k, v, 0.15, *OLDER)[0],
            lambda q, k, v: functional.source_attention(q, k, v, threshold=0.15)[0],
        ),
        "rebalanced": (
            lambda q, k, v: ops.rebalanced_attention(q, k, v, *found, gain, False, *OLDER),
            rebalanced,
        ),
        "received": (lambda q, k, v: ops.received_attention(q, k, *OLDER), received),
        "edited": (lambda q, k, v: ops.received_attention.edited(q, k, *OLDER), received),
        "rebalance": (
            lambda q, k, v: ops.rebalance(q.softmax(-1), q > 0, 0.3, True),
            lambda q, k, v: functional.rebalance(q.softmax(-1), q > 0, 0.3, normalize=True),
        ),
    }


@pytest.mark.parametrize("name", raw_ops())
def test_ops_by_their_own_names(name: str) -> None:
    op, function = raw_ops()[name]
    query, key, value = (each.float() for each in operands(7))
    exact = [each.double() for each in (key, value)]
    weigh = torch.randn(function(query, key, value).shape, generator=torch.Generator().manual_seed(2))

    def of(x: Tensor) -> Tensor:
        return (op(x, key, value) * weigh).sum()

    leaf = query.double().requires_grad_()
    (wanted,) = torch.autograd.grad((function(leaf, *exact) * weigh).sum(), leaf)
    along = torch.randn(query.shape, generator=torch.Generator().manual_seed(3))
    slope = (wanted * along).sum()
    for transformed in (grad(of)(query), jacrev(of)(query), jacfwd(of)(query), vmap(grad(of))(query[None])[0]):
        torch.testing.assert_close(transformed.double(), wanted, **LIKE)
    torch.testing.assert_close(jvp(of, (query,), (along,))[1].double(), slope, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(vmap(op)(query[None], key[None], value[None])[0], op(query, key, value), **LIKE)
    if name.startswith("output"):  # they serve short calls, without a gradient outside of transforms
        return
    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(of(leaf), leaf)[0].double(), wanted, **LIKE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, along)
        if name in ("attention", "received", "edited"):
            tangent = forward_ad.unpack_dual(of(dual)).tangent
            torch.testing.assert_close(tangent.double(), slope, rtol=1e-4, atol=1e-3)
        else:
            with pytest.raises(NotImplementedError, match="no forward differentiation by dual tensors"):
                of(dual)


def test_a_compiled_function_has_the_same_tangent() -> None:
    query, key, value = (each.float() for each in operands(9))

    def of(x: Tensor) -> Tensor:
        return functional.attention(x, key, value).output.pow(2).sum()

    wanted = jvp(of, (query,), (query,))[1]
    within = torch.compile(lambda x: jvp(of, (x,), (x,))[1], backend="aot_eager")
    torch.testing.assert_close(within(query), wanted, **LIKE)
    around = torch.compile(of, backend="aot_eager")
    torch.testing.assert_close(jvp(around, (query,), (query,))[1], wanted, **LIKE)
