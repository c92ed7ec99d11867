"""Instructions that the CUDA kernels spend on a piece of work, from their machine code: no GPU is needed to count them.

``count_sass.py LIBRARY`` takes a library or a cubin (``build/cuda/libattnrb_cuda.so``) and prints a table. A count is
that of the cheapest way through a kernel that does the work: so many products, copies and exponentials, which is what a
whole tile takes whose rows lie on 16 bytes, are all visible, and have no outlier in it. Everything that is issued is
counted, whatever its predicate says.
"""

from __future__ import annotations

import argparse
import heapq
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# The enumerations in cuda/kernels/*parameters.h, by number.
TASKS = {
    "GradientTask": ("queries", "keys", "received_deltas", "received_queries", "received_keys", "rest", "bias"),
    "Task": ("source", "rebalance", "softmax", "edited", "biased_softmax", "rest"),
}

PRODUCT, COPY, EXPONENTIAL = r"HMMA", r"LDGSTS", r"MUFU\.EX2"
LOAD, WIDE_LOAD, WIDE_STORE = r"LDG\.(?!.*128)", r"LDG\..*128", r"STG\..*128"


class Work(NamedTuple):
    """What is counted: instructions of which kinds a kernel issues for it, once around a loop or from its first on."""

    name: str
    kernel: str
    most: int  # instructions that it may take
    issues: tuple[tuple[str, int], ...]
    loop: bool = True
    times: int = 1  # as which it is done at once


def tile(products: int, copies: int, exponentials: int) -> tuple[tuple[str, int], ...]:
    return ((PRODUCT, products), (COPY, copies), (EXPONENTIAL, exponentials))


# Of bfloat16, 128 wide, for one of the four warps. A tile has 64 keys: 64 products of scores and as many of values, 8
# copies of keys and as many of values by each thread, and an exponential of each of a lane's 32 scores and 2 rows. A
# warp corrects two rows at once: with ten outliers each it takes that many units of keys and values, in turns of four,
# beside those of queries and outputs.
WORKS = (
    Work("a tile strengthened", "attention_kernel<bfloat16, 128, rebalance>", 950, tile(128, 16, 34)),
    Work("a tile looked through for outliers", "select_kernel<bfloat16>", 600, tile(64, 8, 0)),
    Work(
        "a row with ten outliers",
        "correction_kernel<bfloat16, 16>",
        700,
        ((WIDE_LOAD, 22), (LOAD, 15), (EXPONENTIAL, 10), (WIDE_STORE, 1)),
        loop=False,
        times=2,
    ),
)


class Instruction(NamedTuple):
    address: int
    predicated: bool
    name: str
    operands: str

    def target(self) -> int | None:
        found = re.search(r"\b0x([0-9a-f]+)\b", self.operands)
        return int(found[1], 16) if found else None

    def barrier(self) -> str:
        found = re.search(r"\bB\d+\b", self.operands)
        return found[0] if found else ""


ENDS = ("BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSYNC")


def tool(*arguments: str) -> str:
    """What cuobjdump says; it comes with the CUDA toolkit, or with a package of its own."""
    packaged = [
        str(path)
        for folder in getattr(find_spec("nvidia"), "submodule_search_locations", None) or ()
        for path in Path(folder).glob("*/bin")
    ]
    search = os.pathsep.join([*packaged, os.environ.get("PATH", "")])
    program = shutil.which("cuobjdump", path=search)
    if program is None or shutil.which("nvdisasm", path=search) is None:
        raise FileNotFoundError(
            "cuobjdump and nvdisasm are not installed (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
        )
    environment = {**os.environ, "PATH": search}
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True, env=environment).stdout


@cache
def demangled(name: str) -> str:
    """As kernels are called here: ``attention_kernel<bfloat16, 128, rebalance>``."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    kernel = re.match(r"void attnrb::cuda::(\w+)<(.*)>\(", text)
    if kernel is None:
        return text.split("(")[0].removeprefix("attnrb::cuda::")
    arguments = kernel[2].replace("attnrb::cuda::", "").replace("attnrb::", "")
    for kind, names in TASKS.items():
        for number, task in enumerate(names):
            arguments = arguments.replace(f"({kind}){number}", task)
    return f"{kernel[1]}<{arguments}>"


def kernels(library: Path | str, architecture: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of one architecture."""
    found: dict[str, list[Instruction]] = {}
    listing: list[Instruction] = []
    for line in tool("--dump-sass", "--gpu-architecture", architecture, str(library)).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            listing = found.setdefault(demangled(match[1]), [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;/]*)", line):
            listing.append(Instruction(int(match[1], 16), match[2] is not None, match[3], match[4]))
    return found


class Run(NamedTuple):
    """Instructions that follow each other: nothing jumps into them, and only the last jumps elsewhere."""

    size: int
    issued: tuple[int, ...]  # of each kind that is counted
    copies: bool
    barriers: tuple[tuple[str, int], ...]  # that warps are told to meet at, and where
    last: Instruction
    target: int | None  # of the last
    following: int | None  # the address behind them


