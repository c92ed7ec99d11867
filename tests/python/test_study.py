"""The study of emphasis: what may choose a setting, what a kill leaves, and what the report makes of the answers."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy", reason="studies need the package scipy")
pytest.importorskip("statsmodels", reason="studies need the package statsmodels")
pytest.importorskip("typer", reason="the command line needs the extra cli")

import torch
from attnrb.cli.study import render
from attnrb.evaluation.runfile import RunFile, RunFileError
from attnrb.policies import Emphasis, HeadProfile
from attnrb.studies.arms import PLAIN, Arm, LeakError, Setting, check_no_leak, emphasis_arms
from attnrb.studies.material import study_items
from attnrb.studies.neutral import neutral_texts
from attnrb.studies.plan import StudyPlan, study_tasks
from attnrb.studies.study import Study
from attnrb.studies.study_report import markdown, profile_table
from attnrb.studies.study_run import check_run, default_run_file, study_report
from rich.console import Console
from saved_tiny_model import LAYERS, save_tiny_model, tiny_model, tiny_tokenizer

PLAN = StudyPlan(items=4, examples=1, development=1, strengths=(4.0, 16.0), keep=3)
HEADS = 4


def lines(path: Path) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, path.read_text("utf-8").splitlines()) if "arm" in record]


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "cpu"}


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["task"], record["item"], record["arm"], record["prompting"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of an uninterrupted run, and its file."""
    path = tmp_path_factory.mktemp("study") / "run.jsonl"
    torch.set_num_threads(1)
    return study_report(tiny_model(), tiny_tokenizer(), PLAN, path, model_name="tiny"), path


def profile(seen: list[str] | None) -> HeadProfile:
    about = {} if seen is None else {"seen": seen}
    return HeadProfile([[float(head) for head in range(HEADS)]] * LAYERS, 3, about)


def test_an_oracle_is_refused_before_the_model_is_asked(tmp_path: Path) -> None:
    held_out = study_items("conflict", PLAN.items)
    planted = profile([held_out[2].fingerprint])
    oracle = Arm("oracle", span="marked", policy=Emphasis(), heads="own", tasks=("conflict",))
    with RunFile(tmp_path / "run.jsonl", {}) as file:
        study = Study(tiny_model(), tiny_tokenizer(), PLAN, file)
        study.profiles["conflict"] = planted
        with pytest.raises(LeakError, match="oracle: its setting was chosen on 1 of the items"):
            study.ask_arms([oracle], frozenset())
        study.profiles["conflict"] = profile([])
        with pytest.raises(LeakError, match="oracle: its setting was chosen on 4 of the items"):
            study.ask_arms([oracle], frozenset(item.fingerprint for item in held_out))
        assert not file.records
        study.ask_arms([oracle], frozenset())
        assert len(file.records) == PLAN.items


def test_heads_whose_origin_nobody_knows_are_refused() -> None:
    items = study_items("story", 2)
    with pytest.raises(LeakError, match="does not say which items it was made from"):
        check_no_leak("arm", Setting(Emphasis(heads=profile(None))), items)
    check_no_leak("arm", Setting(Emphasis(heads=profile([]))), items)
    development = frozenset(item.fingerprint for item in study_items("story", 9, split="development"))
    check_no_leak("arm", Setting(Emphasis(), development), items)
    # An item is known by what it says, not by its place or by what somebody calls it.
    with pytest.raises(LeakError):
        check_no_leak("arm", Setting(None, frozenset({replace(items[0]).fingerprint})), items)


def test_what_chose_the_settings_are_development_items_and_the_arms_carry_them(
    whole: tuple[dict[str, Any], Path],
) -> None:
    records = lines(whole[1])
    development = {
        item.fingerprint
        for task in PLAN.tasks
        for item in study_items(task, PLAN.examples + PLAN.development, split="development")
    }
    profiles = [record["profile"]["about"]["seen"] for record in records if record["arm"] == "profile"]
    assert len(profiles) == len(PLAN.tasks)
    assert {each for seen in profiles for each in seen} <= development
    chosen_on = {each["prompt"] for each in records if each["prompting"] == "development" and each["arm"] != "profile"}
    assert chosen_on <= development and len(chosen_on) == whole[0]["chosen_on"]
    held_out = {each["prompt"] for each in records if each["prompting"] == "held-out" and "prompt" in each}
    assert held_out and not held_out & development


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import torch
from pathlib import Path
from attnrb.studies.study_run import study_report
from saved_tiny_model import tiny_model, tiny_tokenizer
from test_study import PLAN

