"""The programs of the scorecard work, on a handful of cases each; `make scorecard` runs them in earnest."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

SCORECARD = REPOSITORY / "tests" / "scorecard"
# Those that need no build of their own and no browser.
QUICK = ("forward", "gradients", "invalid", "layouts")


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCORECARD))


def program(name: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCORECARD / name), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_a_row_runs_and_finds_nothing(name: str, tmp_path: Path) -> None:
    from rows import ROWS

    row = next(row for row in ROWS if row.name == name)
    ran = program(row.program[0], *row.smoke, "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert found["counts"][row.least[0]] > 0
    assert found["fault_count"] == 0
    assert str(tmp_path) not in found["command"]


def result(row: Any, **changed: Any) -> dict[str, Any]:
    label, least = row.least
    return {
        "row": row.name,
        "command": "python x.py",
        "date": "2026-01-02 03:04 UTC",
        "seconds": 5.0,
        "processor": "P",
        "versions": {"Python": "3"},
        "counts": {label: least},
        "largest": {"largest of what is allowed": 0.5},
        "notes": ["A note."],
        "fault_count": 0,
        "faults": [],
        **changed,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (folder / f"{row['row']}.json").write_text(json.dumps(row), "utf-8")


def test_the_page_has_every_row_with_its_figures(tmp_path: Path) -> None:
    from rows import ROWS

    write(tmp_path, [result(row) for row in ROWS])
    page = tmp_path / "page.md"
    ran = program("report.py", "--results", tmp_path, "--page", page)
    assert ran.returncode == 0, ran.stderr
    text = page.read_text("utf-8")
    for row in ROWS:
        assert f"## {row.title}\n" in text
        assert f"{row.least[1]:,} {row.least[0]}" in text
    assert "2026-01-02 03:04 UTC" in text and "P; Python 3" in text


def test_no_page_has_a_row_without_a_figure(tmp_path: Path) -> None:
    from rows import ROWS

    write(tmp_path, [result(row) for row in ROWS[1:]])
    ran = program("report.py", "--results", tmp_path, "--page", tmp_path / "page.md")
    assert ran.returncode == 1
    assert f"{ROWS[0].name}: it has not run" in ran.stderr
    assert not (tmp_path / "page.md").exists()


def test_too_few_cases_and_faults_are_named(tmp_path: Path) -> None:
    from rows import ROWS

    few = result(ROWS[0], counts={ROWS[0].least[0]: 3})
    faulty = result(ROWS[1], fault_count=1, faults=["seed 7: it errs"])
    write(tmp_path, [few, faulty, *(result(row) for row in ROWS[2:])])
    ran = program("report.py", "--results", tmp_path, "--page", tmp_path / "page.md")
    assert ran.returncode == 1
    assert f"3 {ROWS[0].least[0]}, expected at least" in ran.stderr
    assert "seed 7: it errs" in ran.stderr and "`seed 7: it errs`" in (tmp_path / "page.md").read_text("utf-8")


def test_every_fault_of_the_kernels_is_a_change_of_one_line() -> None:
    from planted_core import CORE, FILES, faults

    lines = {name: (CORE / name).read_text("utf-8").splitlines() for name in FILES}
    found = list(faults())
    assert len(found) > 500 and {fault.file for fault in found} >= {"visibility.h", "kernels/marks.h", "kernels/rows.h"}
    for fault in found:
        assert lines[fault.file][fault.line - 1] == fault.old != fault.new


def test_every_fault_of_the_package_is_another_program() -> None:
    from planted_host import PACKAGE, faults_of

    name = "policies/checks.py"
    plain = ast.unparse(ast.parse((PACKAGE / name).read_text("utf-8")))
    found = [(fault, text()) for fault, text in faults_of(name)]
    assert len(found) > 10
    for fault, text in found:
        assert text != plain and fault.old != fault.new
        compile(text, name, "exec")
    assert ast.unparse(ast.parse((PACKAGE / name).read_text("utf-8"))) == plain, "the tree itself is left alone"


def test_the_tests_of_a_module_exist() -> None:
    from planted_host import PACKAGE, TESTS

    for module, stems in TESTS.items():
        assert (PACKAGE / module).is_file()
        for stem in stems:
            assert (REPOSITORY / "tests" / "python" / f"test_{stem}.py").is_file(), stem


def test_draws_take_every_file_and_kind_in_turn() -> None:
    from faults import Planted, draw

    many = [Planted("a", line, "sign", str(line), "") for line in range(100)]
    few = [Planted("b", line, "head", str(line), "") for line in range(3)]
    drawn = draw([*many, *few], seed=1)
    assert sorted(fault.file for fault in drawn[:6]) == ["a"] * 3 + ["b"] * 3
    assert draw([*many, *few], seed=1) == drawn != draw([*many, *few], seed=2)
    assert sorted(drawn) == sorted([*many, *few])


def test_hostile_texts_vary() -> None:
    from hostile import draw

    texts = [draw(seed) for seed in range(300)]
    assert len(set(texts)) > 200
    for part in ("<script", "onerror", "\u202e", "\x1b", "</title>", "&"):
        assert any(part in text for text in texts)
