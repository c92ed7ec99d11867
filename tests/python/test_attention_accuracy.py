"""Edited attention, drawn at random over every option, against the NumPy reference and dense float64 autograd.

The tolerance is that of Note: [Earned tolerance of edits].
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from attnrb import functional, reference
from attnrb.ops import attention
from edited_problems import DTYPES, RULES, Dense, EditedProblem, random_problem
from numpy.typing import NDArray
from tolerance import error, one_rounding
from torch import Tensor

CONFIGURATIONS = 360
SAMPLE = int(os.environ.get("ATTNRB_TEST_GRADIENT_SAMPLE", "1"))  # one in so many, prime to rules times dtypes
SEEDS = range(0, CONFIGURATIONS, SAMPLE)
REPEATS = 3  # draws over which PyTorch's errors are taken: the largest of a few rows is a matter of luck


def run(problem: EditedProblem, leaves: dict[str, Tensor]) -> Any:
    """The problem by attnrb: sinks, gain and bias are those among the leaves."""
    options = problem.options | {"sinks": leaves.get("sinks")}
    operands = (leaves[name] for name in ("query", "key", "value"))
    return functional.attention(*operands, edit=problem.edit(leaves), emit=problem.emit, **options)


def own_leaves(problem: EditedProblem) -> dict[str, Tensor]:
    """Leaves whose query, key and value keep their layouts."""
    leaves = problem.leaves(problem.query.dtype)
    return leaves | {name: getattr(problem, name).detach().requires_grad_() for name in ("query", "key", "value")}


def truth_of(problem: EditedProblem) -> tuple[dict[str, Tensor], Dense, dict[str, Tensor]]:
    """Gradients and parts in float64, and the magnitudes of their roundings."""
    gradients, dense = problem.gradients(torch.float64)
    return gradients, dense, problem.magnitudes(dense)


def lse_magnitude(problem: EditedProblem, dense: Dense, lse: NDArray[np.float64]) -> NDArray[np.float64]:
    """An absolute error of a log-sum-exp is a relative one of every weight; its last digit may be worth more.

    With the rule ``row`` it has the logarithm of z in it, whose error is that of z over z.
    """
    size = np.maximum(1.0, np.abs(np.where(np.isinf(lse), 0.0, lse)))
    if problem.rule == "row" and problem.gain is not None:
        gain = problem.gain.double().view(1, -1, 1, 1)
        z = dense.rest + (1 + gain) * dense.mass
        size = np.maximum(size, ((1 + gain.abs() * dense.mass) / z).detach().numpy()[..., 0])
    return size


def own_errors(problem: EditedProblem) -> dict[str, float]:
    """The largest errors of PyTorch's own: of the output, the log-sum-exp, and any gradient."""
    truth, dense, magnitudes = truth_of(problem)
    dtype = problem.query.dtype
    gradients, low = problem.gradients(dtype)
    seeing = problem.seen.any(-1)
    lse = dense.lse.detach()[seeing].numpy()
    found = [gradients, problem.from_stored(dtype)]
    return {
        "output": error(low.output.detach(), dense.output.detach().numpy(), magnitudes["output"].numpy()),
        "lse": error(
            low.lse.detach()[seeing], lse, lse_magnitude(problem, dense, dense.lse.detach().numpy())[seeing.numpy()]
        ),
        "gradients": max(
            error(each, truth[name].numpy(), magnitudes[name].numpy()) for own in found for name, each in own.items()
        ),
    }


def earned(seed: int, repeats: int = REPEATS) -> dict[str, float]:
    draws = [own_errors(random_problem(seed, repeat)) for repeat in range(repeats)]
    worst = {name: max(draw[name] for draw in draws) for name in draws[0]}
    assert all(math.isfinite(each) for each in worst.values()), "this problem earns no tolerance"
    return worst


def assert_within(name: str, off: float, own: float, dtype: torch.dtype) -> None:
    allowed = 2 * own + one_rounding(dtype)
    assert off <= allowed, f"{name}: error {off:.3g}, allowed {allowed:.3g} (PyTorch's own {own:.3g})"


def check(problem: EditedProblem, own: dict[str, float]) -> None:
    """Run it forward and backward by attnrb, and compare everything that comes."""
    truth, dense, magnitudes = truth_of(problem)
    leaves = own_leaves(problem)
    expected = reference.attention(
        problem.query, problem.key, problem.value, edit=problem.edit(), emit=problem.emit, **problem.options
    )
    output, lse, outliers = run(problem, leaves)
    assert (output.dtype, lse.dtype) == (problem.query.dtype, torch.promote_types(torch.float32, lse.dtype))
    assert torch.isfinite(output).all()
    size = magnitudes["output"].numpy()
    assert_within("output", error(output.detach(), expected[0], size), own["output"], output.dtype)
    seeing = problem.seen.any(-1)
    assert (lse[~seeing] == -torch.inf).all()
    size = lse_magnitude(problem, dense, expected[1])[seeing.numpy()]
    assert_within("lse", error(lse.detach()[seeing], expected[1][seeing.numpy()], size), own["lse"], lse.dtype)
    if problem.emit is None:
        assert outliers is None
    else:
        check_outliers(problem, outliers)
    targets, upstream = [output], [problem.upstream.to(output)]
    if problem.upstream_lse is not None:
        targets, upstream = [output, lse], [*upstream, problem.upstream_lse.to(lse) * seeing]
    found = torch.autograd.grad(targets, list(leaves.values()), upstream)
    for (name, leaf), came in zip(leaves.items(), found, strict=True):
        assert (came.shape, came.dtype) == (leaf.shape, leaf.dtype), name
        assert torch.isfinite(came).all(), name
        off = error(came, truth[name].numpy(), magnitudes[name].numpy())
        assert_within(f"gradient of {name}", off, own["gradients"], came.dtype)


