"""Writes docs/reliability.md from what the rows of the scorecard left in build/scorecard.

    python tests/scorecard/report.py             # not where a row has not run
    python tests/scorecard/report.py --partial   # only the rows that have

Ends with 1, and names them, where a row is missing, has faults, or counts less than it must.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from row import RESULTS, ROOT
from rows import ROWS, Row

PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

A scorecard: what was tried to make attnrb crash, err or lose something, how often, and what came of it.

    make scorecard        # all rows, then this page

`tests/scorecard/report.py` writes this page; each row is a program of its own in `tests/scorecard`, with a command
below that repeats it. Other seeds try other cases: `--seed 1`. What a run finds is mended, gets a test, and is named in
the [changelog](changelog.md).

"""


def problems(row: Row, result: dict[str, Any] | None) -> list[str]:
    """What is wrong with a row's result."""
    if result is None:
        return [f"{row.name}: it has not run: python tests/scorecard/{' '.join(row.program)}"]
    label, least = row.least
    found = result["counts"].get(label, 0)
    wrong = [] if found >= least else [f"{row.name}: {found:,} {label}, expected at least {least:,}"]
    if result["fault_count"]:
        wrong.append(f"{row.name}: {result['fault_count']:,} faults: {result['faults'][0]}")
    return wrong


def ran(results: dict[str, dict[str, Any]]) -> list[Row]:
    """The rows that there are figures of."""
    return [row for row in ROWS if row.name in results]


def summary(results: dict[str, dict[str, Any]]) -> str:
    """One line a row."""
    lines = ["| tried | count | faults | seconds | when |", "| --- | ---: | ---: | ---: | --- |"]
    for row in ran(results):
        result = results[row.name]
        count = f"{result['counts'].get(row.least[0], 0):,} {row.least[0]}"
        lines.append(
            f"| [{row.title}](#{_anchor(row.title)}) | {count} | {result['fault_count']:,} | {result['seconds']:,.0f} "
            f"| {result['date']} |"
        )
    return "\n".join(lines) + "\n"


def section(row: Row, result: dict[str, Any]) -> str:
    """A row in full."""
    parts = [f"## {row.title}\n", f"{row.says}\n", f"    {result['command']}\n"]
    lines = ["| figure | |", "| --- | ---: |"]
    first = row.least[0]
    counts = {label: result["counts"][label] for label in sorted(result["counts"], key=lambda label: label != first)}
    lines += [f"| {label} | {value:,} |" for label, value in counts.items()]
    lines += [f"| {label} | {value:.3g} |" for label, value in result["largest"].items()]
    lines.append(f"| faults | {result['fault_count']:,} |")
    parts.append("\n".join(lines) + "\n")
    if result["faults"]:
        parts.append("Found, and not mended yet:\n\n" + "\n".join(f"- `{each}`" for each in result["faults"]) + "\n")
    if result["notes"]:
        parts.append("\n".join(f"- {each}" for each in result["notes"]) + "\n")
    return "\n".join(parts)


def machines(results: dict[str, dict[str, Any]]) -> str:
    """Where and with what it ran."""
    found = {
        (each["processor"], ", ".join(" ".join(pair) for pair in each["versions"].items())) for each in results.values()
    }
    return (
        "## Machine and versions\n\n"
        + "\n".join(f"- {processor}; {names}" for processor, names in sorted(found))
        + "\n"
    )


def _anchor(title: str) -> str:
    return "".join(each for each in title.lower() if each.isalnum() or each in " -").strip().replace(" ", "-")


def page(results: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    sections = [section(row, results[row.name]) for row in ran(results)]
    left = "" if len(results) == len(ROWS) else "\nRows that have not run on this machine are left out.\n"
    return HEAD + summary(results) + left + "\n" + "\n".join(sections) + "\n" + machines(results)


def main() -> int:
    """Write the page where every row has a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--partial", action="store_true", help="leave out the rows that have not run")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        path = options.results / f"{row.name}.json"
        if path.exists():
            found[row.name] = json.loads(path.read_text("utf-8"))
    wrong = [line for row in ROWS for line in problems(row, found.get(row.name))]
    print(*wrong, sep="\n", file=sys.stderr)
    if len(found) < len(ROWS) and not options.partial:
        print("The page was not written: a row of it would have no figure.", file=sys.stderr)
        return 1
    options.page.write_text(page(found), "utf-8")
    print(f"{options.page} was written: {len(found)} of {len(ROWS)} rows.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
