"""What every row of the scorecard shares: its options, its time, and the file that docs/reliability.md is made from.

A row is a program: ``python tests/scorecard/NAME.py --count N --seed S --seconds T``. It tries N generated cases from
seed S on, stops early when T seconds are over, and writes what it counted to ``build/scorecard/NAME.json``. It ends
with 1 where it found a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "scorecard"
_PATHS = ("--out", "--program")
_SHOWN = 40  # faults that are written out; all of them are counted
# What Linux calls by a number only.
_GENERATIONS = {
    ("GenuineIntel", "143"): "Intel Xeon, Sapphire Rapids",
    ("GenuineIntel", "207"): "Intel Xeon, Emerald Rapids",
}
_VERSIONS = ("attnrb", "torch", "transformers", "numpy")


@dataclass
class Tally:
    """What a row has seen so far.

    Attributes:
        counts: figures by their label, as the page shows them; the labels are read by people.
        faults: a line for each fault.
        notes: sentences for the page, such as the argument for a survivor.
    """

    seed: int
    count: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    options: argparse.Namespace = field(default_factory=argparse.Namespace)
    _start: float = field(default_factory=time.monotonic)

    def seeds(self, each: int = 1) -> Iterator[int]:
        """The seeds to try, one after the other, until the count or the time is used up.

        Seeds of a row with ``--seed 1`` share none with those of ``--seed 0``.
        """
        first = self.seed * 10_000_000
        for seed in range(first, first + self.count, each):
            if self.over():
                return
            yield seed

    def restart(self) -> None:
        """Count the time from now on."""
        self._start = time.monotonic()

    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() - self._start > self.seconds

    def see(self, label: str, value: float) -> None:
        """Keep the largest value of a label."""
        self.largest[label] = max(self.largest.get(label, value), value)

    def fault(self, line: str) -> None:
        """Note a fault, and say it at once."""
        self.faults.append(line)
        print(f"FAULT: {line}", file=sys.stderr, flush=True)


def processor() -> str:
    """The name of this processor, with what of its instruction sets the kernels ask for."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = [line.partition(":") for line in text.splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = facts.get("flags", "").split()
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    name = facts.get("model name", platform.machine()).replace("(R)", "")
    name = _GENERATIONS.get((facts.get("vendor_id", ""), facts.get("model", "")), name)
    return f"{name}, {os.cpu_count()} cores, {', '.join(sets)}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, where they are installed."""
    found = {"Python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def save(name: str, command: str, started: datetime, tally: Tally, folder: Path) -> dict[str, Any]:
    """Write a row's file, whole or not at all, and return what is in it."""
    result = {
        "row": name,
        "command": command,
        "date": started.strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(time.monotonic() - tally._start, 1),
        "processor": processor(),
        "versions": versions(),
        "counts": dict(tally.counts),
        "largest": tally.largest,
        "notes": tally.notes,
        "fault_count": len(tally.faults),
        "faults": tally.faults[:_SHOWN],
    }
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.json.unfinished"
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    unfinished.replace(folder / f"{name}.json")
    return result


def run(name: str, doc: str | None, work: Callable[[Tally], None], *, count: int, **extra: Any) -> int:
    """Parse the command line, do the work and write its file.

    Args:
        name: of the row, and of its file.
        doc: the description.
        work: what fills the tally.
        count: cases unless the command line says otherwise.
        extra: further options and their defaults.

    Returns:
        The exit code: 1 where there were faults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop when they are over")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    for option, default in extra.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    started = datetime.now(timezone.utc)
    tally = Tally(options.seed, options.count, options.seconds, options=options)
    try:
        work(tally)
    except (Exception, SystemExit) as error:  # the page says that too: no row is without a figure
        tally.fault(f"the row ended early: {type(error).__name__}: {' '.join(str(error).split())[:1500]}")
    command = " ".join(["python", f"tests/scorecard/{Path(sys.argv[0]).name}", *map(shlex.quote, _shown_options())])
    result = save(name, command, started, tally, options.out)
    shown = [f"{value:,} {label}" for label, value in tally.counts.items()]
    shown += [f"{label} {value:.3g}" for label, value in tally.largest.items()]
    print(f"{name}: {', '.join(shown)}; {len(tally.faults):,} faults in {result['seconds']} s", flush=True)
    return int(bool(tally.faults))


def _shown_options() -> list[str]:
    """The command line without what belongs to a machine: folders and programs by their paths."""
    arguments, found = iter(sys.argv[1:]), []
    for argument in arguments:
        if argument in _PATHS:
            next(arguments, None)
        elif not argument.startswith(tuple(f"{name}=" for name in _PATHS)):
            found.append(argument)
    return found
