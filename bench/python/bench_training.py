"""Time and memory of a training step through attention: forward and backward, re-balancing on, beside PyTorch's.

    python bench/python/bench_training.py [--quick] [--threads N] [--json FILE]

Time: rebalanced_attention with its backward against scaled_dot_product_attention with its own, on the same inputs,
after the gradients were checked against dense autograd in float64; minima of the rounds in which nothing slowed the
machine down from outside, as in bench_attention.py. Memory: the resident set's peak above the inputs
(Linux), each length in a process of its own; the exponent is the slope of a line through the logarithms, 1 for linear
and 2 for an n-by-n matrix.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from bench_memory import EXPONENT_BAR, HEADS, KEY_HEADS, WIDTH, exponent
from figures import Figures, option_parser

BARS = {"bfloat16": 0.75, "float32": 1.0}
AMX_BARS = {"bfloat16": 0.30, "float32": 1.0}
GAIN = 0.1


def operands(dtype: Any, keys: int) -> list[Any]:
    """Query, key, value and the gradient of the output; about ten outliers a row at 2,048 keys."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for heads, spread in ((HEADS, 1.5), (KEY_HEADS, 1.0), (KEY_HEADS, 1.0), (HEADS, 1.0)):
        made.append((torch.randn(1, heads, keys, WIDTH, generator=generator) * spread).to(dtype))
    return [*(each.requires_grad_() for each in made[:3]), made[3]]


def steps(query: Any, key: Any, value: Any, upstream: Any) -> dict[str, Any]:
    """By name: what gives the gradients of query, key and value."""
    import torch
    from attnrb import functional

    with torch.no_grad():
        outliers = functional.source_attention(query, key, value)[2]
    gain = torch.full((1,), GAIN)

    def own() -> tuple[Any, ...]:
        output = functional.rebalanced_attention(query, key, value, outliers, gain)
        return torch.autograd.grad(output, (query, key, value), upstream)

    def pytorch() -> tuple[Any, ...]:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(output, (query, key, value), upstream)

    return {"attnrb": own, "sdpa": pytorch}


def verify(dtype: Any) -> None:
    """Gradients of a shorter sequence against dense autograd in float64: as accurate as PyTorch's own."""
    import torch
    from attnrb import functional

    inputs = operands(dtype, 160)
    query, key, value, upstream = inputs
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    with torch.no_grad():
        outliers = functional.source_attention(query, key, value)[2]
    q, k, v = exact
    boosted = functional.rebalanced_attention(q, k, v, outliers, GAIN)  # float64: dense and plain
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    runs = steps(*inputs)
    errors = {}
    for name, output in (("attnrb", boosted), ("sdpa", plain)):
        truth = torch.autograd.grad(output, exact, upstream.double())
        found = runs[name]()
        errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    allowed = 2.0 * errors["sdpa"] + float(torch.finfo(dtype).eps)
    if not errors["attnrb"] <= allowed:
        raise SystemExit(f"WRONG RESULT, not timed: gradients are off by {errors['attnrb']:.2e}, allowed {allowed:.2e}")


def measure(name: str, keys: int, seconds: float) -> dict[str, Any]:
    """Times of one dtype."""
    import torch
    from attnrb.ops import library
    from roofline import product_probe
    from timing import interleaved

    dtype = getattr(torch, name)
    verify(dtype)
    bar = (AMX_BARS if library.instruction_set() == "amx" else BARS)[name]
    times = interleaved(steps(*operands(dtype, keys)), seconds=seconds, least=3, probe=product_probe(dtype))
    ratio = times["attnrb"].fastest / times["sdpa"].fastest
    # Seven products of M N D for each head, half of them hidden by the causal mask.
    rate = 7 * keys * keys * WIDTH * HEADS / times["attnrb"].fastest / 1e9
    return {
        "name": f"{name} n{keys}",
        "seconds": {who: asdict(taken) for who, taken in times.items()},
        "rate": rate,
        "ratio": ratio,
        "at_most": bar,
        "holds": ratio <= bar,
    }


def peak_above_inputs(keys: int, threads: int) -> int:
    """Bytes, measured in this very process, which must not have done anything else."""
    import torch
    from attnrb import functional
    from peak import peak_of

    torch.set_num_threads(threads)

    def step(query: Any, key: Any, value: Any) -> Any:
        output, _, outliers = functional.source_attention(query, key, value)
        below = functional.rebalanced_attention(query, key, value, outliers, GAIN)
        return torch.autograd.grad([output, below], (query, key, value), [output.detach(), below.detach()])

    def made(length: int) -> list[Any]:
        return [
            torch.empty(1, heads, length, WIDTH, dtype=torch.bfloat16).normal_().requires_grad_()
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        ]

    step(*made(8))  # threads, code and libraries come in with a first call, whatever the length
    inputs = made(keys)
    return peak_of(lambda: step(*inputs))[0]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = option_parser(__doc__, quick="shorter sequences", seconds=(8.0, "a dtype"))
    parser.add_argument("--only", choices=("time", "memory"), help="one half of it")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args(arguments)
    if options.peak is not None:
        print(peak_above_inputs(options.peak, options.threads))
        return 0

    figures = Figures(options)
    results: list[dict[str, Any]] = []
    if options.only != "memory":
        for name in BARS:
            result = measure(name, 512 if options.quick else 2048, options.seconds)
            results.append(result)
            own, other = (result["seconds"][who]["fastest"] * 1e3 for who in ("attnrb", "sdpa"))
            holds = "holds" if result["holds"] else "MISSED"
            print(
                f"{result['name']}: attnrb {own:.0f} ms ({result['rate']:.0f} GFLOP/s), sdpa {other:.0f} ms, "
                f"ratio {result['ratio']:.2f} (bar <= {result['at_most']}: {holds}), "
                f"{result['seconds']['attnrb']['dropped']} rounds dropped",
                flush=True,
            )
    if options.only != "time":
        lengths = [256, 512, 1024] if options.quick else [1024, 2048, 4096, 8192, 16384]
        peaks = []
        for keys in lengths:
            command = [sys.executable, __file__, "--peak", str(keys), "--threads", str(options.threads)]
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(f"peak at n{keys}: {peaks[-1] / 2**20:.0f} MiB", flush=True)
        slope = exponent(lengths, peaks)
        linear = slope <= EXPONENT_BAR
        print(f"memory grows as n^{slope:.2f} (at most {EXPONENT_BAR}: {'holds' if linear else 'MISSED'})")
        results.append({"name": "memory", "lengths": lengths, "peaks": peaks, "exponent": slope, "holds": linear})
    figures.store(cases=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