def check_outliers(problem: EditedProblem, outliers: Any) -> None:
    """Those of the softmax with the bias and without the rule, but for weights within a rounding of the threshold."""
    edit, options, threshold = problem.edit(), problem.options, problem.emit
    bias = {} if edit is None else {"key_bias": edit.key_bias, "first_query": edit.first_query}
    weights, _ = reference.attention_weights(problem.query, problem.key, **bias, **options)
    queries, keys = weights.shape[2:]
    seeing = reference.resolve_visibility(queries, keys, options["visibility"])
    offsets = {"query_offset": seeing.query_offset, "key_offset": seeing.key_offset}
    expected = reference.outlier_mask(weights, threshold, **offsets)
    shape = (*weights.shape[:3], reference.outlier_capacity(threshold, keys))
    assert (tuple(outliers.indices.shape), outliers.indices.dtype) == (shape, torch.int32)
    assert (tuple(outliers.counts.shape), outliers.counts.dtype) == (shape[:3], torch.int32)
    filled = torch.arange(shape[3]) < outliers.counts[..., None]
    assert (outliers.indices[~filled] == -1).all()
    assert (outliers.indices.diff()[filled[..., 1:]] > 0).all(), "slots ascend"
    found = reference.held_mask(*outliers, np.ones_like(expected), seeing.key_offset)
    margin = 1e-5 if problem.query.dtype in (torch.float32, torch.float64) else one_rounding(problem.query.dtype)
    different = found != expected
    assert (np.abs(weights - threshold)[different] <= margin * threshold).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_edited_attention_is_as_accurate_as_pytorch(seed: int) -> None:
    check(random_problem(seed), earned(seed))


@pytest.mark.parametrize("seed", range(0, CONFIGURATIONS, 7 * SAMPLE))
def test_the_dense_path_is_as_accurate(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves devices without native ops, in the dtypes that have them here."""
    monkeypatch.setattr(attention, "native", lambda query: False)
    check(random_problem(seed), earned(seed))


@pytest.mark.parametrize("seed", range(0, CONFIGURATIONS, 5 * SAMPLE))
def test_float64_is_the_reference(seed: int) -> None:
    check(random_problem(seed, dtype=torch.float64), dict.fromkeys(("output", "lse", "gradients"), 1e-13))


def test_the_problems_reach_every_option() -> None:
    problems = [random_problem(seed) for seed in range(CONFIGURATIONS)]

    def share(holds: Any) -> float:
        return sum(bool(holds(problem)) for problem in problems) / len(problems)

    for rule in RULES:
        for dtype in DTYPES:
            assert share(lambda p, r=rule, d=dtype: p.rule == r and p.query.dtype == d and p.outliers) > 0.07
    for name, holds in {
        "shared lists": lambda p: p.outliers and p.outliers.counts.shape[2] == 1 < p.query.shape[2],
        "lists for rows": lambda p: p.outliers and p.outliers.counts.shape[2] == p.query.shape[2] > 1,
        "one gain": lambda p: p.gain is not None and len(p.gain) == 1,
        "a bias alone": lambda p: p.key_bias is not None and p.outliers is None,
        "a bias and outliers": lambda p: p.key_bias is not None and p.outliers,
        "keys removed": lambda p: p.key_bias is not None and p.key_bias.isneginf().any(),
        "a bias for each sequence": lambda p: p.key_bias is not None and p.key_bias.shape[0] > 1,
        "a bias for each head": lambda p: p.key_bias is not None and p.key_bias.shape[1] > 1,
        "one first query": lambda p: isinstance(p.first_query, int),
        "first queries": lambda p: isinstance(p.first_query, Tensor),
        "emitting": lambda p: p.emit is not None and p.edit() is not None,
        "offsets": lambda p: p.options["visibility"] and isinstance(p.options["visibility"].query_offset, Tensor),
        "chunks": lambda p: p.options["visibility"] and p.options["visibility"].chunk,
        "softcap": lambda p: p.options["softcap"],
        "sinks": lambda p: p.options["sinks"] is not None,
        "sinks and the rest": lambda p: p.options["sinks"] is not None and p.rule == "rest" and p.outliers,
        "decoding": lambda p: p.query.shape[2] == 1,
        "groups": lambda p: p.query.shape[1] > p.key.shape[1],
        "another width of values": lambda p: p.query.shape[3] != p.value.shape[3],
        "a gradient of the log-sum-exp": lambda p: p.upstream_lse is not None,
        "rows that see nothing": lambda p: not p.seen.any(-1).all(),
        "rows of outliers only": lambda p: p.outliers and (p.held == p.seen).all(-1).logical_and(p.seen.any(-1)).any(),
    }.items():
        assert share(holds) > 0.03, name
