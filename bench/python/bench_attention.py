"""attnrb with re-balancing on, side by side with PyTorch's attention without it.

    python bench/python/bench_attention.py [--quick] [--case PART]... [--threads N] [--cpu SET] [--json FILE]

Every output is verified before it is timed; contenders run in turn in one process on the same threads. A short matrix
product before and after each round says whether the machine was slowed down from outside: such rounds are dropped and
counted. Times are minima of the rest; the JSON has medians and quartiles beside them. The roofline (matrix products,
plain reading) is measured in the same run. Exit status 1 means that an output was wrong, or, with --strict, that a bar
was missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from typing import Any

from figures import Figures, option_parser

# What --cpu means to PyTorch; it has no lower set than "default".
_TORCH_CAPABILITY = {
    "portable": "default",
    "avx2": "avx2",
    "avx512": "avx512",
    "avx512_bf16": "avx512",
    "amx": "amx",
    "neon": "default",
    "neon_bf16": "default",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = option_parser(__doc__, quick="shorter sequences and fewer rounds", seconds=(3.0, "a case"))
    parser.add_argument(
        "--case", action="append", metavar="PART", help="only cases whose name contains this; repeatable"
    )
    parser.add_argument("--cpu", choices=_TORCH_CAPABILITY, help="instruction set that both libraries are held to")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a bar is missed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.cpu is not None:  # both libraries read their variable once, when they are loaded
        os.environ["ATTNRB_CPU"] = options.cpu
        os.environ["ATEN_CPU_CAPABILITY"] = _TORCH_CAPABILITY[options.cpu]

    from attnrb.ops import library
    from bars import CASES
    from contenders import WrongResultError, smaller
    from report import HEADER, lines, verdict

    cases = [
        case.on(library.instruction_set())
        for case in CASES
        if not options.case or any(part in case.name for part in options.case)
    ]
    if not cases:
        print(f"no case is called like that; there are: {', '.join(case.name for case in CASES)}", file=sys.stderr)
        return 2
    figures = Figures(options)
    print(HEADER, flush=True)
    results: list[dict[str, Any]] = []
    for case in cases:
        try:
            result = measure(smaller(case) if options.quick else case, options.seconds / (10 if options.quick else 1))
        except WrongResultError as error:
            print(f"WRONG RESULT, not timed: {error}", file=sys.stderr)
            return 1
        results.append(result)
        print("\n".join(lines(result)), flush=True)
    print(verdict(results) + (" (which are meant for the full lengths)" if options.quick else ""))
    figures.store(cases=results)
    missed = any(not bar["holds"] for result in results for bar in result["bars"])
    return 1 if options.strict and missed else 0


def measure(case: Any, seconds: float) -> dict[str, Any]:
    """Verifies one case, times it, and sets it against what the machine can do, measured right after."""
    from bars import READ, READ_SHARE, SDPA
    from contenders import contenders, plain_read, prepare, verify
    from roofline import product_probe, products, reading
    from timing import interleaved

    operands = prepare(case)
    runs = contenders(operands)
    verify(operands, runs)
    # A ragged batch skips its padding, which a plain read does not.
    reads: dict[str, Any] = {READ: plain_read(operands)} if case.decode and not case.ragged else {}
    times = interleaved(runs | reads, seconds=seconds, probe=product_probe(case.dtype))
    own = times["attnrb"].fastest
    if reads:
        limit = case.bytes() / times[READ].fastest / 1e9
    elif case.decode:
        limit = reading(int(case.bytes()), seconds=seconds / 6)
    else:
        limit = products(case.dtype, seconds=seconds / 6)
    rate = (case.bytes() if case.decode else case.flops()) / own / 1e9
    bars = [{"against": name, "at_most": bar, "is": own / times[name].fastest} for name, bar in case.bars]
    if case.least is not None:
        bars.append({"against": SDPA, "at_most": case.least, "is": own / times[SDPA].fastest, "least": True})
    for bar in bars:
        bar["holds"] = bar["is"] <= bar["at_most"]
    if reads:
        share = rate / limit
        bars.append({"against": READ, "at_least": READ_SHARE, "is": share, "holds": share >= READ_SHARE})
    return {
        "name": case.name,
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "rate": rate,
        "limit": limit,
        "unit": "GB/s" if case.decode else "GFLOP/s",
        "outliers_a_row": operands.outliers_a_row,
        "bars": bars,
    }


if __name__ == "__main__":
    sys.exit(main())
