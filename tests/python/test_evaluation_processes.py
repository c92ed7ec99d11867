"""An evaluation in two processes on the CPU: they share the items out, and find what one process finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from attnrb.evaluation.grid import evaluate
from attnrb.evaluation.plan import Plan
from attnrb.hosts.lm_eval.model import AttnrbLM
from launchers import ACCELERATE, launch
from tiny_evaluation import MMLU_ITEMS, PAIRS, save_data, save_roomy_model

pytestmark = pytest.mark.slow

TASKS = ("mmlu_anatomy", "siqa", "piqa")


def read_records(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if "task" in line]


def test_two_processes_share_the_items(tmp_path: Path) -> None:
    data, model = save_data(tmp_path / "data"), save_roomy_model(tmp_path / "model")
    arguments = f"eval --tasks {','.join(TASKS)} --prompting both --budgets 4 --batch-size 2 --json two.json"
    ran = launch(ACCELERATE, "-m", "attnrb", *arguments.split(), "--data", data, "--model", model, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("No difference shown in") == 1  # one of them speaks
    assert ran.stderr.count("Reading the items") == 1

    one = evaluate(
        AttnrbLM(str(model), plain=True, batch_size=2),
        Plan(TASKS, data, prompting="both", budgets=(4,)),
        tmp_path / "one.jsonl",
        model=str(model),
    )
    assert one is not None
    alone = {
        (each["task"], each["item"], each["arm"], each["prompting"]): each
        for each in read_records(tmp_path / "one.jsonl")
    }
    together = read_records(tmp_path / "two.items.jsonl")
    assert len(together) == len(alone) == 2 * 2 * (MMLU_ITEMS + 2 * PAIRS)  # each once
    for each in together:
        same = alone[(each["task"], each["item"], each["arm"], each["prompting"])]
        assert each["answer"] == same["answer"]
        assert each.get("output") == same.get("output")
        assert each.get("loglikelihoods", []) == pytest.approx(same.get("loglikelihoods", []), abs=1e-4)
    report = json.loads((tmp_path / "two.json").read_text("utf-8"))
    assert report["environment"]["processes"] == 2
    assert report["results"] == json.loads(one.to_json())["results"]
    assert report["differences"] == json.loads(one.to_json())["differences"]
