"""Run two commands at once: ``side_by_side.py LOG COMMAND COMMAND``.

The output of the first goes into LOG and is shown when both have ended, that of the second as it comes. When one fails,
the other is stopped. No shell stands between: a signal reaches the command itself.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path


def run_both(log: Path, first: str, second: str) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        commands = (
            subprocess.Popen(shlex.split(first), stdout=file, stderr=subprocess.STDOUT),
            subprocess.Popen(shlex.split(second)),
        )
        while any(each.poll() is None for each in commands):
            if any(each.poll() for each in commands):
                for each in commands:
                    each.terminate()
            time.sleep(0.1)
    print(f"--- {first}", flush=True)
    print(log.read_text("utf-8", errors="replace"), flush=True)
    return max(abs(each.returncode) for each in commands)


if __name__ == "__main__":
    sys.exit(run_both(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
