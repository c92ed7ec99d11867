"""Time and memory of an analysis of the default model, against the length of the text.

    python bench/python/bench_analysis.py [--lengths N ...] [--threads N] [--json FILE]

Each length runs in a process of its own: one text, measured plain. The time is that of `analyze`, without loading the
model; the peak is the whole process's resident set (Linux), model included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from figures import Figures, option_parser

SECONDS_BAR = {4096: 60.0}
GIGABYTES_BAR = 8.0


def measure(length: int, threads: int) -> dict[str, float]:
    """Seconds and the peak in bytes, in this very process."""
    import torch
    from attnrb.analysis import analyze
    from attnrb.models import load

    torch.set_num_threads(threads)
    model, tokenizer = load()
    text = (Path(__file__).parents[2] / "LICENSE").read_text("utf-8")
    text *= 1 + length // len(tokenizer(text)["input_ids"])
    start = time.perf_counter()
    report = analyze(model, tokenizer, text, max_tokens=length)
    seconds = time.perf_counter() - start
    if report.token_count != length:
        raise SystemExit(f"expected {length} tokens, got {report.token_count}")
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="tokens")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(measure(options.one, options.threads)))
        return 0

    figures = Figures(options)
    cases: list[dict[str, Any]] = []
    for length in options.lengths:
        command = [sys.executable, __file__, "--one", str(length), "--threads", str(options.threads)]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        case = {"tokens": length, **json.loads(child.stdout)}
        cases.append(case)
        limit = SECONDS_BAR.get(length)
        bars = [(case["peak"] / 1e9, GIGABYTES_BAR, "GB")] + ([(case["seconds"], limit, "s")] if limit else [])
        verdicts = ", ".join(f"bar <= {bar:g} {unit}: {'holds' if is_ <= bar else 'MISSED'}" for is_, bar, unit in bars)
        print(f"{length:>6} tokens {case['seconds']:>8.1f} s {case['peak'] / 1e9:>6.2f} GB   {verdicts}", flush=True)
    figures.store(cases=cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
