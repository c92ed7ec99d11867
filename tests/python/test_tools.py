"""Programs of tools/ that the Makefile calls."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module


def side_by_side(log: Path, first: str, second: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(REPOSITORY / "tools" / "side_by_side.py"), str(log), first, second]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)


def test_two_commands_run_and_both_are_shown(tmp_path: Path) -> None:
    ran = side_by_side(tmp_path / "new" / "log", "sh -c 'echo one; echo two >&2'", "echo three")
    assert ran.returncode == 0
    assert ran.stdout.split() == ["three", "---", "sh", "-c", "'echo", "one;", "echo", "two", ">&2'", "one", "two"]
    assert (tmp_path / "new" / "log").read_text("utf-8") == "one\ntwo\n"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_stops_the_other_command(failing: int, tmp_path: Path) -> None:
    commands = ["sleep 10000", "sleep 10000"]
    commands[failing] = "sh -c 'echo why; exit 3'"
    ran = side_by_side(tmp_path / "log", *commands)
    assert ran.returncode != 0
    assert "why" in ran.stdout


# ------------------------------------------------------------------------------------------------------------ wheels


def wheel(folder: Path, tag: str, *names: str) -> Path:
    path = folder / f"attnrb-9.9.9-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x00GLIBC_2.2.5\x00GLIBC_2.14\x00GLIBCXX_3.4.9\x00")
    return path


_TAG = "py3-none-manylinux_2_28_x86_64"


@pytest.mark.parametrize(
    ("tag", "names", "message"),
    [
        (_TAG, ["attnrb/libattnrb.so", "attnrb/_C.cpython-311-x86_64-linux-gnu.so"], "tied to a version of Python: _C"),
        ("cp311-cp311-linux_x86_64", ["attnrb/libattnrb.so"], "tied to a version of Python: its tag"),
        (
            _TAG,
            ["attnrb/libattnrb.so", "attnrb.libs/libtorch-1.so"],
            "brings libraries of others: attnrb.libs/libtorch",
        ),
        (_TAG, ["attnrb/libattnrb.so", "attnrb_hooks.pth"], "runs code whenever Python starts: attnrb_hooks.pth"),
        ("py3-none-manylinux_2_35_x86_64", ["attnrb/libattnrb.so"], r"needs a glibc newer than 2\.28"),
        (_TAG, ["sitecustomize.py"], "runs code whenever Python starts: sitecustomize.py"),
    ],
)
def test_a_wheel_that_serves_fewer_than_all_is_refused(
    tag: str, names: list[str], message: str, tmp_path: Path, tool: Any
) -> None:
    with pytest.raises(SystemExit, match=message):
        tool("dist").look_at(wheel(tmp_path, tag, *names))


def test_a_wheel_that_asks_for_more_than_it_promises_is_refused(tmp_path: Path, tool: Any) -> None:
    made = wheel(tmp_path, "py3-none-manylinux_2_12_x86_64", "attnrb/libattnrb.so")
    with pytest.raises(SystemExit, match=r"promises glibc 2\.12, and libattnrb\.so asks for 2\.14"):
        tool("dist").look_at(made)


def test_the_versions_that_a_wheel_asks_for(tmp_path: Path, tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = tool("dist")
    monkeypatch.setattr(dist, "run", lambda *_: "")
    monkeypatch.setattr(dist, "remember", lambda *_: None)
    found = dist.look_at(wheel(tmp_path, _TAG, "attnrb/libattnrb.so"))
    assert found["newest"]["libattnrb.so"] == {"GLIBC": "2.14", "GLIBCXX": "3.4.9"}


def test_oldest_versions_are_those_that_are_allowed(tool: Any) -> None:
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    for requirements in tool("matrix").ROWS.values():
        for requirement in requirements:
            if "==" not in requirement:
                continue  # what another needs beside it
            name, version = requirement.split("==")
            allowed = re.findall(rf'"{re.escape(name)}>=(\d[\d.]*\d)', text)
            assert allowed, name
            assert all(version == each or version.startswith(f"{each}.") for each in allowed), requirement


def test_every_name_of_the_core_s_tests_has_files(tool: Any) -> None:
    folder = REPOSITORY / "tests" / "python"
    matrix = tool("matrix")
    assert list(matrix.CORE) == list(matrix.ROWS)
    names = {each for row in matrix.CORE.values() for each in row}
    assert [each for each in names if not list(folder.glob(f"test_{each}.py"))] == []


def test_the_wheel_for_a_machine_is_one(tmp_path: Path, tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = tool("dist")
    monkeypatch.setattr(dist, "DIST", tmp_path)
    with pytest.raises(SystemExit, match=r"expected one wheel for x86_64 in .*, found 0: run make dist"):
        dist.made_for("x86_64")
    for machine in ("x86_64", "aarch64"):
        made = wheel(tmp_path, f"py3-none-manylinux_2_28_{machine}", "attnrb/libattnrb.so")
        assert dist.made_for(machine) == made


def test_torch_for_arm_is_the_oldest(tool: Any) -> None:
    assert tool("matrix").ROWS["torch-oldest"] == (tool("aarch64").TORCH,)


def test_what_another_checkout_found_stays_on_the_page(tool: Any) -> None:
    earlier = [{"python": "3.10", "sha": 1}, {"python": "3.11", "sha": 1}]
    came = [{"python": "3.11", "sha": 2}, {"python": "3.12", "sha": 2}]
    assert tool("matrix").merged(earlier, came, ("python",)) == [earlier[0], *came]


def test_the_page_of_versions_is_what_the_program_writes(tool: Any) -> None:
    matrix = tool("matrix")
    if not matrix.FOUND.exists():
        pytest.skip(f"nothing was run yet that would write {matrix.FOUND.name}")
    assert matrix.PAGE.read_text("utf-8") == matrix.page(json.loads(matrix.FOUND.read_text("utf-8")))
