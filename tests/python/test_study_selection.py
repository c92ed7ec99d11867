"""The study of selection: what is tried, on how many items, what wins, and that a search may halve too."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("optuna")

import torch
from attnrb.evaluation.trials import halving_rounds
from attnrb.policies import HeadProfile
from attnrb.studies.plan import StudyPlan
from attnrb.studies.selection import candidates
from attnrb.studies.study_run import study_report
from saved_tiny_model import LAYERS, tiny_model, tiny_tokenizer

HEADS = 4


def test_rounds_grow_by_the_factor_to_all_items() -> None:
    assert halving_rounds(72, 3) == (8, 24, 72)
    assert halving_rounds(20, 3) == (6, 20)
    assert halving_rounds(5, 3) == (5,)
    assert halving_rounds(72, None) == (72,)


def test_candidates_are_the_best_heads_and_layers_at_each_strength() -> None:
    scores = [[0.0, 1.0, -9.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.5, 0.2, 0.1, 0.0]]
    found = candidates((4.0, 16.0), HeadProfile(scores, 1))
    assert len(found) == 2 * len({name.split(",", 1)[1] for name in found})
    best = found["×4, 4 heads"].heads
    assert isinstance(best, HeadProfile) and best.chosen == {0: (1,), 1: (0,), 2: (0, 1)}
    assert found["×16, layer 1"].layers == (1,) and found["×16, layers 0, 1"].layers == (0, 1)
    assert {policy.strength for policy in found.values()} == {4.0, 16.0}
    assert "×4, 16 heads" not in found  # the model has 12


def test_the_winner_of_the_last_round_is_asked_the_held_out_items(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    plan = StudyPlan(study="selection", items=2, examples=1, development=12, strengths=(4.0, 16.0), keep=3)
    path = tmp_path / "run.jsonl"
    report: Any = study_report(tiny_model(), tiny_tokenizer(), plan, path, model_name="tiny")
    lines = [record for record in map(json.loads, path.read_text("utf-8").splitlines()) if "arm" in record]
    asked = Counter(each["arm"] for each in lines if each["prompting"] == "development" and each["arm"] != "profile")
    tasks = len(plan.tasks)
    settings = candidates(plan.strengths, HeadProfile([[0.0] * HEADS] * LAYERS, 1))
    # All on 4 items of each task, the better third on 12.
    assert sorted(Counter(asked.values()).items()) == [
        (4 * tasks, len(settings) - -(-len(settings) // 3)),
        (12 * tasks, -(-len(settings) // 3)),
    ]
    first = {
        name: sum(
            each["correct"]
            for each in lines
            if each["arm"] == name and 1 <= each["item"] < 5 and each["prompting"] == "development"
        )
        for name in asked
    }
    went_on = {name for name, count in asked.items() if count == 12 * tasks}
    assert min(first[name] for name in went_on) >= max(first[name] for name in asked if name not in went_on)
    right = {
        name: sum(each["correct"] for each in lines if each["arm"] == name and each["prompting"] == "development")
        for name in went_on
    }
    [selected] = [arm for arm in report["arms"] if arm.startswith("selected: ")]
    assert right[selected.removeprefix("selected: ")] == max(right.values())
    assert report["chosen_on"] == 12 * tasks
    assert {each["setting"]: each["correct"] for each in report["trials"]}.items() >= right.items()
    held_out = {each["prompt"] for each in lines if each["prompting"] == "held-out"}
    assert not held_out & {each["prompt"] for each in lines if each["prompting"] == "development" and "prompt" in each}


def test_a_search_halves_too(tmp_path: Path) -> None:
    from attnrb.evaluation.trials import SearchPlan, search
    from attnrb.hosts.lm_eval.model import AttnrbLM
    from study_data import save_study_data
    from tiny_evaluation import save_roomy_model

    data, model = save_study_data(tmp_path / "data"), save_roomy_model(tmp_path / "model")
    lm = AttnrbLM(str(model), plain=True)
    plan = SearchPlan(("piqa",), data, evaluations=6, development=12, held_out=4, halving=3)
    result = search(lm, plan, tmp_path / "run.jsonl", model="tiny")
    assert result is not None
    assert sorted(trial.items for trial in result.trials) == [4] * 4 + [12] * 2
    furthest = [trial for trial in result.trials if trial.items == 12]
    best = min(furthest, key=lambda trial: (-trial.accuracy, trial.changed, trial.number))
    assert result.chosen == best.config
    dropped = [trial.accuracy for trial in result.trials if trial.items == 4]
    records = [
        record
        for record in map(json.loads, (tmp_path / "run.jsonl").read_text("utf-8").splitlines())
        if "arm" in record
    ]
    assert len(dropped) == 4 and len({each["item"] for each in records if each["arm"] == "plain"}) == 12 + 4
    with pytest.raises(ValueError, match="halving: expected 2 or above"):
        SearchPlan(("piqa",), data, halving=1)
