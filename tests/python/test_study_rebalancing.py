"""The study of re-balancing: settings from development items, sets drawn by chance, thoughts where there is ability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy", reason="studies need the package scipy")
pytest.importorskip("statsmodels", reason="studies need the package statsmodels")

import attnrb
import torch
from attnrb.evaluation.data import read_items
from attnrb.evaluation.runfile import RunFile
from attnrb.ops.outliers import Outliers
from attnrb.studies import rebalancing
from attnrb.studies.arms import Arm, LeakError, settings_of_rebalancing
from attnrb.studies.plan import StudyPlan, study_tasks
from attnrb.studies.questions import QUESTIONS, question_items
from attnrb.studies.shuffled import ShuffledRebalance
from attnrb.studies.study import Study
from attnrb.studies.study_run import study_report
from saved_tiny_model import LAYERS, tiny_model, tiny_tokenizer
from study_data import save_study_data

PLAN = StudyPlan(study="rebalancing", items=3, examples=1, development=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_study_data(tmp_path_factory.mktemp("data"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, path.read_text("utf-8").splitlines()) if "arm" in record]


@pytest.mark.parametrize("task", [name for name, source in QUESTIONS.items() if not source.written])
def test_questions_have_the_file_s_answers_and_no_split_has_the_other_s(data: Path, task: str) -> None:
    held_out, development = (list(question_items(data, task, split, 0)) for split in ("held-out", "development"))
    assert held_out and development
    assert not {item.question for item in held_out} & {item.question for item in development}
    known: dict[str, str] = {}
    for name in QUESTIONS[task].tasks:
        path = data / "mmlu" / f"{name.removeprefix('mmlu_')}_test.csv"
        if path.exists() or not name.startswith("mmlu_"):
            known |= {
                each.question: each.choices[each.gold] for each in read_items(data, name).items if each.gold is not None
            }
    for item in held_out:
        question = item.question.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert item.candidates[0] == known[question].strip()
        assert item.text() == (item.question, [])


def test_thoughts_are_judged_by_their_first_line(data: Path) -> None:
    item = next(question_items(data, "siqa", "held-out", 0, thought=True))
    right, wrong = item.candidates[0], {"A": "B", "B": "A"}[item.candidates[0]]
    assert item.judge(f" {right}\nQuestion: {wrong}") and item.judge(f"The answer is {right}.")
    assert not item.judge(f" {wrong}") and not item.judge("both")
    item = next(question_items(data, "gsm8k", "held-out", 0, thought=True))
    assert item.judge(f" {item.candidates[0]}.00\n7") and not item.judge(" 123456")


class Chosen:
    """What a patched model edits, layer by layer, in one forward."""

    def __init__(self) -> None:
        self.sets: dict[int, Outliers] = {}

    def __call__(self, call: Any) -> None:
        if call.edit is not None and call.edit.outliers is not None:
            self.sets[call.layer] = call.edit.outliers


def sets_of(policy: Any, ids: torch.Tensor, mask: torch.Tensor) -> Outliers:
    chosen = Chosen()
    with torch.inference_mode(), attnrb.patch(tiny_model(), policy, observer=chosen) as patched:
        patched.model(input_ids=ids, attention_mask=mask)
    assert len(chosen.sets) == 1  # the last layer's gain is 0
    return next(iter(chosen.sets.values()))


def rows(outliers: Outliers) -> dict[tuple[int, int, int], list[int]]:
    counts = outliers.counts.numpy()
    return {
        place: outliers.indices.numpy()[place][: counts[place]].tolist()
        for place in map(tuple, np.argwhere(counts >= 0))
    }


def test_sets_drawn_by_chance_have_the_outliers_sizes_and_visible_keys_alone() -> None:
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 300, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    real = rows(sets_of(attnrb.Rebalance(alpha=1.0, threshold=0.05), ids, mask))
    drawn = rows(sets_of(ShuffledRebalance(alpha=1.0, threshold=0.05), ids, mask))
    assert real.keys() == drawn.keys() and real != drawn
    for (batch, head, query), keys in drawn.items():
        first = 5 if batch == 0 else 0
        assert len(keys) == len(real[batch, head, query])
        assert keys == sorted(set(keys))
        assert all(first <= key < query for key in keys)
    # A text has the same sets alone, without padding, as in the batch.
    alone = rows(sets_of(ShuffledRebalance(alpha=1.0, threshold=0.05), ids[:1, 5:], mask[:1, 5:]))
    for (_, head, query), keys in alone.items():
        assert [key + 5 for key in keys] == drawn[0, head, query + 5]
    # Near and far keys come about equally often.
    places = [key / query for (batch, _, query), keys in drawn.items() if batch == 1 and query > 12 for key in keys]
    assert len(places) > 30 and 0.3 < float(np.mean(places)) < 0.7


def test_it_says_that_it_is_a_control() -> None:
    policy = ShuffledRebalance(alpha=4.0, normalize=True)
    assert policy.label() == "alpha=4,normalize=true,shuffled sets"
    assert policy != attnrb.Rebalance(alpha=4.0, normalize=True) and hash(policy) == hash(replace(policy))


def test_settings_are_chosen_on_development_items_and_controls_stand_beside_them(data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "run.jsonl"
    plan = replace(PLAN, data=data)
    report = study_report(tiny_model(), tiny_tokenizer(), plan, path, model_name="tiny")
    assert report is not None
    arms = set(report["arms"])
    assert {"alpha 0.2", "alpha 16, rows normalised", "alpha 1, source layer 1"} <= arms
    assert {"alpha 1, all keys (control)", "alpha 1, sets drawn by chance (control)"} <= arms
    assert {each["items"] for each in report["results"]} == {3}
    assert report["above_chance"].keys() == {"piqa", "siqa", "mmlu non-stem", "mmlu stem"}
    records = lines(path)
    development = [each for each in records if each["prompting"] == "development"]
    held_out = {each["prompt"] for each in records if each["prompting"] == "held-out"}
    assert not held_out & {each["prompt"] for each in development}
    assert report["chosen_on"] == len({each["prompt"] for each in development})
    # The chosen one is the best on development items, the first of equals.
    for kind, tasks in {"questions": set(report["above_chance"]), "made items": {"conflict", "story"}}.items():
        [chosen] = [arm for arm in arms if arm.startswith(f"chosen for {kind}")]
        mine = [each for each in development if (each["task"] in report["above_chance"]) == (kind == "questions")]
        assert tasks <= {each["task"] for each in mine}
        settings = settings_of_rebalancing(LAYERS)
        right = {name: sum(each["correct"] for each in mine if each["arm"] == name) for name in settings}
        assert chosen == f"chosen for {kind}: {max(right, key=lambda name: right[name])}"


def test_an_oracle_that_chose_its_strength_on_held_out_items_is_refused(tmp_path: Path) -> None:
    items = study_tasks(PLAN)["story"].items(3, "held-out", 0)
    oracle = Arm("chosen for made items: alpha 4", policy=attnrb.Rebalance(alpha=4.0), tasks=("story",))
    with RunFile(tmp_path / "run.jsonl", {}) as file:
        study = Study(tiny_model(), tiny_tokenizer(), PLAN, file)
        with pytest.raises(LeakError, match="its setting was chosen on 1 of the items"):
            study.ask_arms([oracle], frozenset({items[0].fingerprint}))
        assert not file.records


def test_thoughts_are_asked_only_of_a_model_that_does_not_guess(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    plan = replace(PLAN, data=data, budgets=(0, 3), items=17)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tasks = {
        "siqa, 0 computed tokens",
        "siqa, 3 computed tokens",
        "gsm8k, 0 computed tokens",
        "gsm8k, 3 computed tokens",
    }
    with RunFile(tmp_path / "guess.jsonl", {}) as file:
        study = Study(model, tokenizer, plan, file)
        arms, seen = rebalancing._thought(study, None)
        assert arms == () and study.asked.left_out.keys() == tasks
        assert all("no more than by chance" in each for each in study.asked.left_out.values())
        assert {key.prompting for key in file.records} == {"development"} and len(seen) > 0
    able = {name: source._replace(chance=-1.0) for name, source in QUESTIONS.items()}
    monkeypatch.setattr(rebalancing, "QUESTIONS", able)
    with RunFile(tmp_path / "able.jsonl", {}) as file:
        study = Study(model, tokenizer, plan, file)
        arms, seen = rebalancing._thought(study, ("alpha 4", attnrb.Rebalance(alpha=4.0)))
        assert {arm.name for arm in arms} == {"plain", "alpha 0.2", "alpha 1", "chosen for questions: alpha 4"}
        study.ask_arms(arms, seen)
        mine = [each for each in file.records.values() if each["task"] == "siqa, 3 computed tokens"]
        assert {each["tokens"] for each in mine} == {3}
        assert sum(each["prompting"] == "held-out" for each in mine) == 4 * 2
