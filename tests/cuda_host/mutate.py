"""Plants faults in the CUDA kernels, one at a time, and asks the C++ tests on the emulated device to find each.

Needs the build of ``make test-cuda`` in build/cuda-host. Only the element type in which a fault shows is compiled anew,
and the tests stop at the first failure; without a fault they must pass. Prints a line for each fault and a summary;
fails where more than one in twenty survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fault import Fault
from mutations import FORWARD
from mutations_backward import BACKWARD
from mutations_edit import EDIT
from mutations_ragged import RAGGED

MUTATIONS: list[Fault] = [*FORWARD, *BACKWARD, *EDIT, *RAGGED]
ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "cuda-host" / "tests" / "cuda_host" / "CMakeFiles"
FLAGS = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-w"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time")
    parser.add_argument("--cases", type=int, default=100, help="generated cases for each")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the faults to plant (all)")
    options = parser.parse_args()
    if not OBJECTS.is_dir():
        print("The tests on the emulated device are not built: make test-cuda", file=sys.stderr)
        return 2
    faults = MUTATIONS if options.only is None else [MUTATIONS[number] for number in options.only]
    for fault in faults:
        check(fault)
    check_unharmed(faults, options.cases)
    with ThreadPoolExecutor(options.jobs) as pool:
        caught = list(pool.map(lambda fault: attempt(fault, options.cases), faults))
    survivors = [fault.name for fault, found in zip(faults, caught, strict=True) if not found]
    print(
        f"{len(faults) - len(survivors)} of {len(faults)} faults caught",
        *map("  survived: {}".format, survivors),
        sep="\n",
    )
    return int(len(survivors) > len(faults) // 20)


def check(fault: Fault) -> None:
    """Whether the fault's place is still there, before an hour is spent on the others."""
    count = len(place(fault).findall((ROOT / "cuda" / fault.file).read_text(encoding="utf-8")))
    if count != 1:
        raise SystemExit(f"{fault.name}: its place occurs {count} times in {fault.file}")


def check_unharmed(faults: list[Fault], cases: int) -> None:
    """Whether the same tests pass without a fault: else they would find whatever is planted."""
    for unit in {fault.unit for fault in faults}:
        with sources(f"unharmed-{unit}") as folder:
            found, how = run(build(unit, folder), cases)
        if found:
            raise SystemExit(f"the tests fail without a fault, with {unit} compiled anew: {how}")


def place(fault: Fault) -> re.Pattern[str]:
    """Where the fault goes, however its lines are broken."""
    return re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", fault.old))))


def attempt(fault: Fault, cases: int) -> bool:
    """Whether the tests find the fault."""
    with sources(str(MUTATIONS.index(fault))) as folder:
        source = folder / "cuda" / fault.file
        text = place(fault).sub(lambda _: fault.new.strip(), source.read_text(encoding="utf-8"))
        source.write_text(text, encoding="utf-8")
        found, how = run(build(fault.unit, folder), cases)
    print(f"{'caught' if found else 'SURVIVED'}: {fault.name} ({how})", flush=True)
    return found


@contextmanager
def sources(name: str) -> Iterator[Path]:
    """A folder with a copy of the kernels' sources, for as long as it is used."""
    folder = ROOT / "build" / "cuda-mutations" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(unit: str, folder: Path) -> Path:
    """The test program, with `unit` compiled from the sources of `folder`."""
    source = folder / "cuda" / unit
    target, program = folder / f"{source.stem}.o", folder / "tests"
    include = [f"-I{path}" for path in (folder / "cuda", ROOT / "csrc", ROOT / "tests" / "cuda_host")]
    subprocess.run(["g++", *FLAGS, *include, "-x", "c++", "-c", source, "-o", target], check=True)
    # First in line: of an inline function that all units have, the linker keeps the first copy.
    objects = [target, *(path for path in built_objects() if path.name.split(".")[0] != source.stem)]
    subprocess.run(["g++", *objects, "-lgtest", "-lgtest_main", "-pthread", "-o", program], check=True)
    return program


def built_objects() -> Iterator[Path]:
    """Those of the test program and of the library it is linked with."""
    return (path for path in sorted(OBJECTS.rglob("*.o")) if "ops.dir" not in str(path))


def run(program: Path, cases: int) -> tuple[bool, str]:
    environment = {**os.environ, "ATTNRB_TEST_CASES": str(cases), "GTEST_FAIL_FAST": "1", "GTEST_BRIEF": "1"}
    try:
        ran = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return True, "it never ends"
    if ran.returncode == 0:
        return False, "all tests pass"
    if ran.returncode > 0:
        failed = [line.split("]")[1].split(",")[0].strip() for line in ran.stdout.splitlines() if "FAILED  ]" in line]
        return True, failed[0] if failed else "a test fails"
    return True, (ran.stderr.strip().splitlines() or [f"signal {-ran.returncode}"])[-1]


if __name__ == "__main__":
    sys.exit(main())
