"""Gradients of the attention ops against dense float64 autograd (Note: [Earned tolerance of gradients])."""

from __future__ import annotations

import math
import os
import random
from typing import Any

import pytest
import torch
from attnrb import Outliers, Visibility, functional, reference
from cases import LAYOUTS
from gradient_oracle import Problem
from tolerance import error, one_rounding
from torch import Tensor

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 240
SAMPLE = int(os.environ.get("ATTNRB_TEST_GRADIENT_SAMPLE", "1"))  # one in so many, prime to kinds times dtypes
REPEATS = 3  # draws over which PyTorch's errors are taken: the largest of a few rows is a matter of luck
RARE = 12  # more of them, never left out of a sample: every kind in every dtype, with wide rows and a window
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("source", "rebalanced", "normalised", "received")


def visibility(draw: random.Random, batch: int, heads: int, queries: int, keys: int) -> Visibility | None:
    kind = draw.choice(
        ("default", "default", "all", "window", "offset", "start", "range", "mask", "heads mask", "both")
    )
    if kind == "default":
        return None
    if kind == "all":
        return Visibility(causal=False)
    if kind == "window":
        return Visibility(window=draw.randint(1, keys + 3))
    if kind == "offset":
        first = draw.randint(0, 50)
        return Visibility(query_offset=first + draw.randint(-5, keys), key_offset=first)
    if kind == "start":
        return Visibility(key_start=torch.tensor([draw.randint(0, keys) for _ in range(batch)]))
    if kind == "range":
        start = [draw.randint(0, keys) for _ in range(batch)]
        end = torch.tensor([draw.randint(low, keys) for low in start])
        return Visibility(causal=False, key_start=torch.tensor(start), key_end=end)
    shape = (batch, 1, queries, keys) if kind == "mask" else (heads, queries, keys)
    mask = torch.rand(shape) < draw.choice((0.1, 0.5, 0.9))
    return Visibility(mask=mask, causal=True if kind == "both" else None)