def runs(listing: list[Instruction], work: Work) -> dict[int, Run]:
    targets = {each.target() for each in listing if each.name.startswith((*ENDS, "BSSY", "WARPSYNC"))}
    kinds = [re.compile(kind) for kind, _ in work.issues]
    found: dict[int, Run] = {}
    body: list[Instruction] = []
    for index, each in enumerate(listing):
        following = listing[index + 1].address if index + 1 < len(listing) else None
        body.append(each)
        if each.name.startswith(ENDS) or following is None or following in targets:
            found[body[0].address] = Run(
                size=len(body),
                issued=tuple(sum(bool(kind.match(one.name)) for one in body) for kind in kinds),
                copies=any(one.name.startswith(COPY) for one in body),
                barriers=tuple(
                    (one.barrier(), target)
                    for one in body
                    if one.name.startswith("BSSY") and (target := one.target()) is not None
                ),
                last=each,
                target=each.target(),
                following=following,
            )
            body = []
    return found


class State(NamedTuple):
    """Where a warp stands, what it is to meet at, where it returns to, what it issued so far, and where it copied."""

    address: int
    barriers: tuple[tuple[str, int], ...]
    returns: tuple[int, ...]
    issued: tuple[int, ...]
    copied: tuple[int, ...] = ()


END = -1


def successors(run: Run, state: State) -> Iterator[State]:
    """Where a warp may go from the end of a run; END is the end of the kernel."""
    last, name, target = run.last, run.last.name.split(".")[0], run.target
    barriers = state.barriers
    if run.barriers or name == "BSYNC":
        known = {**dict(barriers), **dict(run.barriers)}
        if name == "BSYNC":
            target = known.pop(last.barrier(), run.following)
        barriers = tuple(sorted(known.items()))

    def at(address: int | None, returns: tuple[int, ...] = state.returns) -> Iterator[State]:
        if address is not None:
            yield State(address, barriers, returns, state.issued, state.copied)

    if name in ("BRA", "JMP"):
        yield from at(target)
        # A second predicate, or a uniform one, stands before the target.
        if last.predicated or re.search(r"\b(U?P\d|UR\d+)\b", last.operands):
            yield from at(run.following)
    elif name == "CALL" and run.following is not None and len(state.returns) < 2:
        yield from at(target, (*state.returns, run.following))
    elif name == "RET" and state.returns:
        yield from at(state.returns[-1], state.returns[:-1])
    elif name == "EXIT":
        yield from at(END)
        if last.predicated:
            yield from at(run.following)
    elif name == "BSYNC":
        yield from at(target)
        if last.predicated:
            yield from at(run.following)
    elif name not in ("RET", "BRX", "CALL"):
        yield from at(run.following)


def cheapest(found: dict[int, Run], work: Work, start: int, end: int) -> int | None:
    """The fewest instructions from `start` to `end` that issue what the work takes, no more and no less.

    No copies are made twice: those of keys do not stand for those of values.
    """
    wanted = tuple(count for _, count in work.issues)
    first = State(start, (), (), tuple(0 for _ in wanted))
    queue, known, tie = [(0, 0, first)], {first: 0}, 0
    while queue:
        spent, _, state = heapq.heappop(queue)
        if spent and state.address == end and state.issued == wanted:
            return spent
        if known[state] < spent or state.address not in found:
            continue
        run = found[state.address]
        issued = tuple(a + b for a, b in zip(state.issued, run.issued, strict=True))
        if any(a > b for a, b in zip(issued, wanted, strict=True)) or (run.copies and state.address in state.copied):
            continue
        copied = (*state.copied, state.address) if run.copies else state.copied
        for after in successors(run, state._replace(issued=issued, copied=copied)):
            if known.get(after, sys.maxsize) > spent + run.size:
                known[after], tie = spent + run.size, tie + 1
                heapq.heappush(queue, (known[after], tie, after))
    return None


def instructions(listing: list[Instruction], work: Work) -> int | None:
    """What the kernel spends on the work; None where it has no way to do just that."""
    found = runs(listing, work)
    if not work.loop:
        count = cheapest(found, work, listing[0].address, END)
        return None if count is None else count // work.times
    spent = []
    for run in found.values():
        head, end = run.target, run.last.address
        if not run.last.name.startswith("BRA") or head is None or head > end:
            continue
        # A loop that holds all of it, be it in loops of its own, and where it goes without leaving that.
        inside = {address: one for address, one in found.items() if head <= address <= end}
        totals = [sum(each) for each in zip(*(one.issued for one in inside.values()), strict=True)]
        if all(total >= count or kind == PRODUCT for total, (kind, count) in zip(totals, work.issues, strict=True)):
            spent.append(cheapest(inside, work, head, head))
    return min((each for each in spent if each is not None), default=None)


def counts(library: Path | str, architecture: str) -> dict[str, int | None]:
    """What each piece of work takes, by its name: of those whose kernels the library has."""
    listings = kernels(library, architecture)
    return {work.name: instructions(listings[work.kernel], work) for work in WORKS if work.kernel in listings}


def table(found: dict[str, dict[str, int | None]]) -> list[str]:
    """Lines of a Markdown table, from the counts of each architecture."""
    lines = [f"| bfloat16, 128 wide | kernel | {' | '.join(found)} |", "| --- | --- |" + " ---: |" * len(found)]
    for work in WORKS:
        cells = [f"{count:,}" if (count := each.get(work.name)) is not None else "" for each in found.values()]
        if any(cells):
            lines.append(f"| {work.name} | `{work.kernel}` | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, metavar="LIBRARY")
    parser.add_argument(
        "architectures", nargs="*", default=["sm_80", "sm_90"], help="of which the library has code (sm_80 sm_90)"
    )
    options = parser.parse_args()
    print(*table({each: counts(options.library, each) for each in options.architectures}), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
