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

from row import ROOT, Tally, run

_BUILD = ROOT / "build" / "scorecard"
# Mode: the folder of the build, and the sanitizers it has.
MODES = {
    "differential": ("cpp", ""),
    "threads": ("cpp", ""),
    "hidden": ("cpp", ""),
    "calls": ("cpp-asan", "address,undefined"),
    "callers": ("cpp-tsan", "thread"),
}


def build(mode: str, target: str = "attnrb_fuzz") -> Path:
    """The program, built where it is not or where something changed since."""
    folder, sanitizers = MODES[mode]
    tools = ROOT / ".venv" / "bin"
    command = [
        tools / "cmake",
        "-S",
        ROOT,
        "-B",
        _BUILD / folder,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
    ]
    command += ["-DATTNRB_BUILD_PACKAGE=OFF", "-DATTNRB_BUILD_TESTS=ON"]
    if sanitizers:
        command += ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", f"-DATTNRB_SANITIZE={sanitizers}"]
    for step in (command, [tools / "cmake", "--build", _BUILD / folder, "--target", target]):
        built = subprocess.run(step, capture_output=True, text=True, check=False)
        if built.returncode:
            raise SystemExit(built.stdout[-3000:] + built.stderr[-3000:])
    return _BUILD / folder / "tests" / "cpp" / target


def work(tally: Tally) -> None:
    """Run the program and take over what it counted."""
    mode = tally.options.mode
    program = Path(tally.options.program) if tally.options.program else build(mode)
    tally.restart()  # the time to build is not the row's
    command = [program, mode, "--count", str(tally.count), "--seed", str(tally.seed)]
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
