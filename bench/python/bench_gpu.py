"""attnrb with re-balancing on, side by side with what PyTorch offers today, on a GPU.

    python bench/python/bench_gpu.py [--lengths N ...] [--batches B ...] [--kinds KIND ...] [--contenders NAME ...]
        [--quick] [--profile] [--json FILE]

32 query heads on 8 key heads, 128 wide, bfloat16, causal: prefill, source layer, decoding, forward with backward.
Beside attnrb run scaled_dot_product_attention with enable_gqa, which re-balances nothing and sets the bar; compiled
FlexAttention with a bit for each pair; and the published eager way with a dense mask, where it fits. What does not run
is named with its reason. Outputs are verified before they are timed. Times are those of CUDA events, the caches flushed
before each, contenders in turn; the limit is that of the device's data sheet (H100 SXM unless said otherwise). With
--profile the kernels of attnrb's run follow, and what each takes. Exit status 1 means that an output was wrong, or,
with --strict, that a bar was missed. `--device cpu` is there to try the program itself without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from figures import Figures, option_parser
from gpu_cases import KINDS, Case, cases

CONTENDERS = ("attnrb", "sdpa", "flex", "eager")
_KERNELS = 12  # of a case, that are printed; the file has all
_LAYOUT = "{:<28} {:>10} {:>10} {:>6} {:>8} {:<7} {:>16} {:>16} {:>10} {:>12} {:>6} {:>9} {:>7}"
HEADER = _LAYOUT.format(
    *("case", "attnrb ms", "sdpa ms", "ratio", "bar", "", "flex ms (x)", "eager ms (x)", "GB", "10^12 flop"),
    *("share", "peak MB", "out/row"),
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = option_parser(__doc__, quick="shorter sequences", seconds=(2.0, "a case"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="of decoding")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="attnrb and sdpa are always there"
    )
    parser.add_argument("--tflops", type=float, default=989.0, help="of the device in bfloat16 (default: 989)")
    parser.add_argument("--gbps", type=float, default=3350.0, help="GB/s of its memory (default: 3350)")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a bar is missed")
    parser.add_argument("--profile", action="store_true", help="the time of each kernel of attnrb's, behind each case")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(arguments)
    import torch
    from contenders import WrongResultError

    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch finds no CUDA device (ATTNRB_REQUIRE_CUDA=1 makes this a failure)", file=sys.stderr)
        return int(os.environ.get("ATTNRB_REQUIRE_CUDA") == "1")
    device = torch.device(options.device)
    figures = Figures(options)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a trial of the program"
    print(f"{name}; the limit is {options.tflops:g} TFLOP/s and {options.gbps:g} GB/s")
    print(HEADER, flush=True)
    lengths = [max(length // 8, 1) for length in options.lengths] if options.quick else options.lengths
    results: list[dict[str, Any]] = []
    wrong = False
    for case in cases(lengths, options.batches, options.kinds):
        try:
            result = measure(case, device, options)
        except WrongResultError as error:
            print(f"WRONG RESULT, not timed: {error}", file=sys.stderr)
            wrong = True
            continue
        except torch.OutOfMemoryError:
            print(f"{case.name}: does not fit this device")
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        results.append(result)
        print("\n".join(lines(result)), flush=True)
    barred = [result for result in results if result["at_most"] is not None]
    held = sum(result["holds"] for result in barred)
    print(f"{held} of {len(barred)} bars hold" + (" (which are meant for the full lengths)" if options.quick else ""))
    figures.store(device=name, tflops=options.tflops, gbps=options.gbps, cases=results)
    return 1 if wrong or (options.strict and held < len(barred)) else 0


def measure(case: Case, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Verifies one case, times it, and sets it against what the device can do."""
    import torch
    from gpu_contenders import ATTNRB, SDPA, prepare, verify, verify_gradients
    from kernel_profile import by_kernel

    operands = prepare(case, device)
    with torch.set_grad_enabled(case.kind == "training"):
        runs, peaks, missing = ready(operands, device, options.contenders)
        if case.kind == "training":
            verify_gradients(case, device, list(runs))
        else:
            verify(operands, runs)
        times = timed(runs, device, options.seconds / (10 if options.quick else 1))
        kernels = by_kernel(runs[ATTNRB], device) if options.profile else []
    own = times[ATTNRB].median
    moved, ratio = case.bytes(operands.outliers_a_row), own / times[SDPA].median
    limit = max(case.flops / options.tflops / 1e12, moved / options.gbps / 1e9)
    return {
        "name": case.name,
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "ratios": {name: own / taken.median for name, taken in times.items() if name != ATTNRB},
        "at_most": case.at_most,
        "holds": None if case.at_most is None else ratio <= case.at_most,
        "flops": case.flops,
        "bytes": moved,
        "limit_seconds": limit,
        "share": limit / own,
        "peaks": peaks,
        "missing": missing,
        "outliers_a_row": operands.outliers_a_row,
        "kernels": [asdict(each) for each in kernels],
    }