torch.set_num_threads(1)
calls = []
def kill(state):
    calls.append(state)
    if len(calls) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
study_report(tiny_model(), tiny_tokenizer(), PLAN, Path(sys.argv[1]), model_name="tiny", progress=kill)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_nothing_lost_and_nothing_twice(
    whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    killed = subprocess.run([sys.executable, "-c", _KILLED, path, Path(__file__).parent], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    before = lines(path)
    assert 0 < len(before) < len(lines(whole[1]))
    with path.open("a") as file:
        file.write('{"task": "conflict", "item": 3, "arm": "pl')  # what a kill in the middle of a write leaves
    report = study_report(tiny_model(), tiny_tokenizer(), PLAN, path, model_name="tiny")
    after = lines(path)
    assert after[: len(before)] == before
    assert len({key(record) for record in after}) == len(after)
    assert {key(each): without_time(each) for each in after} == {
        key(each): without_time(each) for each in lines(whole[1])
    }
    for name in ("results", "differences"):
        mine, other = (
            [{key: value for key, value in each.items() if "seconds" not in key} for each in found[name]]
            for found in (report, whole[0])
        )
        assert mine == other


def test_the_report_counts_what_the_answers_say(whole: tuple[dict[str, Any], Path]) -> None:
    report, path = whole
    records = [each for each in lines(path) if each["prompting"] == "held-out" and "correct" in each]
    assert report["answers"] == len(records)
    for each in report["results"]:
        mine = [record for record in records if (record["arm"], record["task"]) == (each["arm"], each["task"])]
        assert (len(mine), sum(record["correct"] for record in mine)) == (each["items"], each["correct"])
    for record in records:
        scores = record["loglikelihoods"]
        assert record["correct"] == (scores[0] > max(scores[1:]))
    right = {(each["arm"], each["task"], each["item"]): each["correct"] for each in records}
    for pair in report["differences"]:
        both = [
            (right[PLAIN, pair["task"], item], right[pair["arm"], pair["task"], item]) for item in range(pair["items"])
        ]
        assert pair["lost"] == sum(plain and not edited for plain, edited in both)
        assert pair["won"] == sum(edited and not plain for plain, edited in both)
    assert {each["task"] for each in report["requirements"]} == {"conflict", "retrieval", "story"}
    json.dumps(report, allow_nan=False)
    for arm, found in report["neutral_perplexity"].items():
        mine = [each for each in lines(path) if (each["task"], each["arm"]) == ("neutral text", arm)]
        assert len(mine) == len(neutral_texts())
        mean = sum(each["loglikelihood"] for each in mine) / sum(each["tokens"] for each in mine)
        assert found == pytest.approx(math.exp(-mean), abs=1e-4)  # the report rounds to four digits
    assert len(report["neutral_perplexity"]) == 3


def test_the_command_prints_a_table_writes_its_files_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the page needs the package plotly")
    from attnrb.cli.app import app
    from typer.testing import CliRunner

    folder = save_tiny_model(tmp_path / "tiny")
    files = {name: tmp_path / f"study.{name}" for name in ("json", "html")}
    files["jsonl"] = tmp_path / "study.items.jsonl"  # beside the report
    command = ["study", "rebalancing", "--quick", "--items", "2", "--model", folder]
    command += ["--json", files["json"], "--html", files["html"]]
    first = CliRunner().invoke(app, [str(each) for each in command], env={"COLUMNS": "120", "TERM": "dumb"})
    assert first.exit_code == 0, first.output
    assert "alpha 0.2" in first.stdout and "conflict" in first.stdout
    report = json.loads(files["json"].read_text("utf-8"))
    assert "alpha 16, rows normalised" in files["html"].read_text("utf-8")
    answers = lines(files["jsonl"])
    assert report["answers"] == sum(each["prompting"] == "held-out" for each in answers)
    again = CliRunner().invoke(app, [str(each) for each in command])
    assert again.exit_code == 0 and lines(files["jsonl"]) == answers
    other = CliRunner().invoke(app, [str(each) for each in (*command, "--seed", "1")])
    assert other.exit_code == 1 and "was made with seed 0 and not 1" in " ".join(other.stderr.split())


def test_holm_s_correction_stays_within_a_family(whole: tuple[dict[str, Any], Path]) -> None:
    for family in {pair["family"] for pair in whole[0]["differences"]}:
        mine = sorted(
            (pair for pair in whole[0]["differences"] if pair["family"] == family), key=lambda pair: pair["mcnemar"]
        )
        largest = 0.0
        for place, pair in enumerate(mine):
            largest = max(largest, min(1.0, (len(mine) - place) * pair["mcnemar"]))
            assert pair["holm"] == pytest.approx(largest)


def test_all_choices_of_heads_have_equal_strengths() -> None:
    arms = emphasis_arms((8.0, 64.0), study_tasks(PLAN), quick=False)
    for strength in (8.0, 64.0):
        mine = {
            arm.heads
            for arm in arms
            if isinstance(arm.policy, Emphasis)
            and arm.policy.strength == strength
            and arm.span == "marked"
            and arm.family in ("headline", "heads")
        }
        assert mine == {"own", "all", "transferred", "random"}
    assert len({arm.name for arm in arms}) == len(arms)


def test_tables_have_a_column_for_each_task(whole: tuple[dict[str, Any], Path]) -> None:
    head, rows = profile_table(whole[0])
    assert head == ["arm", *PLAN.tasks, "irrelevant"]
    assert all(len(row) == len(head) for row in rows)
    assert markdown((head, rows)).count("\n") == len(rows) + 1


@pytest.mark.parametrize("width", [60, 80, 400])
def test_a_console_of_any_width_shows_whole_names(whole: tuple[dict[str, Any], Path], width: int) -> None:
    text = io.StringIO()
    render(Console(file=text, width=width), whole[0])
    shown = text.getvalue()
    for task in (*PLAN.tasks, "irrelevant"):
        heads = [line for line in shown.splitlines() if line.split()[:1] == ["arm"] and task in line]
        assert len(heads) == 1, task
    first = [line.split()[0] for line in shown.splitlines() if line.startswith(" ") and line.strip()]
    assert first.count("arm") == first.count("plain") >= 1  # the plain model stands in each part


def test_the_page_of_results_shows_what_was_measured_and_nothing_else(
    whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    script = Path(__file__).parents[2] / "docs" / "study_tables.py"
    spec = importlib.util.spec_from_file_location("study_tables", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = "Before.\n<!-- study tiny -->\nold figures\n<!-- end of study -->\nBehind.\n"
    empty = module.filled(page, tmp_path)
    assert "old figures" not in empty and "Not measured yet." in empty
    (tmp_path / "tiny.json").write_text(json.dumps(whole[0]), encoding="utf-8")
    full = module.filled(empty, tmp_path)
    assert markdown(profile_table(whole[0])) in full
    assert full.startswith("Before.\n") and full.endswith("Behind.\n")
    assert module.filled(full, tmp_path) == full
    own = module.PAGE.read_text(encoding="utf-8")
    assert module.filled(own, module.DOCS / "results") == own, "run docs/study_tables.py"


def test_the_run_s_file_goes_by_the_plan_and_not_by_the_number_of_items() -> None:
    assert default_run_file(PLAN, "tiny") == default_run_file(replace(PLAN, items=99), "tiny")
    assert default_run_file(PLAN, "tiny") != default_run_file(replace(PLAN, keep=2), "tiny")
    with pytest.raises(ValueError, match="study: expected one of"):
        StudyPlan(study="magic")
    with pytest.raises(ValueError, match="items: expected at least 1"):
        StudyPlan(items=0)


def test_a_file_of_another_study_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    check_run(path, PLAN)
    study_report(tiny_model(), tiny_tokenizer(), replace(PLAN, study="rebalancing"), path, model_name="tiny")
    check_run(path, replace(PLAN, study="rebalancing", items=9))  # it may grow
    with pytest.raises(RunFileError, match="was made with study 'rebalancing' and not 'emphasis'"):
        check_run(path, PLAN)
    with pytest.raises(RunFileError, match="was made with seed 0 and not 1"):
        check_run(path, replace(PLAN, study="rebalancing", seed=1))
