"""Memory that re-balancing needs above its inputs against the sequence length, and its time against the published way.

    python bench/python/bench_memory.py [--quick] [--threads N] [--json FILE]

Each length runs in a process of its own: source_attention and rebalanced_attention one after the other, as two layers
of a model. The peak is the resident set's (Linux), with results and outlier sets, without inputs. The exponent is the
slope of a line through the logarithms; 1 is linear, 2 is an n-by-n matrix.

The published way is eager: dense scores, a dense mask of outliers from layer 0, a second matrix of strengthened
weights.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from figures import Figures, option_parser
from peak import peak_of

EXPONENT_BAR = 1.1
EAGER_BAR = 25.0
HEADS, KEY_HEADS, WIDTH = 32, 8, 128


def peak_above_inputs(keys: int, threads: int) -> int:
    """Bytes, measured in this very process, which must not have done anything else."""
    import torch
    from attnrb import functional

    torch.set_num_threads(threads)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> object:
        source = functional.source_attention(query, key, value)
        return source, functional.rebalanced_attention(query, key, value, source[2], 0.1)

    # Threads, code and libraries come in with a first call, whatever the length.
    run(*(torch.randn(1, heads, 8, WIDTH).bfloat16() for heads in (HEADS, KEY_HEADS, KEY_HEADS)))
    # Filled in place: a conversion's temporary would leave freed pages that the measured call could reuse unseen.
    inputs = [
        torch.empty(1, heads, keys, WIDTH, dtype=torch.bfloat16).normal_() for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    return peak_of(lambda: run(*inputs))[0]


def exponent(lengths: list[int], peaks: list[int]) -> float:
    """Least-squares slope of log peak over log length."""
    x, y = [math.log(n) for n in lengths], [math.log(p) for p in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def against_published(keys: int, seconds: float) -> dict[str, Any]:
    """Times of the published computation and of attnrb at one length, bfloat16, verified against each other."""
    import torch
    from attnrb import functional
    from timing import interleaved

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        (torch.randn(1, heads, keys, WIDTH, generator=generator) * spread).bfloat16()
        for heads, spread in ((HEADS, 2.0), (KEY_HEADS, 1.0), (KEY_HEADS, 1.0))
    )
    _, _, outliers = functional.source_attention(query, key, value)
    causal = torch.ones(keys, keys, dtype=torch.bool).tril()
    mask = torch.zeros(1, HEADS, keys, keys + 1, dtype=torch.bool)
    mask.scatter_(3, torch.where(outliers.indices < 0, keys, outliers.indices).long(), True)
    mask = mask[..., :keys].contiguous()
    bias = torch.zeros(keys, keys, dtype=torch.bfloat16).masked_fill(~causal, torch.finfo(torch.bfloat16).min)
    gain = torch.full((1,), 0.1)

    def published() -> torch.Tensor:
        groups = HEADS // KEY_HEADS
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) / math.sqrt(WIDTH) + bias
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        weights = torch.where(mask, weights * 1.1, weights)
        return weights @ value.repeat_interleave(groups, 1)

    def own() -> torch.Tensor:
        return functional.rebalanced_attention(query, key, value, outliers, gain)

    difference = (published().double() - own().double()).abs().max().item()
    # Both round weights and results to bfloat16; values are at most a few units large.
    allowed = 4.0 * torch.finfo(torch.bfloat16).eps * value.abs().max().item()
    if not difference <= allowed:
        raise SystemExit(
            f"WRONG RESULT, not timed: published and attnrb differ by {difference:.2e}, allowed {allowed:.2e}"
        )
    times = interleaved({"attnrb": own, "published": published}, seconds=seconds, least=3)
    return {"name": f"published way n{keys}", "seconds": {name: asdict(taken) for name, taken in times.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, quick="shorter sequences")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args(arguments)
    if options.peak is not None:
        print(peak_above_inputs(options.peak, options.threads))
        return 0

    figures = Figures(options)
    lengths = [256, 512, 1024, 2048] if options.quick else [1024, 2048, 4096, 8192, 16384]
    peaks = []
    print(f"{'n':>6} {'peak above inputs':>18} {'bytes a query':>14}")
    for keys in lengths:
        command = [sys.executable, __file__, "--peak", str(keys), "--threads", str(options.threads)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{keys:>6} {peaks[-1] / 1e6:>15.1f} MB {peaks[-1] / keys:>14,.0f}", flush=True)
    slope = exponent(lengths, peaks)
    holds = "holds" if slope <= EXPONENT_BAR else "MISSED"
    print(f"memory grows with exponent {slope:.2f}, bar <= {EXPONENT_BAR}: {holds}")

    published = against_published(1024 if options.quick else 4096, 1.0 if options.quick else 10.0)
    own, its = (published["seconds"][name]["median"] for name in ("attnrb", "published"))
    print(
        f"{published['name']}, bfloat16: {its * 1e3:.0f} ms, attnrb {own * 1e3:.1f} ms: {its / own:.1f} times faster, "
        f"bar >= {EAGER_BAR:g}: {'holds' if its / own >= EAGER_BAR else 'MISSED'}"
    )
    memory = {"lengths": lengths, "peaks": peaks, "exponent": slope, "bar": EXPONENT_BAR}
    figures.store(memory=memory, cases=[published])
    return 0


if __name__ == "__main__":
    sys.exit(main())
