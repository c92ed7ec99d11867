"""lm-evaluation-harness by vLLM: the same numbers as by transformers, within rounding."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'attnrb[eval]'")

import engines  # noqa: F401 (settings of vLLM, read when it is imported)
from attnrb import Rebalance
from attnrb.hosts.lm_eval.model import AttnrbLM
from attnrb.hosts.lm_eval.vllm import VllmLM
from lm_eval.api.instance import Instance

MOST = 1e-3  # of a sum over ten tokens or so

QUESTIONS = [
    ("The capital of France is", [" Paris.", " London, in the north."]),
    ("Water boils at", [" one hundred degrees", " noon"]),
    ("Once upon a time, in a small village by the sea,", [" there lived an old fisherman", " the the the"]),
]


def test_choices_are_scored_alike() -> None:
    requests = [
        Instance("loglikelihood", {}, (context, choice), index)
        for index, (context, choices) in enumerate(QUESTIONS)
        for choice in choices
    ]
    policies = [None, Rebalance(alpha=1.0)]
    hf = AttnrbLM(plain=True)
    wanted = []
    for policy in policies:
        with hf.rebalanced(policy):
            wanted.append(hf.loglikelihood(requests, disable_tqdm=True))
    options = {"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}
    served = VllmLM(engine=options)
    for policy, expected in zip(policies, wanted, strict=True):
        with served.rebalanced(policy):
            found = served.loglikelihood(requests, disable_tqdm=True)
        for one, other in zip(found, expected, strict=True):
            assert abs(one[0] - other[0]) < MOST
            assert one[1] == other[1]
    assert any(abs(one[0] - other[0]) > 10 * MOST for one, other in zip(*wanted, strict=True))


def test_the_command_line_has_the_same_numbers(tmp_path: Path) -> None:
    rows = [
        {"query": f"Question: {context}\n", "choices": [choice.strip() for choice in choices], "gold": 0}
        for context, choices in QUESTIONS
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def records(engine: str) -> dict[tuple[int, str], dict[str, object]]:
        command = [
            "eval",
            "-t",
            "piqa",
            "--data",
            ".",
            "--policy",
            "rebalance",
            "--set",
            "alpha=1.0",
            "--engine",
            engine,
        ]
        command += ["--json", f"{engine}.json"]
        ran = subprocess.run(
            [sys.executable, "-m", "attnrb", *command], cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        lines = (tmp_path / f"{engine}.items.jsonl").read_text("utf-8").splitlines()
        return {(each["item"], each["arm"]): each for each in map(json.loads, lines) if "task" in each}

    wanted, found = records("transformers"), records("vllm")
    assert len(wanted) == 2 * len(QUESTIONS)
    assert found.keys() == wanted.keys()
    for key, each in wanted.items():
        assert found[key]["answer"] == each["answer"]
        assert found[key]["loglikelihoods"] == pytest.approx(each["loglikelihoods"], abs=MOST)
    reports = [json.loads((tmp_path / f"{engine}.json").read_text("utf-8")) for engine in ("transformers", "vllm")]
    accuracies = [
        [group["accuracy"] for result in report["results"] for group in result["groups"].values()] for report in reports
    ]
    assert accuracies[0] == accuracies[1]


def test_a_study_scores_and_writes_alike() -> None:
    from attnrb import Emphasis
    from attnrb.hosts.vllm.offline import offline_engine
    from attnrb.models import load
    from attnrb.studies.answers import answer_row
    from attnrb.studies.engines import ModelEngine, VllmEngine
    from attnrb.studies.instructions import instruction_items
    from attnrb.studies.material import study_items
    from attnrb.studies.shuffled import ShuffledRebalance

    model, tokenizer = load()
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}
    served = VllmEngine(offline_engine(model, tokenizer, 256, options), model, tokenizer)
    own = ModelEngine(model, tokenizer)
    items = [*study_items("conflict", 3), *study_items("retrieval", 2)]
    rows = [
        [
            answer_row(model, tokenizer, item.prompt(tokenizer, span="marked"), " " + word, "")
            for word in item.candidates
        ]
        for item in items
    ]
    prompts = [item.prompt(tokenizer, span="marked") for item in itertools.islice(instruction_items("held-out", 0), 3)]
    all_heads, few = Emphasis(strength=16), Emphasis(strength=16, heads="smollm2-135m-instruct")
    for policy in (None, all_heads, few, Emphasis(share=0.3, rows="all")):
        assert served.serves(policy)
        for mine, other in zip(served.scores(rows, policy), own.scores(rows, policy), strict=True):
            assert mine == pytest.approx(other, abs=MOST)
        assert served.written(prompts, 8, policy) == own.written(prompts, 8, policy)
    for unserved in (Emphasis(rows="last"), Emphasis(strength=1.0, outside=0.01, rows="all"), ShuffledRebalance()):
        assert not served.serves(unserved)
