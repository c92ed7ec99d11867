"""Rows of the scorecard that run on the kernels alone, without torch: builds tests/cpp/fuzz.cpp and runs it.

    python tests/scorecard/core.py --mode differential --count 10000    # every instruction set against the oracle
    python tests/scorecard/core.py --mode threads --count 5000          # the same bits on 1 to 4 threads
    python tests/scorecard/core.py --mode hidden --count 5000           # NaN in everything hidden
    python tests/scorecard/core.py --mode calls --count 1000000         # under ASan and UBSan
    python tests/scorecard/core.py --mode callers --count 20000         # 8 callers under TSan

A kernel call is one call of an entry of a kernel table: attention, received attention, the gradient of either, the
outlier mask, re-balancing of weights, and its gradient. `--program` names an attnrb_fuzz that is built already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from builds import PLAIN, SANITIZED, THREADED, build
from row import Tally, run

# Mode: the build that its program is of.
MODES = {
    "differential": PLAIN,
    "threads": PLAIN,
    "hidden": PLAIN,
    "calls": SANITIZED,
    "callers": THREADED,
}


def program(mode: str) -> Path:
    """The program of a mode, built where it is not there or something changed since."""
    build(MODES[mode], "attnrb_fuzz")
    return MODES[mode] / "tests" / "cpp" / "attnrb_fuzz"


def work(tally: Tally) -> None:
    """Run the program and take over what it counted."""
    mode = tally.options.mode
    path = Path(tally.options.program) if tally.options.program else program(mode)
    tally.restart()  # the time to build is not the row's
    command = [path, mode, "--count", str(tally.count), "--seed", str(tally.seed)]
    if tally.seconds != float("inf"):
        command += ["--seconds", str(tally.seconds)]
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(ran.stdout.splitlines()[-1]) if ran.stdout.strip() else {}
    tally.counts.update(found.get("counts", {}))
    tally.counts["instruction sets"] = len(found.get("tables", []))
    tally.notes.append("Instruction sets: " + ", ".join(found.get("tables", [])) + ".")
    for line in found.get("faults", []):
        tally.fault(line)
    if ran.returncode and not found.get("faults"):
        tally.fault(f"the program ended with {ran.returncode}: {' '.join(ran.stderr.split())[:1500]}")


if __name__ == "__main__":
    mode = next((name for name in MODES if any(each.endswith(name) for each in sys.argv)), None)
    if mode is None:
        raise SystemExit(f"--mode: expected one of {', '.join(MODES)}")
    sys.exit(run(mode, __doc__, work, count=1000, mode=mode, program=""))
