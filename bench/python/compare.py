"""Compares two results of the benches and names what got slower.

    python bench/python/compare.py BEFORE.json AFTER.json [--tolerance 0.1]

What is compared is time relative to PyTorch's in the same run, where there is one, since that cancels the state the
machine was in, and plain time otherwise. Exit status 1 means that something got slower by more than the tolerance, or
is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Names of the yardstick among the contenders, best first.
YARDSTICKS = ("sdpa", "unpatched sdpa")


def measure_of(result: dict[str, Any]) -> float:
    """Time of attnrb over that of its yardstick, or in seconds where a case has none."""
    times = result["seconds"]
    own = float(times["attnrb"]["median"])
    for name in YARDSTICKS:
        if name in times:
            return own / float(times[name]["median"])
    return own


def noise_of(result: dict[str, Any]) -> float:
    """Relative half-width between the quartiles of attnrb's own times."""
    own = result["seconds"]["attnrb"]
    return float((own["high"] - own["low"]) / 2.0 / own["median"])


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[str]:
    """Sentences on what got slower or is missing; none where all is well.

    A change counts if it exceeds the tolerance and the noise of both runs together.
    """
    complaints = []
    present = {result["name"]: result for result in after["cases"]}
    for old in before["cases"]:
        new = present.get(old["name"])
        if new is None:
            complaints.append(f"{old['name']}: missing from the second file")
            continue
        was, now = measure_of(old), measure_of(new)
        change = now / was - 1.0
        if change > max(tolerance, noise_of(old) + noise_of(new)):
            complaints.append(f"{old['name']}: slower by {change:.0%} ({was:.3g} -> {now:.3g})")
    return complaints


def differences_of_setting(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes the two files hard to compare."""
    return [
        f"{key} differs: {before.get(key)} and {after.get(key)}"
        for key in ("machine", "threads", "instruction_set", "quick")
        if before.get(key) != after.get(key)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="relative slowdown that is let pass (default: 0.1)"
    )
    options = parser.parse_args(arguments)
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    for line in differences_of_setting(before, after):
        print(f"note: {line}")
    complaints = compare(before, after, options.tolerance)
    for line in complaints:
        print(line)
    if not complaints:
        print(f"{len(before['cases'])} cases compared, none slower by more than {options.tolerance:.0%}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
