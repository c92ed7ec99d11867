"""The embedded model on real questions: plain is the harness' own model, alpha 0 and batches change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("gguf")

from attnrb.evaluation.grid import evaluate
from attnrb.evaluation.plan import Plan
from attnrb.evaluation.selection import Cell, select
from attnrb.hosts.lm_eval.model import AttnrbLM
from attnrb.policies.rebalance import RebalanceConfig
from tiny_evaluation import no_tasks

TASKS = ("mmlu_anatomy", "mmlu_sociology", "piqa", "siqa")
ITEMS = 2
ROUNDING = 2e-3
"""Of a log-likelihood: sums of some twenty log-probabilities of logits of the order of 20, float32 over 30 layers."""

Answers = dict[tuple[str, int, str], dict[str, Any]]


@pytest.fixture(scope="module")
def lm(smollm2_folder: Path) -> AttnrbLM:
    return AttnrbLM(plain=True)


@pytest.fixture(scope="module")
def answers(lm: AttnrbLM, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answered(
        lm, shared, tmp_path_factory.mktemp("auto") / "run.jsonl", RebalanceConfig(alpha=0.0), RebalanceConfig()
    )


def answered(lm: AttnrbLM, shared: Path, path: Path, *configs: RebalanceConfig) -> Answers:
    assert evaluate(lm, Plan(TASKS, shared / "data", configs, limit=ITEMS), path, model="SmolLM2") is not None
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {(each["task"], each["item"], each["arm"]): each for each in records if "task" in each}


@pytest.mark.shared
def test_plain_is_the_harness_own_model_item_by_item(lm: AttnrbLM, answers: Answers, shared: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=3)
    tasks = [each.build(Cell("direct")) for each in select(TASKS, shared / "data")]
    expected = simple_evaluate(harness, tasks=tasks, limit=ITEMS, bootstrap_iters=0, task_manager=no_tasks())["samples"]
    for task in TASKS:
        assert len(expected[task]) == ITEMS
        for sample in expected[task]:
            found = answers[(task, sample["doc_id"], "plain")]
            likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
            assert found["loglikelihoods"] == pytest.approx(likelihoods, abs=ROUNDING)
            assert found["correct"] == (sample["acc"] == 1.0)


@pytest.mark.shared
def test_alpha_0_is_plain_and_the_default_is_not(answers: Answers) -> None:
    changed = 0
    for (task, item, arm), plain in answers.items():
        if arm == "plain":
            control, rebalanced = answers[(task, item, "alpha=0")], answers[(task, item, "alpha=0.2")]
            assert control["answer"] == plain["answer"]
            assert control["loglikelihoods"] == pytest.approx(plain["loglikelihoods"], abs=ROUNDING)
            changed += rebalanced["loglikelihoods"] != pytest.approx(plain["loglikelihoods"], abs=ROUNDING)
    assert changed == len(TASKS) * ITEMS


@pytest.mark.shared
def test_batch_size_changes_no_answer(lm: AttnrbLM, answers: Answers, shared: Path, tmp_path: Path) -> None:
    one = AttnrbLM(lm.model, tokenizer=lm.tokenizer, plain=True, batch_size=1)
    alone = answered(one, shared, tmp_path / "run.jsonl", RebalanceConfig())
    assert alone.keys() == {key for key in answers if key[2] != "alpha=0"}
    for key, found in alone.items():
        assert found["answer"] == answers[key]["answer"]
        assert found["loglikelihoods"] == pytest.approx(answers[key]["loglikelihoods"], abs=ROUNDING)
