"""Keeps results of the benches over time, in bench/history, and compares them.

    python bench/python/history.py add build/bench [--commit NAME] [--date YYYY-MM-DDTHHMM]
    python bench/python/history.py compare [--tolerance 0.1]

`add` compares every result with cases in a folder with the newest stored one of this kind of processor, says what got
slower, and stores it. `compare` does so for the two newest results that are stored of each kind. Exit status 1 means
that something got slower by more than the tolerance.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import YARDSTICKS, compare, differences_of_setting

HISTORY = Path(__file__).resolve().parents[1] / "history"


def kind_of(result: dict[str, Any]) -> str:
    """The folder of a result: model of the processor, widest extension, threads."""
    machine = result["machine"]
    name = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", " ", machine["processor"].lower())
    widest = machine.get("extensions", [])[-1:] or ["portable"]
    words = [*re.findall(r"[a-z0-9]+", name), *re.findall(r"[a-z0-9]+", widest[0]), f"{result['threads']}-threads"]
    return "-".join(words)


def kept(result: dict[str, Any], bench: str, commit: str, date: str) -> dict[str, Any]:
    """What is stored: where it comes from, and of each case the times that a comparison reads."""
    cases = [
        {
            "name": case["name"],
            "seconds": {name: case["seconds"][name] for name in ("attnrb", *YARDSTICKS) if name in case["seconds"]},
        }
        for case in result["cases"]
    ]
    head = {name: result[name] for name in ("machine", "versions", "instruction_set", "threads")}
    return {"bench": bench, "date": date, "commit": commit, **head, "cases": cases}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results with cases in a folder, by name of the bench. Those of --quick are left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        cases = result.get("cases")
        if cases and "machine" in result and all("attnrb" in case.get("seconds", {}) for case in cases):
            if result.get("quick"):
                print(f"{path.name}: measured with --quick, so it is not stored")
            else:
                found[path.stem] = result
    return found


def stored(kind: Path, bench: str) -> list[Path]:
    """The stored results of one bench on one kind of processor, oldest first."""
    return sorted(kind.glob(f"*-{bench}.json"))


def report(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> bool:
    """Print what differs between two results; whether something got slower."""
    for line in differences_of_setting(before, after):
        print(f"  note: {line}")
    complaints = compare(before, after, tolerance)
    for line in complaints:
        print(f"  {line}")
    if not complaints:
        print(f"  {len(before['cases'])} cases, none slower by more than {tolerance:.0%}")
    return bool(complaints)


def add(folder: Path, commit: str, date: str, tolerance: float, history: Path = HISTORY) -> int:
    """Store the results of a folder; 1 where something got slower than the newest ones before, or there is none."""
    found = results(folder)
    if not found:
        print(f"no result with cases in {folder}: run make bench first")
        return 1
    slower = False
    for bench, result in found.items():
        kind = history / kind_of(result)
        new = kept(result, bench, commit, date)
        path = kind / f"{date}-{commit}-{bench}.json"
        earlier = [each for each in stored(kind, bench) if each != path]
        print(f"{kind.name}, {bench}:" + ("" if earlier else " the first result"))
        if earlier:
            slower |= report(json.loads(earlier[-1].read_text("utf-8")), new, tolerance)
        kind.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    return int(slower)


def compare_newest(tolerance: float, history: Path = HISTORY) -> int:
    """Compare the two newest results of each bench and kind; 1 where something got slower."""
    slower = False
    for kind in sorted(each for each in history.glob("*") if each.is_dir()):
        for bench in sorted({json.loads(path.read_text("utf-8"))["bench"] for path in kind.glob("*.json")}):
            newest = [json.loads(path.read_text("utf-8")) for path in stored(kind, bench)[-2:]]
            print(f"{kind.name}, {bench}: " + " → ".join(f"{each['date']} {each['commit']}" for each in newest))
            if len(newest) == 2:
                slower |= report(newest[0], newest[1], tolerance)
    return int(slower)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("add", "compare"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    parser.add_argument("--commit", default=None, help="what was measured (default: the commit that git names)")
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H%M")
    parser.add_argument("--date", default=now, help="when, in UTC and with the time of day (default: now)")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="relative slowdown that is let pass (default: 0.1)"
    )
    options = parser.parse_args(arguments)
    if options.what == "compare":
        return compare_newest(options.tolerance)
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = options.commit or subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return add(options.folder, commit, options.date, options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
