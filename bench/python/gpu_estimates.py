"""What the GPU bench would show on an H100, by arithmetic: no GPU is needed, and nothing here was measured.

``gpu_estimates.py`` prints a Markdown table of ratios to ``scaled_dot_product_attention``, beside each the bar of
gpu_cases.py. A floor is what cannot be beaten: every scheduler issues an instruction in every cycle, and memory costs
nothing. An estimate issues 0.65 of that. Instructions are those that tools/count_sass.py counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from gpu_cases import HEADS, KEY_HEADS, WIDTH, Case, cases

# An H100 SXM: warp instructions a second, and bytes.
ISSUED = 132 * 4 * 1.755e9
BANDWIDTH = 3.35e12
# What mma.sync reaches there; the data sheet's 989 need other instructions, which are Hopper's own.
MMA_FLOPS = 660e12
USUAL_ISSUE = 0.65
# Estimates of the forward in 10^12 operations a second, by length.
CUDNN = {4096: 500, 8192: 560, 16384: 590, 32768: 610, 65536: 620}
FLASH = {4096: 330, 8192: 360, 16384: 380, 32768: 390, 65536: 395}
# The kernel that computes doubtful rows anew finds none: what its blocks take to end, a row of 64.
AGAIN = 10e-6 / (HEADS * 4096 / 64)


@dataclass(frozen=True)
class Counts:
    """Instructions of a warp: for a row that is corrected, and for a tile that is looked through."""

    correction: int
    select: int
    copied: bool  # whether the output was brought to another layout before


def estimate(case: Case, counts: Counts, library: dict[int, int], issue: float) -> float:
    """Time divided by that of attention alone, where warps issue `issue` instructions a cycle and scheduler."""
    dense = case.flops / (library[case.keys] * 1e12)
    rows = HEADS * case.keys
    again = AGAIN * rows / 64
    copy = 2 * 2.0 * rows * WIDTH / BANDWIDTH if counts.copied else 0.0
    if case.kind == "prefill":
        # It reads queries and the output, writes the output, and gathers keys and values, which the cache has.
        least = 3 * 2.0 * rows * WIDTH / BANDWIDTH
        return (dense + max(rows * counts.correction / (ISSUED * issue), least) + copy + again) / dense
    queries = 64 * KEY_HEADS // HEADS  # of a tile of 64 rows
    tiles = KEY_HEADS * sum(-(-queries * (tile + 1) // 64) for tile in range(case.keys // queries))
    issued = tiles * 4 * counts.select / (ISSUED * issue)
    products = tiles * 2.0 * 64 * 64 * WIDTH / (MMA_FLOPS * issue)
    return (dense + max(issued, products) + copy + again) / dense


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--correction", type=int, required=True, help="instructions of a row with ten outliers")
    parser.add_argument("--select", type=int, required=True, help="instructions of a tile looked through")
    options = parser.parse_args()
    before = Counts(correction=1400, select=1070, copied=True)
    after = Counts(options.correction, options.select, copied=False)
    print("| case | n | bar | cuDNN: floor, estimate | before | flash 2: floor, estimate | before |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in cases(list(CUDNN), [1], ["prefill", "source"]):
        cells = [
            ", ".join(f"{estimate(case, counts, library, issue):.2f}" for issue in (1.0, USUAL_ISSUE))
            for library in (CUDNN, FLASH)
            for counts in (after, before)
        ]
        print(f"| {case.kind} | {case.keys:,} | {case.at_most:.2f} |", " | ".join(cells), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