def random_problem(seed: int, repeat: int = 0) -> tuple[Problem, Outliers | None]:
    """Every option is on in some configurations and off in most. A `repeat` has other numbers in the same shapes."""
    draw = random.Random(seed)
    torch.manual_seed(seed + 10_000 * repeat)
    kind, dtype = KINDS[seed % 4], DTYPES[seed // 4 % 3]
    batch, key_heads, groups = draw.randint(1, 2), draw.randint(1, 2), draw.choice((1, 2, 3))
    heads = key_heads * groups
    queries, keys = draw.choice(((1, 40), (7, 90), (33, 33), (60, 60), (96, 97), (110, 110), (130, 260), (50, 20)))
    width = draw.choice((8, 16, 24, 37, 64, 128))
    value_width = width if draw.random() < 0.6 else draw.choice((1, 16, 40, 72))
    rare = seed >= CONFIGURATIONS
    if rare:
        width, value_width = draw.choice(((200, 150), (150, 280), (33, 260)))
    lay_out = LAYOUTS[draw.choice(list(LAYOUTS))]
    scale = None if draw.random() < 0.7 else draw.choice((0.3, -0.2))
    spread = draw.choice((0.5, 1.0, 2.0, 5.0)) / (abs(scale or width**-0.5) * math.sqrt(width))
    query = lay_out((torch.randn(batch, heads, queries, width) * spread).to(dtype))
    key = lay_out(torch.randn(batch, key_heads, keys, width).to(dtype))
    value = lay_out(torch.randn(batch, key_heads, keys, value_width).to(dtype))
    window = Visibility(window=draw.randint(2, keys)) if rare else None
    seen = window or visibility(draw, batch, heads, queries, keys)
    options: dict[str, Any] = {
        "scale": scale,
        "visibility": seen,
        "softcap": draw.choice((4.0, 30.0)) if draw.random() < 0.25 else None,
        "sinks": torch.randn(heads) if draw.random() < 0.25 else None,
    }
    if kind == "received":
        return Problem(kind, query, key, value, options, torch.randn(batch, heads, keys)), None
    upstream = lay_out(torch.randn(batch, heads, queries, value_width).to(dtype))
    if kind == "source":
        with_lse = torch.randn(batch, heads, queries) if draw.random() < 0.6 else None
        return Problem(kind, query, key, value, options, upstream, with_lse), None
    with torch.no_grad():
        outliers = functional.source_attention(query, key, value, threshold=draw.choice((0.01, 0.05)), **options)[2]
    problem = Problem("rebalanced", query, key, value, options, upstream, normalize=kind == "normalised")
    key_offset = 0 if options["visibility"] is None else options["visibility"].key_offset
    problem.held = torch.from_numpy(reference.held_mask(*outliers, problem.seen.numpy(), key_offset))
    problem.gain = torch.rand(heads) - 0.3
    return problem, outliers


def run(problem: Problem, outliers: Outliers | None) -> dict[str, Tensor]:
    """Gradients by attnrb."""
    leaves = {name: leaf for name, leaf in problem.leaves(problem.query.dtype).items() if name in ("gain", "sinks")}
    for name in ("query", "key", "value"):
        leaves[name] = getattr(problem, name).detach().requires_grad_()  # in its own layout
    options = problem.options | {"sinks": leaves.get("sinks")}
    if problem.kind == "received":
        del leaves["value"]
        received = functional.received_attention(leaves["query"], leaves["key"], **options)
        targets, upstream = [received], [problem.upstream]
    elif problem.kind == "source":
        output, lse, _ = functional.source_attention(leaves["query"], leaves["key"], leaves["value"], **options)
        targets, upstream = [output], [problem.upstream]
        if problem.upstream_lse is not None:
            targets, upstream = [output, lse], [problem.upstream, problem.upstream_lse]
    else:
        assert outliers is not None
        output = functional.rebalanced_attention(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            outliers,
            leaves["gain"],
            normalize=problem.normalize,
            **options,
        )
        targets, upstream = [output], [problem.upstream]
    return dict(zip(leaves, torch.autograd.grad(targets, list(leaves.values()), upstream), strict=True))


def own_error(problem: Problem) -> float:
    """The largest error of PyTorch's own gradients."""
    truth, magnitudes = problem.dense(torch.float64)
    dtype = problem.query.dtype
    return max(
        error(gradient, truth[name].numpy(), magnitudes[name].numpy())
        for own in (problem.dense(dtype)[0], problem.from_stored(dtype))
        for name, gradient in own.items()
    )


@pytest.mark.parametrize("seed", [*range(0, CONFIGURATIONS, SAMPLE), *range(CONFIGURATIONS, CONFIGURATIONS + RARE)])
def test_gradients_are_as_accurate_as_those_of_pytorch(seed: int) -> None:
    problem, outliers = random_problem(seed)
    found = run(problem, outliers)
    truth, magnitudes = problem.dense(torch.float64)
    assert found.keys() == truth.keys()
    earned = max(own_error(random_problem(seed, repeat)[0]) for repeat in range(REPEATS))
    assert math.isfinite(earned)
    for name, came in found.items():
        assert came.shape == truth[name].shape
        assert torch.isfinite(came).all(), name
        off = error(came, truth[name].numpy(), magnitudes[name].numpy())
        allowed = 2 * earned + one_rounding(came.dtype)
        assert off <= allowed, f"{name}: error {off:.3g}, allowed {allowed:.3g} (PyTorch's own {earned:.3g})"


@pytest.mark.skipif(SAMPLE > 1, reason="a sample of the configurations need not")
def test_the_configurations_reach_every_option() -> None:
    problems = [random_problem(seed)[0] for seed in range(CONFIGURATIONS)]
    for option in ("scale", "visibility", "softcap", "sinks"):
        given = sum(problem.options[option] is not None for problem in problems)
        assert CONFIGURATIONS / 8 < given < CONFIGURATIONS * 7 / 8, option
    assert sum(problem.upstream_lse is not None for problem in problems) > CONFIGURATIONS / 12
    assert sum(problem.held is not None and bool(problem.held.any()) for problem in problems) > CONFIGURATIONS / 3
    assert sum(not problem.seen.any(-1).all() for problem in problems) > CONFIGURATIONS / 12
