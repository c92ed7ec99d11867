"""Plants faults in the CUDA kernels, one at a time, and asks the tests on the emulated device to find each.

Needs the build of ``make test-cuda`` in build/cuda-host. Prints a line for each fault and a summary; fails where more
than one in twenty survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-host"
TYPES = ("float32", "bfloat16", "float16")
FLAGS = ["-std=c++17", "-O1", "-DATTNRB_CUDA_EMULATED", "-Wno-unknown-pragmas"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time")
    parser.add_argument("--cases", type=int, default=100, help="generated cases for each")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the faults to plant (all)")
    options = parser.parse_args()
    if not (BUILD / "tests" / "cuda_host" / "attnrb_cuda_tests").is_file():
        print("The tests on the emulated device are not built: make test-cuda", file=sys.stderr)
        return 2
    numbers = range(len(MUTATIONS)) if options.only is None else options.only
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda number: attempt(number, options.cases), numbers))
    survivors = [MUTATIONS[number][0] for number, caught in zip(numbers, results, strict=True) if not caught]
    print(
        f"{len(results) - len(survivors)} of {len(results)} faults caught",
        *map("  survived: {}".format, survivors),
        sep="\n",
    )
    return int(len(survivors) > len(results) // 20)


def attempt(number: int, cases: int) -> bool:
    """Whether the tests find the fault."""
    name, file, old, new = MUTATIONS[number]
    folder = ROOT / "build" / "cuda-mutations" / str(number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    source = folder / "cuda" / file
    text = source.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{name}: its place occurs {text.count(old)} times in {file}")
    source.write_text(text.replace(old, new), encoding="utf-8")
    verdict, how = run(folder, cases)
    print(f"{'caught' if verdict else 'SURVIVED'}: {name} ({how})", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


def run(folder: Path, cases: int) -> tuple[bool, str]:
    include = [f"-I{folder / 'cuda'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host'}"]
    objects = []
    for kind in TYPES:
        target = folder / f"{kind}.o"
        subprocess.run(
            ["g++", *FLAGS, *include, "-x", "c++", "-c", folder / "cuda" / f"{kind}.cu", "-o", target], check=True
        )
        objects.append(target)
    tests = BUILD / "tests" / "cuda_host" / "CMakeFiles"
    others = [
        path for path in tests.rglob("*.o") if "ops.dir" not in str(path) and path.stem.split(".")[0] not in TYPES
    ]
    program = folder / "tests"
    subprocess.run(["g++", *objects, *others, "-lgtest", "-lgtest_main", "-pthread", "-o", program], check=True)
    environment = {**os.environ, "ATTNRB_TEST_CASES": str(cases), "GTEST_FAIL_FAST": "1", "GTEST_BRIEF": "1"}
    try:
        ran = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        return True, "it never ends"
    if ran.returncode == 0:
        return False, "all tests pass"
    said = (ran.stderr.strip().splitlines() or ran.stdout.strip().splitlines() or [f"signal {-ran.returncode}"])[-1]
    return True, said if ran.returncode < 0 else "a test fails"


if __name__ == "__main__":
    sys.exit(main())
