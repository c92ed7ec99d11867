"""A study in two processes on the CPU: they share the work out, and find what one process finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="studies need the package scipy")
pytest.importorskip("statsmodels", reason="studies need the package statsmodels")
pytest.importorskip("typer")

from attnrb.models import load
from attnrb.studies.plan import StudyPlan
from attnrb.studies.study_run import study_report
from launchers import ACCELERATE, launch
from saved_tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

NUMBERS = ("items", "correct", "accuracy", "arm", "task")


def answers(path: Path) -> dict[Any, dict[str, Any]]:
    lines = [record for record in map(json.loads, path.read_text("utf-8").splitlines()) if "arm" in record]
    found = {(each["task"], each["item"], each["arm"], each["prompting"]): each for each in lines}
    assert len(found) == len(lines)  # each once
    return found


@pytest.mark.parametrize("study", ["emphasis", "gains"])
def test_two_processes_find_what_one_finds(study: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    arguments = f"study {study} --quick --items 3 --json two.json --model"
    ran = launch(ACCELERATE, "-m", "attnrb", *arguments.split(), model, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("Right answers") == 1  # one of them speaks
    plan = StudyPlan(study=study, items=3)
    loaded, tokenizer = load(str(model))
    one = study_report(loaded, tokenizer, plan, tmp_path / "one.jsonl", model_name="tiny")
    two = json.loads((tmp_path / "two.json").read_text("utf-8"))
    assert one is not None and two["environment"]["processes"] == 2
    alone, together = answers(tmp_path / "one.jsonl"), answers(tmp_path / "two.items.jsonl")
    assert alone.keys() == together.keys()
    for key, record in alone.items():
        assert together[key].get("answer") == record.get("answer")
        found, expected = together[key].get("loglikelihoods", []), record.get("loglikelihoods", [])
        assert found == pytest.approx(expected, abs=1e-4)
    for mine, other in zip(one["results"], two["results"], strict=True):
        assert {name: mine[name] for name in NUMBERS} == {name: other[name] for name in NUMBERS}
    assert [each["difference"] for each in one["differences"]] == [each["difference"] for each in two["differences"]]
    assert one["strength"] == two["strength"]
