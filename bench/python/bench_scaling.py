"""Time against the sequence length and against the machine's limit: attnrb re-balancing, PyTorch not.

    python bench/python/bench_scaling.py [--quick] [--threads N] [--json FILE]
    python docs/images/scaling.py FILE      # draws docs/images/scaling.svg from the JSON

Prefill (bfloat16 and float32) and one step of decoding (bfloat16), H 32/8, D 128. The limit is what the same run
reached with a matrix product of the same dtype, or with a plain read of the same keys and values.
"""

from __future__ import annotations

import sys

from figures import Figures, option_parser

LENGTHS = (512, 1024, 2048, 4096, 8192)
CACHES = (1024, 2048, 4096, 8192, 16384, 32768)


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, quick="the three shortest of each", seconds=(3.0, "a length"))
    options = parser.parse_args(arguments)

    from bars import BF16, FP32, SDPA, SDPA_BEST, Case
    from bench_attention import measure

    figures = Figures(options)
    print(
        f"{'case':<24} {'n':>6} {'attnrb ms':>10} {'sdpa ms':>10} {'limit ms':>10} {'ratio':>6} {'share':>6}",
        flush=True,
    )
    kept = 3 if options.quick else None
    cases = [
        Case(f"{name} prefill", dtype, n, n) for name, dtype in (("bf16", BF16), ("fp32", FP32)) for n in LENGTHS[:kept]
    ]
    cases += [Case("bf16 decode", BF16, 1, n, bars=((SDPA_BEST, 1.0),)) for n in CACHES[:kept]]
    results = []
    for case in cases:
        result = measure(case, options.seconds)
        own, other = (result["seconds"][name]["median"] for name in ("attnrb", SDPA))
        limit = own * result["rate"] / result["limit"]
        results.append(
            result | {"name": f"{case.name} n{case.keys}", "kind": case.name, "keys": case.keys, "limit_seconds": limit}
        )
        print(
            f"{case.name:<24} {case.keys:>6} {own * 1e3:>10.3f} {other * 1e3:>10.3f} {limit * 1e3:>10.3f} "
            f"{own / other:>6.2f} {limit / own:>6.0%}",
            flush=True,
        )
    figures.store(cases=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
