"""Programs of tools/ that the Makefile calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


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
