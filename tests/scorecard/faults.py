"""What both programs that plant faults share: a fault, the tally of who found it, and the argument for a survivor."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from row import Tally


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


class Verdict(Enum):
    """What came of one fault."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    NONE = "no fault"  # the compiler refuses it: it is not counted, and the next is planted


def draw(faults: Iterable[Planted], seed: int) -> list[Planted]:
    """All of them in random order, every file and kind in turn, so that long files do not stand for all.

    The order hangs on what the faults are, not on how many there are: a change of the code leaves most of it as it was.
    """

    def chance(*of: str) -> bytes:
        return hashlib.sha256(f"{seed} {' '.join(of)}".encode()).digest()

    groups: dict[tuple[str, str], list[Planted]] = defaultdict(list)
    for fault in faults:
        groups[fault.file, fault.kind].append(fault)
    for group in groups.values():
        group.sort(key=lambda fault: (chance(fault.name), fault.line))
    order = sorted(groups, key=lambda key: chance(*key))
    longest = max(map(len, groups.values()))
    return [groups[key][turn] for turn in range(longest) for key in order if turn < len(groups[key])]


class Arguments(NamedTuple):
    """What a file of survivors says, by the names of the faults."""

    no_fault: dict[str, str]  # the change changes no result: it is no fault, and not planted
    survivors: dict[str, str]  # why no test finds it

    @classmethod
    def read(cls, path: Path) -> Arguments:
        """Of a JSON file with both."""
        return cls(**json.loads(path.read_text("utf-8"))) if path.exists() else cls({}, {})


def try_all(
    tally: Tally, faults: list[Planted], attempt: Callable[[Planted], tuple[Verdict, str]], arguments: Arguments
) -> None:
    """Plant one after the other; a survivor without an argument is a fault of the tests."""
    if tally.options.only:
        faults = [fault for fault in faults if tally.options.only in fault.name]
    for fault in faults:
        if tally.counts["faults planted"] >= tally.count or tally.over():
            break
        if fault.name in arguments.no_fault:
            tally.counts["changes that change no result, not counted"] += 1
            tally.notes.append(f"No fault: `{_quoted(fault)}`: {arguments.no_fault[fault.name]}")
            continue
        begun = time.monotonic()
        verdict, how = attempt(fault)
        took = f"{time.monotonic() - begun:.0f} s"
        print(f"{verdict.value}: {fault.kind}: {fault.line}: {fault.name} ({how}; {took})", flush=True)
        if verdict == Verdict.NONE:
            continue
        tally.counts["faults planted"] += 1
        tally.counts["caught"] += verdict == Verdict.CAUGHT
        if verdict == Verdict.CAUGHT:
            continue
        if fault.name in arguments.survivors:
            tally.counts["survivors with an argument"] += 1
            tally.notes.append(f"Survivor: `{_quoted(fault)}`: {arguments.survivors[fault.name]}")
        else:
            tally.fault(fault.name)
    planted, caught = tally.counts["faults planted"], tally.counts["caught"]
    if planted and caught < 0.95 * planted:
        tally.fault(f"{caught} of {planted} caught, fewer than 95 in 100")


def _quoted(fault: Planted) -> str:
    return fault.name.replace("`", " ")
