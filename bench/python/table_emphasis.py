"""Write what `bench_emphasis.py` measured into a page, between two comments that mark the place.

python bench/python/table_emphasis.py build/bench/emphasis.json [--page docs/performance.md]

A quick run is refused: its figures are none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- emphasis: written by bench/python/table_emphasis.py -->", "<!-- emphasis: end -->"
CONTENDERS = ("attnrb", "unpatched sdpa", "sdpa with a mask", "eager hook")


def table(figures: dict[str, Any]) -> str:
    """The processor and a line for each case: tokens per second and the peak of memory above the model."""
    machine = figures["machine"]
    lines = [
        f"Processor: {machine['processor']}, {figures['threads']} threads, {figures['instruction_set']['attnrb']}.",
        "Tokens per second, and in brackets the peak of memory above the loaded model in MB.",
        "",
        "| model | dtype | prompt | " + " | ".join(CONTENDERS) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(CONTENDERS),
    ]
    for case in figures["cases"]:
        cells = [f"{case['tokens_per_second'][each]:.1f} ({case['peak'][each] / 1e6:,.0f})" for each in CONTENDERS]
        lines.append(f"| {case['model']} | {case['dtype']} | {case['prompt']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[2] / "docs" / "performance.md")
    options = parser.parse_args(arguments)
    figures = json.loads(options.figures.read_text())
    if figures.get("quick"):
        raise SystemExit(f"{options.figures} is of a quick run: a look, not a figure")
    if not all("seconds" in case for case in figures["cases"]):
        raise SystemExit(f"{options.figures} has cases without times: run bench_emphasis.py again with it")
    text = options.page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{options.page}: expected the comments {BEGIN!r} and {END!r}")
    options.page.write_text(f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{behind}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
