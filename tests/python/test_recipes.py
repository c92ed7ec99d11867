"""The recipe of an op, followed literally in a copy of the tree: what it says to edit is there, and the op works."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("csrc", "cuda", "cmake", "python", "build_backend", "tests/python")
FILES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
TESTS = ("test_accuracy_weights.py", "test_ops_registration.py", "test_ops_errors.py")


def edit(path: Path, pattern: str, replacement: str) -> None:
    """Replace the one place that a step of the recipe names."""
    text = path.read_text(encoding="utf-8")
    changed, times = re.subn(pattern, lambda found: found.expand(replacement), text, flags=re.MULTILINE | re.DOTALL)
    assert times == 1, f"{path.name}: {times} places match {pattern}"
    path.write_text(changed, encoding="utf-8")


def insert_after(path: Path, pattern: str, block: str, gap: str = "\n") -> None:
    edit(path, f"({pattern})", "\\1" + gap + block.replace("\\", "\\\\"))


def end_of(start: str, indent: str = "") -> str:
    """From a line to the brace that closes what begins there."""
    return rf"^{indent}{re.escape(start)}.*?^{indent}}}\n"


def follow(tree: Path) -> None:
    """Every step of docs/recipes/op.md for the CPU, as a reader would type it."""
    text = (ROOT / "docs" / "recipes" / "op.md").read_text(encoding="utf-8")
    blocks: Iterator[str] = iter(re.findall(r"^```(?:cpp|python|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    core, kernels, ops = tree / "csrc/core", tree / "csrc/core/kernels", tree / "csrc/ops"
    python, tests = tree / "python/attnrb/ops", tree / "tests/python"

    edit(core / "problem.h", "^(// What a kernel found wrong)", next(blocks).replace("\\", "\\\\") + "\n\\1")
    insert_after(kernels / "elementwise.h", end_of("void outlier_mask("), next(blocks))
    insert_after(core / "kernels.h", r"^struct Kernels \{.*?(?=^\};)", next(blocks), gap="")
    insert_after(kernels / "table.h", end_of("inline void run_outlier_mask("), next(blocks))
    edit(kernels / "table.h", r"(make_table\(.*?)\};", "\\1, run_row_sums};")
    insert_after(ops / "weights.h", end_of("Tensor outlier_mask("), next(blocks))
    insert_after(ops / "library.cpp", r'^  library\.def\("outlier_mask\(.*?\);\n', next(blocks))
    insert_after(ops / "cpu.cpp", end_of("static void outlier_mask(", "  "), next(blocks))
    insert_after(ops / "cpu.cpp", r'^  library\.impl\("outlier_mask".*?\);\n', next(blocks), gap="")

    for file in (python / "reference.py", python / "weights_in_memory.py", tests / TESTS[0]):
        file.write_text(f"{file.read_text(encoding='utf-8')}\n\n{next(blocks)}", encoding="utf-8")
    for file in (python / "reference.py", python / "weights_in_memory.py", python / "functional.py"):
        edit(file, r"^__all__ = \[", '__all__ = ["row_sums", ')
    edit(python / "functional.py", "(import outlier_mask, rebalance)$", "\\1, row_sums")
    insert_after(tests / TESTS[1], r'^    "outlier_mask": .*?\n', next(blocks), gap="")
    insert_after(tests / TESTS[1], r'^        add\("outlier_mask", .*?\n', next(blocks), gap="")
    insert_after(
        tests / TESTS[2], r"^        \(lambda: functional\.outlier_mask\(WEIGHTS, 1\.5\).*?\n", next(blocks), gap=""
    )
    assert next(blocks, None) is None, "a step that this test does not know"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in COPIED:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / file)
    follow(tmp_path)
    return tmp_path


def test_every_step_finds_its_place(tree: Path) -> None:
    for file in [*(tree / "python/attnrb/ops").glob("*.py"), *(tree / "tests/python" / name for name in TESTS)]:
        ast.parse(file.read_text(encoding="utf-8"))
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    file = tree / "tests/python" / TESTS[2]  # the op itself is not built here, and only a call of it would tell
    done = subprocess.run([*collect, str(file)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "row_sums" in (tree / "csrc/ops/library.cpp").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif("ATTNRB_LONG" not in os.environ, reason="compiles for minutes: `make test-long` runs it")
def test_the_op_works(tree: Path) -> None:
    site = tree / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    built = subprocess.run([*pip, "--target", str(site), str(tree)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    environment = os.environ | {"PYTHONPATH": str(site)}
    # An editable installation has a finder of its own, which comes before every path.
    this = "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'Redirecting' not in type(each).__name__]"
    this += "; import pytest; sys.exit(pytest.main())"
    run = [sys.executable, "-c", this, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "row_sums or refuse"]
    tests = [str(tree / "tests/python" / name) for name in TESTS]
    done = subprocess.run([*run, *tests], cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d+ passed", done.stdout), done.stdout
