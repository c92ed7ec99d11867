"""What both programs that plant faults share: a fault, the tally of who found it, and the argument for a survivor."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from row import ROOT, Tally


class Planted(NamedTuple):
    """One fault: in `file`, the text of `line` (from 1) becomes `new`."""

    file: str  # under csrc/core or python/attnrb
    line: int
    kind: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """What an argument is filed under: independent of the line's number."""
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"


def draw(faults: Iterable[Planted], count: int, seed: int) -> list[Planted]:
    """So many of them, every file and kind in turn, so that long files do not stand for all."""
    groups: dict[tuple[str, str], list[Planted]] = defaultdict(list)
    for fault in faults:
        groups[fault.file, fault.kind].append(fault)
    rng = random.Random(seed)
    for key in sorted(groups):
        rng.shuffle(groups[key])
    order = sorted(groups)
    rng.shuffle(order)
    found: list[Planted] = []
    while len(found) < count and any(groups.values()):
        for key in order:
            if groups[key] and len(found) < count:
                found.append(groups[key].pop())
    return found


def try_all(
    tally: Tally, faults: list[Planted], attempt: Callable[[Planted], tuple[bool, str]], arguments: Path
) -> None:
    """Plant one after the other; a survivor without an argument is a fault of the tests.

    `arguments` is a JSON file of survivors by their name, with the sentence why no test could or should find them.
    """
    known: dict[str, str] = json.loads(arguments.read_text("utf-8")) if arguments.exists() else {}
    for number, fault in enumerate(faults):
        if tally.over():
            break
        found, how = attempt(fault)
        print(f"{number}: {'caught' if found else 'SURVIVED'}: {fault.kind}: {fault.name} ({how})", flush=True)
        tally.counts["faults planted"] += 1
        tally.counts["caught"] += found
        if found:
            continue
        if fault.name in known:
            tally.notes.append(f"`{fault.name.replace('`', ' ')}`: {known[fault.name]}")
        else:
            tally.fault(fault.name)
    tally.counts["survivors, each with an argument below"] = len(tally.notes)
    planted, caught = tally.counts["faults planted"], tally.counts["caught"]
    if planted and caught < 0.95 * planted:
        tally.fault(f"{caught} of {planted} caught, fewer than 95 in 100")


def relative(path: Path) -> str:
    """As the repository names it."""
    return str(path.relative_to(ROOT))
