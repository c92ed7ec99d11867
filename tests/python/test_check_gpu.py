"""tools/check_gpu.py without a GPU: what it would run is there, fits its time, and says that there is no device."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPOSITORY


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("check_gpu")


def test_a_dry_run_says_of_every_step_that_there_is_no_device(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "has_device", lambda: False)
    assert check.main(["--out", str(tmp_path / "new")]) == 0
    expected = [f"{step.name}: no device" for step in check.STEPS]
    assert (tmp_path / "new" / "summary.txt").read_text("utf-8").splitlines() == expected
    assert capsys.readouterr().out.splitlines() == expected


def test_without_nvidia_smi_there_is_no_device(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not check.has_device()


def test_what_it_runs_is_there_and_fits_its_time(check: ModuleType) -> None:
    assert len({step.name for step in check.STEPS}) == len(check.STEPS)
    assert sum(step.seconds for step in check.STEPS) <= 60 * check.MINUTES
    files = [word for step in check.STEPS for word in step.command if word.endswith(".py")]
    assert len(files) >= 10
    assert [name for name in files if not (REPOSITORY / name).is_file()] == []


def test_steps_that_fail_or_never_end_stop_no_other(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (
        check.Step("fails", 20, ("sh", "-c", "echo words; exit 3")),
        check.Step("never ends", 1, ("sleep", "1000")),
        check.Step("is not there", 20, ("/no such program",)),
        check.Step(
            "passes",
            20,
            ("sh", "-c", "echo $ATTNRB_REQUIRE_CUDA $ATTNRB_OF_STEP > {out}/told"),
            {"ATTNRB_OF_STEP": "7"},
        ),
    )
    monkeypatch.setattr(check, "STEPS", steps)
    monkeypatch.setattr(check, "has_device", lambda: True)
    assert check.main(["--out", str(tmp_path)]) == 1
    said = dict(line.split(": ", 1) for line in (tmp_path / "summary.txt").read_text("utf-8").splitlines())
    assert said["fails"].startswith("failed with status 3")
    assert said["never ends"].startswith("stopped after 1 s")
    assert said["is not there"].startswith("did not start: No such file")
    assert said["passes"].startswith("passed")
    assert (tmp_path / "fails.log").read_text("utf-8") == "words\n"
    assert (tmp_path / "told").read_text("utf-8") == "1 7\n"
