r"""Instructions of the inner loops of kernels, from a disassembly: what can be compared where no clock can be read.

``count_instructions.py OBJECT...`` takes objects or archives of one architecture (``build/cpp/libattnrb_core.a``,
``build/aarch64/libattnrb_core.a``) and prints a table: for each instruction set, the instructions that one query row
spends on one key of width 128. ``--loops`` shows the loops that they come from.

``--functions REGEX`` counts in functions of others instead, by their names in a library: those of OpenBLAS, say, which
PyTorch's attention multiplies with on ARM.

    python3 tools/count_instructions.py --objdump aarch64-linux-gnu-objdump --functions 'sgem[mv]_\w+_NEOVERSEN1' \
      build/aarch64-python/site/torch/lib/libopenblas-*.so.0
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

WIDTH = 128

# Products that an instruction adds up; on x86 for each lane of its register.
_PRODUCTS = {"fmla": 4, "fmls": 4, "bfdot": 8, "bfmmla": 16}
_X86_PRODUCTS = {"vfmadd": 1, "vfnmadd": 1, "vfmsub": 1, "vfnmsub": 1, "vdpbf16ps": 2}
_ROUNDS = ("frintn", "vroundps", "vrndscaleps")
_MAXIMA = ("fmax", "vmaxps", "maxps")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    def target(self) -> int | None:
        """Where a branch goes, within its function."""
        if not re.match(r"(b\.|b$|cb|tb|j)", self.name):
            return None
        found = re.findall(r"\b([0-9a-f]+) <", self.operands)
        return int(found[-1], 16) if found else None

    def lanes(self) -> int:
        """Floats of the register that it works on."""
        if "%zmm" in self.operands:
            return 16
        if "%ymm" in self.operands:
            return 8
        return 4 if "%xmm" in self.operands or re.search(r"\bv\d+\.4s", self.operands) else 0

    def products(self) -> int:
        if self.name in _PRODUCTS:
            return _PRODUCTS[self.name] if re.search(r"\bv\d+\.4s", self.operands) else 0
        for start, times in _X86_PRODUCTS.items():
            if self.name.startswith(start) and self.name.endswith("ps"):
                return times * self.lanes()
        return 0


@dataclass(frozen=True)
class Loop:
    """A loop in which no other multiplies."""

    function: str
    body: tuple[Instruction, ...]

    @property
    def set(self) -> str:
        found = re.search(r"attnrb::(\w+)::", self.function)
        return found[1] if found else ""

    def products(self) -> int:
        return sum(each.products() for each in self.body)

    def lanes_of(self, names: tuple[str, ...]) -> int:
        return sum(each.lanes() for each in self.body if each.name in names)


def functions(disassembly: str) -> Iterator[tuple[str, list[Instruction]]]:
    name, body = "", list[Instruction]()
    for line in disassembly.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            yield name, body
            name, body = head[1], []
        elif (found := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line)) and name:
            body.append(Instruction(int(found[1], 16), found[2], found[3]))
    yield name, body


def loops(function: str, body: list[Instruction]) -> Iterator[Loop]:
    """Runs of instructions that end with a branch to their first; inner ones only prefetch, say, and count once."""
    places = {each.address: index for index, each in enumerate(body)}
    runs = [
        (places[target], index)
        for index, each in enumerate(body)
        if (target := each.target()) is not None and target <= each.address and target in places
    ]
    multiplying = [run for run in runs if any(each.products() for each in body[run[0] : run[1] + 1])]
    for first, last in multiplying:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in multiplying):
            yield Loop(function, tuple(body[first : last + 1]))


class Work(NamedTuple):
    """What is counted: functions by name, and how many instructions of the best loop there go to a key and a row."""

    name: str
    functions: str
    softmax: bool = False


_WORKS = (
    Work("float32 prefill, products", r"multiply_panel<.*FloatProduct|FloatEngine<float>"),
    Work("bfloat16 prefill, products", r"multiply_panel<.*Bf16Product|Bf16Engine::|<.*Bf16Engine>::attend"),
    Work("float32 prefill, softmax", r"Prefill<.*FloatEngine<float>.*attend_strip", softmax=True),
    Work("bfloat16 prefill, softmax", r"Prefill<.*Bf16Engine>.*attend_strip", softmax=True),
    Work("float32 decode, products", r"Decode<.*Dot<float>"),
    Work("bfloat16 decode, products", r"Decode<.*(Dot<attnrb::bfloat16>|Bf16Dot)"),
    Work("float32 backward, products", r"(GradientProducts|multiply_columns|Gradient)<.*<float>"),
    Work(
        "bfloat16 backward, products",
        r"Products<.*(bfloat16|Bf16)|multiply_columns<.*(bfloat16|Bf16)|Gradient<.*(bfloat16|Bf16)",
    ),
)


def instructions(loop: Loop, work: Work) -> float | None:
    """For a key and a row: over WIDTH products, or over one weight."""
    rounds = loop.lanes_of(_ROUNDS)
    if work.softmax:
        return len(loop.body) / rounds if rounds and loop.products() else None
    return WIDTH * len(loop.body) / loop.products() if loop.products() >= 64 and not rounds else None


def table(found: list[Loop]) -> dict[str, dict[str, tuple[float, Loop]]]:
    """By set, then by work: the fewest instructions of any loop, which is the one that large problems run."""
    best: dict[str, dict[str, tuple[float, Loop]]] = {}
    for loop in found:
        for work in _WORKS:
            count = instructions(loop, work) if re.search(work.functions, loop.function) else None
            row = best.setdefault(loop.set, {})
            if count is not None and (work.name not in row or count < row[work.name][0]):
                row[work.name] = (count, loop)
    return {name: row for name, row in best.items() if row}


def named(library: str, pattern: str, objdump: str) -> Iterator[Loop]:
    """The loops of those functions of a library whose names match, up to where the next function begins.

    What is written in assembly has no size in the table of symbols.
    """
    symbols = subprocess.run(
        [objdump.replace("objdump", "nm"), "-C", "--defined-only", "--numeric-sort", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    found = [line.split(maxsplit=2) for line in symbols if len(line.split(maxsplit=2)) == 3]
    places = [(int(address, 16), name) for address, kind, name in found if kind in "tTwW"]
    for index, (address, name) in enumerate(places[:-1]):
        if not re.fullmatch(pattern, name):
            continue
        end = next(after for after, _ in places[index + 1 :] if after > address)
        span = [f"--start-address={address}", f"--stop-address={end}"]
        command = [objdump, "-d", "-C", "--no-show-raw-insn", *span, library]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        body = [each for _, part in functions(text) for each in part]
        yield from loops(name, body)


def show_named(found: list[Loop]) -> None:
    """The loop of each function that spends the fewest instructions on a product: large problems run it."""
    best: dict[str, Loop] = {}
    for loop in found:
        old = best.get(loop.function)
        if loop.products() and (old is None or len(loop.body) / loop.products() < len(old.body) / old.products()):
            best[loop.function] = loop
    print("| function | instructions | products | instructions a key and row |\n| --- | ---: | ---: | ---: |")
    for name, loop in sorted(best.items()):
        count = WIDTH * len(loop.body) / loop.products()
        print(f"| `{name}` | {len(loop.body)} | {loop.products()} | {count:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objects", nargs="+", metavar="OBJECT")
    parser.add_argument("--objdump", default="objdump", help="that of the architecture: aarch64-linux-gnu-objdump")
    parser.add_argument("--loops", action="store_true", help="show what the loops consist of")
    parser.add_argument("--functions", metavar="REGEX", help="of others, by their whole names")
    options = parser.parse_args()
    if options.functions:
        show_named([each for one in options.objects for each in named(one, options.functions, options.objdump)])
        return 0
    command = [options.objdump, "-d", "-C", "--no-show-raw-insn", *options.objects]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    best = table([loop for name, body in functions(text) for loop in loops(name, body)])
    sets = list(best)
    print("| instructions a key and row |", " | ".join(f"`{name}`" for name in sets), "|")
    print("| --- |", " | ".join("---:" for _ in sets), "|")
    for work in _WORKS:
        cells = [f"{best[name][work.name][0]:.1f}" if work.name in best[name] else "" for name in sets]
        print(f"| {work.name} |", " | ".join(cells), "|")
    if options.loops:
        for name, row in best.items():
            for work_name, (count, loop) in row.items():
                kinds = Counter(each.name for each in loop.body)
                print(
                    f"\n{name}, {work_name}: {count:.2f}, {loop.products()} products in {len(loop.body)} instructions"
                )
                print(f"  {loop.function[:150]}")
                print("  " + ", ".join(f"{kind} {times}" for kind, times in kinds.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