def ready(
    operands: Any, device: Any, chosen: list[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, int | None], dict[str, str]]:
    """What runs, by name; the peak of memory above the operands, its own mask included; why others do not run."""
    import torch
    from gpu_contenders import ATTNRB, SDPA, contenders

    runs: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    missing: dict[str, str] = {}
    for name, make in contenders(operands).items():
        if name not in (ATTNRB, SDPA, *chosen):
            continue
        try:
            runs[name], peaks[name] = tried(make, device)
        except (RuntimeError, NotImplementedError) as error:  # of memory, or of what a contender cannot do
            if name in (ATTNRB, SDPA):
                raise
            short = isinstance(error, torch.OutOfMemoryError)
            missing[name] = "does not fit" if short else (str(error).strip().splitlines() or [repr(error)])[0]
        if name in missing and device.type == "cuda":
            torch.cuda.empty_cache()
    return runs, peaks, missing


def tried(make: Callable[[], Callable[[], Any]], device: Any) -> tuple[Callable[[], Any], int | None]:
    """What `make` makes, run twice, and the peak of memory in the second run; None where nobody counts."""
    import torch

    counted = device.type == "cuda"
    before = torch.cuda.memory_allocated() if counted else 0
    run = make()
    run()  # compiles, too
    if not counted:
        return run, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return run, torch.cuda.max_memory_allocated() - before


def timed(runs: dict[str, Callable[[], Any]], device: Any, seconds: float) -> dict[str, Any]:
    """Times on the device, the caches flushed before each call; on a CPU those of the clock."""
    import torch
    from timing import Times, interleaved

    if device.type != "cuda":
        return interleaved(runs, seconds=seconds, least=3)
    # Larger than any cache; writing it also keeps the device busy while Python starts the kernels that are timed.
    flush = torch.empty(2**29, dtype=torch.int8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, spent, turn = list(runs), 0.0, 0
    while turn < 5 or (spent < seconds and turn < 500):
        shift = turn % len(names)
        events = []
        for name in names[shift:] + names[:shift]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            start.record()
            runs[name]()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            samples[name].append(start.elapsed_time(end) / 1e3)
            spent += samples[name][-1]
        turn += 1
    return {name: Times.of(taken) for name, taken in samples.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """The row of the table, and why a contender is not in it."""
    milliseconds = {name: taken["median"] * 1e3 for name, taken in result["seconds"].items()}

    def beside(name: str) -> str:
        return f"{milliseconds[name]:.3f} (x{result['ratios'][name]:.2f})" if name in milliseconds else "-"

    bar, peak = result["at_most"], result["peaks"]["attnrb"]
    row = _LAYOUT.format(
        result["name"],
        f"{milliseconds['attnrb']:.3f}",
        f"{milliseconds['sdpa']:.3f}",
        f"{result['ratios']['sdpa']:.2f}",
        "" if bar is None else f"<= {bar:.2f}",
        "" if bar is None else "holds" if result["holds"] else "MISSED",
        beside("flex"),
        beside("eager"),
        f"{result['bytes'] / 1e9:.3f}",
        f"{result['flops'] / 1e12:.4f}",
        f"{result['share']:.1%}",
        "" if peak is None else f"{peak / 2**20:.0f}",
        f"{result['outliers_a_row']:.1f}",
    )
    kernels = [
        f"    {each['seconds'] * 1e6:9.1f} us {each['share']:6.1%}  {each['calls']:g} x {each['name']}"
        for each in result["kernels"][:_KERNELS]
    ]
    return [row.rstrip(), *(f"    {name}: {reason}" for name, reason in result["missing"].items()), *kernels]


if __name__ == "__main__":
    sys.exit(main())
