"""Runs the rows of the scorecard, two at a time, and writes docs/reliability.md.

python tests/scorecard/run.py                        # all of them
python tests/scorecard/run.py --rows forward hidden
python tests/scorecard/run.py --smoke --out FOLDER   # a few cases each, to see that the programs work
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

from row import RESULTS, ROOT, Tally, save
from rows import ROWS, Row

_BUDGET = 900  # seconds that no row may exceed
# These take the longest: they start first, so that both processes end at about the same time.
_FIRST = ("killed", "planted-host", "planted-core", "forward", "calls", "pages", "differential")


def main() -> int:
    """Run them, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=[row.name for row in ROWS], help="all unless named")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="rows at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=_BUDGET, help="for each row at most")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = [row for row in ROWS if not options.rows or row.name in options.rows]
    chosen.sort(key=lambda row: _FIRST.index(row.name) if row.name in _FIRST else len(_FIRST))

    def one(row: Row) -> bool:
        command = [sys.executable, ROOT / "tests" / "scorecard" / row.program[0]]
        command += row.smoke if options.smoke else row.program[1:]
        command += ["--seed", str(options.seed), "--seconds", str(options.seconds), "--out", options.out]
        started, file = datetime.now(timezone.utc), options.out / f"{row.name}.json"
        file.unlink(missing_ok=True)
        tally = Tally(options.seed, 0, options.seconds)
        environment, limit = {**os.environ, "OMP_NUM_THREADS": "1"}, 2 * options.seconds + 300
        try:
            code = subprocess.run(command, env=environment, cwd=ROOT, check=False, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if not file.exists():  # no row of the page is without a figure
            tally.fault(f"the program ended with {code} before it wrote what it had counted")
            save(row.name, f"python tests/scorecard/{' '.join(row.program)}", started, tally, options.out)
        return code == 0

    with ThreadPoolExecutor(options.jobs) as pool:
        passed = list(pool.map(one, chosen))
    failed = [row.name for row, fine in zip(chosen, passed, strict=True) if not fine]
    if failed:
        print(f"These rows found faults: {', '.join(failed)}", file=sys.stderr)
    if options.smoke:
        return int(bool(failed))
    report = subprocess.run([sys.executable, ROOT / "tests" / "scorecard" / "report.py"], check=False)
    return int(bool(failed) or report.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
