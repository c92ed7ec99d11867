"""Builds of C++ that rows of the scorecard share. Two are those of ``make test-cpp``: what it built is used."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

from row import ROOT

TOOLS = ROOT / ".venv" / "bin"
PLAIN = ROOT / "build" / "cpp"
SANITIZED = ROOT / "build" / "cpp-sanitized"
THREADED = ROOT / "build" / "cpp-threads"


def _options(folder: Path) -> list[str]:
    """As tools/native.mk configures them. ThreadSanitizer gets one instruction set: threads share the same in all."""
    if folder == SANITIZED:
        return ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DATTNRB_SANITIZE=address,undefined"]
    if folder == THREADED:
        options = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1", "-DATTNRB_SANITIZE=thread"]
        return [*options, "-DATTNRB_ONLY=avx2"]
    return [f"-DATTNRB_CORE_ARCHIVE={ROOT / 'build' / 'core' / 'libattnrb_core.a'}"]


def build(folder: Path, *targets: str) -> None:
    """Build what changed since. Rows run at the same time: one of them builds, and the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    configure = [TOOLS / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={TOOLS / 'ninja'}"]
    configure += ["-DATTNRB_BUILD_PACKAGE=OFF", "-DATTNRB_BUILD_TESTS=ON", "-DATTNRB_WERROR=ON", *_options(folder)]
    with (folder / "scorecard.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (configure, [TOOLS / "ninja", "-C", folder, *targets]):
            run_step(step)


def run_step(command: list[str | Path]) -> str:
    """What a step of a build says; where it fails, the program ends with that."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if ran.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:4]))} ... failed:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    return ran.stdout


def _environment() -> dict[str, str]:
    """Without make's own options, which ninja would take for a jobserver."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
