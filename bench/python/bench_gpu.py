"""attnrb with re-balancing on, side by side with PyTorch's attention without it, on a GPU.

    python bench/python/bench_gpu.py [--lengths N ...] [--batches B ...] [--device cpu] [--json FILE]

32 query heads on 8 key heads, 128 wide, bfloat16. Outputs are compared with PyTorch's before they are timed (the gain
is 0 for that). Shares are of an H100's 989 TFLOP/s and 3.35 TB/s (SXM data sheet), whatever the device. `--device cpu`
is there to try the program itself without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from attnrb import Outliers, functional
from timing import interleaved
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12


@dataclass(frozen=True)
class Case:
    batch: int
    queries: int
    keys: int

    @property
    def flops(self) -> float:
        """Multiplications and additions of one causal forward."""
        seen = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) / 2
        return 4.0 * self.batch * HEADS * WIDTH * seen

    @property
    def bytes(self) -> float:
        """Queries, keys, values and output once, in bfloat16."""
        return 2.0 * self.batch * WIDTH * (2 * HEADS * self.queries + 2 * KEY_HEADS * self.keys)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="of decoding")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch finds no CUDA device", file=sys.stderr)
        return int(os.environ.get("ATTNRB_REQUIRE_CUDA") == "1")
    cases = [Case(1, n, n) for n in options.lengths]
    cases += [Case(batch, 1, n) for n in options.lengths for batch in options.batches]
    print(f"{'case':28} {'SDPA':>10} {'source':>16} {'rebalanced':>16}   roofline share of rebalanced")
    results = []
    with torch.no_grad():
        for case in cases:
            results.append(measure(case, torch.device(options.device), options.seconds))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, object]:
    """Verifies one case, times it and prints its line."""
    torch.manual_seed(0)
    query = torch.randn(case.batch, HEADS, case.queries, WIDTH, device=device, dtype=torch.bfloat16) * 1.5
    key, value = (torch.randn(case.batch, KEY_HEADS, case.keys, WIDTH, device=device).to(query.dtype) for _ in "kv")
    gain = torch.full((1,), 0.1, device=device)
    *_, outliers = functional.source_attention(query, key, value)

    runs: dict[str, Callable[[], Tensor]] = {
        "SDPA": lambda: sdpa(query, key, value, is_causal=case.queries > 1, enable_gqa=True),
        "source": lambda: functional.source_attention(query, key, value)[0],
        "rebalanced": lambda: functional.rebalanced_attention(query, key, value, outliers, gain),
    }
    verify(runs["SDPA"](), runs["source"](), query, key, value, outliers)
    times = interleaved({name: timed(run, device) for name, run in runs.items()}, seconds=seconds)
    median = {name: taken.median for name, taken in times.items()}
    share = max(case.flops / PEAK_FLOPS, case.bytes / PEAK_BYTES) / median["rebalanced"]
    name = f"{'prefill' if case.queries > 1 else 'decode'} batch {case.batch} n {case.keys}"
    columns = (f"{median[run] * 1e3:8.3f} ms x{median[run] / median['SDPA']:4.2f}" for run in ("source", "rebalanced"))
    print(f"{name:28} {median['SDPA'] * 1e3:7.3f} ms", *columns, f"  {share:6.1%}", flush=True)
    return {"case": name, "seconds": median, "flops": case.flops, "bytes": case.bytes, "roofline_share": share}


def verify(expected: Tensor, source: Tensor, query: Tensor, key: Tensor, value: Tensor, outliers: Outliers) -> None:
    """Both ops against PyTorch, re-balancing with a gain of 0: a wrong output is not timed."""
    rebalanced = functional.rebalanced_attention(query, key, value, outliers, torch.zeros(1, device=query.device))
    for name, output in (("source", source), ("rebalanced", rebalanced)):
        off = float((output.float() - expected.float()).abs().max() / expected.float().abs().max())
        # Both round probabilities and outputs to bfloat16: a few of its last places.
        if not off <= 4 * float(torch.finfo(torch.bfloat16).eps):
            raise SystemExit(f"{name} is off by {off:.2e} of the largest output; nothing was timed")


def timed(run: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """The call and the wait for it."""

    def call() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


if __name__ == "__main__":
    sys.exit(main())
