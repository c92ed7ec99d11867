"""Running programs, and keeping what came of them: what dist.py, aarch64.py and matrix.py share."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "dist"
FILES = WORK / "files.json"  # what is in each wheel
TRIED = WORK / "tried.json"  # the bare environments
EMULATED = WORK / "emulated.json"  # the tests for ARM


def run(*command: object, **keywords: Any) -> str:
    """Run it and return what it printed; its own words and a plain sentence where it fails."""
    words = [str(each) for each in command]
    print("$", " ".join(words), flush=True)
    done = subprocess.run(words, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **keywords)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{Path(words[0]).name} ended with {done.returncode}")
    return done.stdout


def watch(*command: object, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run it with more in its environment, and show what it prints. Returns the exit code, and what it printed."""
    words = [str(each) for each in command]
    added = [f"{name}={value}" for name, value in (environment or {}).items()]
    print("$", " ".join([*added, *words]), flush=True)
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def counts(said: str) -> dict[str, int]:
    """The numbers in pytest's last line; none where it has none."""
    last = said.splitlines()[-1] if said else ""
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}


def today() -> str:
    """The date, for tables."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def kept(file: Path) -> list[dict[str, Any]]:
    """What `remember` wrote to it."""
    found: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.exists() else []
    return found


def remember(file: Path, found: dict[str, Any], same: tuple[str, ...]) -> None:
    """Adds what was found to the list in a file, in place of what was found earlier of the `same`."""
    others = [old for old in kept(file) if any(old[name] != found[name] for name in same)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([*others, found], indent=1) + "\n", "utf-8")
