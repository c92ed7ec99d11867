"""Natural text in the studies: what is made of the files, which split it is in, and a study that asks it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy", reason="studies need the package scipy")
pytest.importorskip("statsmodels", reason="studies need the package statsmodels")

import torch
from attnrb.evaluation.data import DataError, read_items
from attnrb.evaluation.runfile import RunFileError
from attnrb.studies.answers import answer_row
from attnrb.studies.candidates import candidate_scores
from attnrb.studies.natural import NATURAL, natural_items, natural_tasks
from attnrb.studies.plan import StudyPlan, study_tasks
from attnrb.studies.study_run import study_report
from saved_tiny_model import tiny_model, tiny_tokenizer
from study_data import save_study_data

HELPFUL = ("siqa", "passages", "questions")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_study_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("task", NATURAL)
def test_items_say_what_the_files_say_and_no_text_is_in_both_splits(data: Path, task: str) -> None:
    held_out, development = (list(natural_items(data, task, split, 0)) for split in ("held-out", "development"))
    assert held_out and development
    for item in (*held_out, *development):
        text, [(start, end)] = item.text(span="marked")
        assert text[start:end] == item.sentences[item.marked]
        assert text.endswith("Answer:") and item.per_character
        assert len(set(item.candidates)) == len(item.candidates)
    mine, others = ({item.sentences[item.marked] for item in each} for each in (held_out, development))
    if task != "piqa":
        assert not mine & others
        assert {item.marked for item in held_out} == {0, 1}
    assert [each.fingerprint for each in natural_items(data, task, "held-out", 0)] == [
        each.fingerprint for each in held_out
    ]
    assert [each.fingerprint for each in natural_items(data, task, "held-out", 1)] != [
        each.fingerprint for each in held_out
    ]


def test_the_right_candidate_is_the_file_s(data: Path) -> None:
    rows = {item.question: item for item in read_items(data, "siqa").items}
    for item in natural_items(data, "siqa", "held-out", 0):
        asked = item.question.removeprefix("Question: ").removesuffix("\nAnswer:")
        row = rows[f"Context: {item.sentences[item.marked]}\nQuestion: {asked}"]
        assert row.gold is not None and item.candidates[0] == row.choices[row.gold]
        names = [set(re.findall(r"\b[A-Z][a-z]+", each)) for each in item.sentences]
        assert not names[0] & names[1]  # the other situation is about somebody else
    for item in natural_items(data, "questions", "held-out", 0):
        [number] = re.findall(r"part (\d+)", item.sentences[item.marked])
        assert item.candidates[0] == f"{('cause', 'end', 'luck', 'plan')[int(number) % 4]} {number}"
    for item in natural_items(data, "passages", "held-out", 0):
        assert "This question refers" not in item.text()[0] and item.question == "Question: Why?\nAnswer:"
        [number] = re.findall(r"letter (\d+)", item.sentences[item.marked])
        assert item.candidates[0] == f"{('cause', 'end', 'luck', 'plan')[int(number) % 4]} {number}"


def test_long_candidates_count_by_character(data: Path) -> None:
    item = next(natural_items(data, "piqa", "held-out", 0))
    assert item.scores([-4.0, -5.0]) == [-4.0 / len(item.candidates[0]), -5.0 / len(item.candidates[1])]


def test_the_data_sets_themselves_have_hundreds_of_items(shared: Path) -> None:
    for task, least in {"siqa": 500, "passages": 120, "questions": 500, "piqa": 500}.items():
        held_out = list(natural_items(shared / "data", task, "held-out", 0))
        development = list(natural_items(shared / "data", task, "development", 0))
        assert len(held_out) >= least and len(development) >= 40
        marked = [{item.sentences[item.marked] for item in items} for items in (held_out, development)]
        assert task == "piqa" or not marked[0] & marked[1]


def test_a_folder_without_any_file_for_a_study_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        study_tasks(StudyPlan(data=tmp_path / "none"))
    with pytest.raises(DataError, match="has no file for any of siqa, passages"):
        study_tasks(StudyPlan(data=tmp_path))
    (tmp_path / "piqa.jsonl").write_bytes((data / "piqa.jsonl").read_bytes())
    assert natural_tasks(tmp_path) == ("piqa",)
    with pytest.raises(ValueError, match="task: expected one of"):
        next(natural_items(data, "chess", "held-out", 0))
    with pytest.raises(ValueError, match="split: expected one of"):
        next(natural_items(data, "siqa", "test", 0))


def test_a_study_asks_natural_text_too_and_refuses_other_files(data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = Path(shutil.copytree(data, tmp_path / "data"))
    plan = StudyPlan(items=3, examples=1, development=1, strengths=(16.0,), keep=3, data=data)
    path = tmp_path / "run.jsonl"
    report = study_report(tiny_model(), tiny_tokenizer(), plan, path, model_name="tiny")
    assert report is not None
    tasks = {each["task"] for each in report["results"]}
    assert {*HELPFUL, "piqa", "conflict"} <= tasks
    arms = {(each["arm"], each["task"]) for each in report["results"]}
    assert ("×16, own heads", "siqa") in arms and ("×16, heads of conflict", "passages") in arms
    assert ("×16, all heads, irrelevant span", "piqa") in arms and ("×16, own heads", "piqa") not in arms
    assert set(report["data"]) == {
        "siqa.jsonl",
        "piqa.jsonl",
        "mmlu/anatomy_test.csv",
        *(f"mmlu/{each}_test.csv" for each in ("high_school_european_history", "high_school_us_history")),
    }
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    _check_scores(records, plan)
    before = path.read_bytes()
    with (data / "siqa.jsonl").open("a") as file:
        file.write('{"query": "Context: More.\\nQuestion: Who?", "choices": ["he did", "she"], "gold": 0}\n')
    with pytest.raises(RunFileError, match="was made with data"):
        study_report(tiny_model(), tiny_tokenizer(), plan, path, model_name="tiny")
    assert path.read_bytes() == before


def _check_scores(records: list[dict[str, Any]], plan: StudyPlan) -> None:
    """The plain model's answers to one task, asked again one by one."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    task = study_tasks(plan)["siqa"]
    items = task.items(task.held_out, "held-out", plan.seed)
    for number, item in enumerate(items):
        [record] = [
            each
            for each in records
            if (each.get("task"), each.get("item"), each.get("arm")) == ("siqa", number, "plain")
        ]
        rows = [answer_row(model, tokenizer, item.prompt(tokenizer), " " + word, "") for word in item.candidates]
        [found] = candidate_scores(model, [rows])
        # A few float32 operations in another order, on log-likelihoods of up to tens of nats.
        assert record["loglikelihoods"] == pytest.approx(found, rel=1e-4, abs=1e-4)
        first, second = (each / len(word) for each, word in zip(found, item.candidates, strict=True))
        assert record["correct"] == (first > second)
