"""Make the wheel for 64-bit ARM on another machine, and try it from Python under qemu's user-mode emulation.

    python tools/aarch64.py wheel                     # cross-compile it into dist/, and look at it
    python tools/aarch64.py test                      # with it: every op, then a sample of the op tests
    python tools/aarch64.py test neon                 # that sample for some kernels: neon_bf16, neon, portable
    python tools/aarch64.py run -c 'import attnrb'    # that Python, with any arguments

Nothing is installed on this machine. In ``build/aarch64-python`` stand a Python of Debian's packages for ARM, unpacked,
and torch, NumPy and pytest in their wheels for ARM. Needs Debian or Ubuntu with ``g++-aarch64-linux-gnu`` and
``qemu-user``. The emulated processor has everything (bfloat16 products too); ``QEMU_CPU=neoverse-n1`` lacks those.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dist
from programs import EMULATED, ROOT, counts, remember, run, today, watch

MACHINE = "aarch64"
PLACE = ROOT / "build" / "aarch64-python"
SYSTEM = PLACE / "system"
SITE = PLACE / "site"
# The oldest that is served, which a test compares: of newer ones the wheel for ARM brings CUDA, another 4 GB.
TORCH = "torch==2.10.0"

_PROGRAMS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "apt-get": "apt"}
# Without vectors of any length, which torch would take and qemu is slow at. The second has no products of bfloat16;
# older ones lack what torch itself needs.
_PROCESSORS = {"neon_bf16": "max,sve=off", "neon": "neoverse-n1", "portable": "neoverse-n1"}
_OP_TESTS = ("attention_accuracy", "accuracy_attention", "paging")
_OWN_KERNELS = "not reach_every_option and not dense_path and not float64"  # the others run none of them
# One case in so many. Prime to the numbers of dtypes, rules and kinds, so that all of them come.
_SAMPLE = {"ATTNRB_TEST_SAMPLE": "97", "ATTNRB_TEST_GRADIENT_SAMPLE": "97"}


def check_programs() -> None:
    """Raises SystemExit where the machine lacks a program: the message says what to install."""
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"tools/aarch64.py needs Debian or Ubuntu and more packages: apt install {' '.join(missing)}")


def unpack_python() -> Path:
    """Debian's Python for ARM with what it stands on, unpacked. apt works on lists of its own and installs nothing."""
    found = sorted(SYSTEM.glob("usr/bin/python3.*"))
    if found:
        return found[-1]
    lists, cache = PLACE / "lists", PLACE / "packages"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (PLACE / "status").write_text("", "utf-8")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
        "Dir::Cache": str(cache),
        "Dir::State::Lists": str(lists),
        "Dir::State::status": str(PLACE / "status"),
    }
    apt = ["apt-get", "--quiet", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    # A source that has nothing for ARM is no matter: what is missing shows in the next line.
    subprocess.run([*apt, "update"], check=False)
    wanted = ("python3-minimal", "libpython3-stdlib", "libstdc++6")  # torch needs the last
    run(*apt, "install", "--download-only", "--yes", "--no-install-recommends", *wanted)
    for package in sorted((cache / "archives").glob("*.deb")):
        if re.match(r"(lib|python3|zlib1g)", package.name):
            run("dpkg", "-x", package, SYSTEM)
    if not (SYSTEM / "lib").exists():  # in newer Debians another package brings this link
        (SYSTEM / "lib").symlink_to("usr/lib")
    return sorted(SYSTEM.glob("usr/bin/python3.*"))[-1]


def prepare() -> Path:
    """The Python for ARM with torch, as a program: qemu with its arguments."""
    check_programs()
    python = unpack_python()
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    version = python.name.removeprefix("python")
    if not (SITE / "torch").is_dir():
        aim = ("--python-platform", "aarch64-manylinux_2_28", "--python-version", version, "--target", SITE)
        wanted = ("--only-binary", ":all:", TORCH, "numpy", "pytest")
        run(uv, "pip", "install", "--python", sys.executable, *aim, *wanted)
    program = PLACE / "python"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={SITE}${{PYTHONPATH:+:$PYTHONPATH}} exec qemu-aarch64 -L {SYSTEM} {python} "$@"\n',
        "utf-8",
    )
    program.chmod(0o755)
    return program


def wheel() -> Path:
    """Cross-compiles it and looks at it."""
    prepare()
    defines = {"ATTNRB_CUDA": "OFF", "CMAKE_TOOLCHAIN_FILE": str(ROOT / "cmake" / "Aarch64.cmake")}
    environment = {"ATTNRB_TORCH": str(SITE / "torch"), "_PYTHON_HOST_PLATFORM": f"linux-{MACHINE}"}
    made = dist.build(defines, MACHINE, environment)
    dist.look_at(made)
    return made


def install() -> Path:
    """Unpacks the wheel of dist/ beside torch, as an installer would. Returns the Python."""
    program = prepare()
    for old in SITE.glob("attnrb*"):
        shutil.rmtree(old)
    shutil.unpack_archive(dist.made_for(MACHINE), SITE, "zip")
    return program


def exercise(program: Path) -> bool:
    """Whether every op agrees with the reference."""
    environment = {"QEMU_CPU": _PROCESSORS["neon_bf16"]}
    return watch(program, ROOT / "tests" / "abi" / "exercise.py", environment=environment)[0] == 0


def sample(program: Path, name: str) -> bool:
    """Whether a sample of the op tests passes with these kernels. What came is kept for the page of versions."""
    environment = {**_SAMPLE, "ATTNRB_CPU": name, "QEMU_CPU": _PROCESSORS[name]}
    asked = (
        "from importlib.metadata import version as v; import sys; print(*sys.version_info[:3], v('torch'), v('numpy'))"
    )
    said = watch(program, "-c", asked, environment=environment)[1].split()
    versions = {"python": ".".join(said[:3]), "torch": said[3], "numpy": said[4]}
    files = [ROOT / "tests" / "python" / f"test_{each}.py" for each in _OP_TESTS]
    code, said = watch(
        *(program, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", _OWN_KERNELS, *files),
        environment=environment,
    )
    found = {"instruction_set": name, **versions}
    remember(EMULATED, found | counts(said) | {"date": today()}, ("instruction_set",))
    return code == 0


def test(sets: list[str]) -> int:
    """Every op by tests/abi/exercise.py, then op tests for each set of kernels. Returns how many runs failed."""
    program = install()
    passed = [] if sets else [exercise(program)]
    return (passed + [sample(program, name) for name in sets or _PROCESSORS]).count(False)


def main() -> int:
    """What is asked for."""
    command, *arguments = sys.argv[1:] or [""]
    if command == "run":
        processor = os.environ.get("QEMU_CPU", _PROCESSORS["neon_bf16"])
        return watch(install(), *arguments, environment={"QEMU_CPU": processor})[0]
    if command == "wheel" and not arguments:
        wheel()
        return 0
    if command == "test" and set(arguments) <= set(_PROCESSORS):
        return test(arguments)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())
