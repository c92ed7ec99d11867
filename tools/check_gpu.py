"""Everything that a GPU can tell of attnrb, in nine minutes, the most telling first.

    tools/check-gpu [ARCHITECTURE]                # here: the C++ tests and the CUDA library, in build/check-gpu
    python3 tools/check_gpu.py --out FOLDER       # there: this file; it needs torch, pytest, and no network

Each step has a limit of its own and writes what it said to a file of FOLDER; a step that fails stops no other.
`summary.txt` has a line for each. The exit status is 1 where one failed. Where there is no GPU, every step says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "check-gpu"
TESTS, LIBRARY = BUILT / "attnrb_gpu_tests", BUILT / "libattnrb_cuda.so"
MINUTES = 9


@dataclass(frozen=True)
class Step:
    """What is run, and for how many seconds at most."""

    name: str
    seconds: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def _pytest(*files: str) -> tuple[str, ...]:
    return (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/python/{name}.py" for name in files),
    )


def _sanitizer(tool: str) -> Step:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", str(TESTS), "--gtest_brief=1")
    return Step(f"sanitizer-{tool}", 30, command, {"ATTNRB_TEST_CASES": "16"})


def _by_library(kernel: str) -> Step:
    """The op tests where PyTorch is left one kernel alone: it would choose one by itself, and the others never run."""
    files = ("test_dense_part", "test_dense_gradients")
    return Step(f"library-{kernel}", 25, _pytest(*files), {"ATTNRB_TEST_DEVICE": "cuda", "ATTNRB_TEST_LIBRARY": kernel})


_DESCRIBE = "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"
_INSTALL = f"""
{sys.executable} -m pip install -q --no-build-isolation --no-deps --no-index -C cmake.define.ATTNRB_CUDA=OFF . &&
{sys.executable} -c "
import shutil, sys; sys.path.pop(0)
import attnrb; from pathlib import Path
shutil.copy('{LIBRARY}', Path(attnrb.__file__).parent)
" && cd / && {sys.executable} -m attnrb info
"""

STEPS = (
    Step("machine", 10, ("nvidia-smi",)),
    Step("torch", 15, (sys.executable, "-c", _DESCRIBE)),
    Step("kernels", 60, (str(TESTS), "--gtest_brief=1"), {"ATTNRB_TEST_CASES": "400"}),
    Step("package", 90, ("sh", "-c", _INSTALL)),
    Step("capture", 30, _pytest("test_gpu")),
    Step("models", 45, _pytest("test_gpu_models")),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    *(_by_library(kernel) for kernel in ("cudnn", "flash", "efficient")),
    Step(
        "ops",
        40,
        _pytest("test_accuracy_attention", "test_ops_errors", "test_paging", "test_paging_errors"),
        {"ATTNRB_TEST_DEVICE": "cuda", "ATTNRB_TEST_SAMPLE": "7", "ATTNRB_TEST_GRADIENT_SAMPLE": "11"},
    ),
    Step(
        "bench",
        85,
        (
            *(
                sys.executable,
                "bench/python/bench_gpu.py",
                "--contenders",
                "attnrb",
                "sdpa",
                "--lengths",
                "4096",
                "16384",
            ),
            *("--batches", "1", "64", "--seconds", "0.5", "--profile", "--json", "{out}/bench.json"),
        ),
    ),
    _sanitizer("synccheck"),
)


def has_device() -> bool:
    """Whether a GPU is at hand; asked without torch."""
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.run([program], capture_output=True, check=False).returncode == 0


def run(step: Step, out: Path) -> str:
    """What became of a step, in a few words."""
    command = [word.format(out=out) if "{out}" in word else word for word in step.command]
    environment = {**os.environ, "ATTNRB_REQUIRE_CUDA": "1", "OMP_NUM_THREADS": "2", **step.environment}
    begin = time.monotonic()
    with (out / f"{step.name}.log").open("wb") as log:
        try:
            ran = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=step.seconds,
                check=False,
            )
            became = "passed" if ran.returncode == 0 else f"failed with status {ran.returncode}"
        except subprocess.TimeoutExpired:
            became = f"stopped after {step.seconds} s"
        except OSError as error:
            became = f"did not start: {error.strerror}"
    return f"{became} ({time.monotonic() - begin:.0f} s)"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="these alone")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device, failed = has_device(), False
    with (options.out / "summary.txt").open("w", encoding="utf-8") as summary:
        for step in STEPS:
            if options.steps and step.name not in options.steps:
                continue
            became = run(step, options.out.resolve()) if device else "no device"
            failed = failed or not became.startswith(("passed", "no device"))
            print(f"{step.name}: {became}", flush=True)
            print(f"{step.name}: {became}", file=summary, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
