"""Runs on a tiny model: against the harness' own model, in any batch, stopped and gone on with, on a full disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from attnrb.evaluation.grid import evaluate
from attnrb.evaluation.plan import Plan
from attnrb.evaluation.runfile import RunFile, RunFileError, check_usable
from attnrb.evaluation.selection import Cell, select
from attnrb.hosts.lm_eval.model import AttnrbLM
from attnrb.policies.rebalance import RebalanceConfig
from saved_tiny_model import tiny_tokenizer
from tiny_evaluation import PAIRS, no_tasks, roomy_model, save_data

STRONG = RebalanceConfig(alpha=3.0)
TASKS = ("mmlu_anatomy", "mmlu_sociology", "piqa", "siqa")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model() -> Any:
    return roomy_model()


def lm_of(model: Any, batch_size: int | str = "auto", **options: Any) -> AttnrbLM:
    return AttnrbLM(model, tokenizer=tiny_tokenizer(), batch_size=batch_size, **{"plain": True, **options})


def answers(lm: AttnrbLM, plan: Plan, path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    report = evaluate(lm, plan, path, model="tiny")
    assert report is not None
    return {tuple(key): record for key, record in read_records(path)}


def read_records(path: Path) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        if "task" in record:
            budget = None if record["budget"] is None else tuple(record["budget"])
            yield (record["task"], record["item"], record["arm"], record["prompting"], budget), record


def test_plain_is_the_harness_own_model_item_by_item(data: Path, model: Any, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = answers(lm_of(model), Plan(TASKS, data), tmp_path / "run.jsonl")
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3)
    tasks = [each.build(Cell("direct")) for each in select(TASKS, data)]
    expected = simple_evaluate(harness, tasks=tasks, bootstrap_iters=0, task_manager=no_tasks())
    compared = 0
    for task, samples in expected["samples"].items():
        for sample in samples:
            record = found[(task, sample["doc_id"], "plain", "direct", None)]
            likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
            # Both sum float32 logits of the order of 10; padding and batches order the sums in other ways.
            assert record["loglikelihoods"] == pytest.approx(likelihoods, abs=1e-4)
            assert record["correct"] == (sample["acc"] == 1.0)
            compared += 1
    assert compared == 2 * 5 + 2 * PAIRS


def test_the_harness_own_loop_takes_the_model(data: Path, model: Any, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate

    found = answers(lm_of(model), Plan(("siqa",), data, configs=(STRONG,)), tmp_path / "run.jsonl")
    (task,) = [each.build(Cell("direct")) for each in select(["siqa"], data)]
    lm = lm_of(model, plain=False, config=STRONG)
    try:
        samples = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, task_manager=no_tasks())["samples"]["siqa"]
    finally:
        lm._patch.remove()
    for sample in samples:
        record = found[("siqa", sample["doc_id"], "alpha=3", "direct", None)]
        assert record["loglikelihoods"] == pytest.approx([each[0] for each in sample["filtered_resps"]], abs=1e-4)


def test_alpha_0_is_plain(data: Path, model: Any, tmp_path: Path) -> None:
    plan = Plan((*TASKS, "gsm8k"), data, (RebalanceConfig(alpha=0.0),), "both", (8,))
    found = answers(lm_of(model), plan, tmp_path / "run.jsonl")
    pairs = [(record, found[(*key[:2], "alpha=0", *key[3:])]) for key, record in found.items() if key[2] == "plain"]
    assert len(pairs) == 2 * (2 * 5 + 2 * PAIRS + 3)
    for plain, rebalanced in pairs:
        assert plain["answer"] == rebalanced["answer"]
        assert plain.get("output") == rebalanced.get("output")
        assert plain.get("loglikelihoods", []) == pytest.approx(rebalanced.get("loglikelihoods", []), abs=1e-4)


def test_rebalancing_reaches_the_scores(data: Path, model: Any, tmp_path: Path) -> None:
    found = answers(lm_of(model), Plan(TASKS, data, (STRONG,)), tmp_path / "run.jsonl")
    for key, record in found.items():
        if key[2] == "plain":
            assert record["loglikelihoods"] != pytest.approx(found[(*key[:2], "alpha=3", *key[3:])]["loglikelihoods"])


@pytest.fixture(scope="module")
def usual(data: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], dict[str, Any]]:
    return answers(lm_of(model), mixed(data), tmp_path_factory.mktemp("usual") / "auto.jsonl")


def mixed(data: Path) -> Plan:
    """Questions of every kind, answered directly and after computed tokens."""
    return Plan((*TASKS, "gsm8k"), data, (STRONG,), "both", (0, 10))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_no_answer(
    data: Path, model: Any, usual: dict[tuple[Any, ...], dict[str, Any]], tmp_path: Path, batch_size: int
) -> None:
    other = answers(lm_of(model, batch_size), mixed(data), tmp_path / "other.jsonl")
    assert usual.keys() == other.keys()
    for key, record in usual.items():
        assert other[key]["answer"] == record["answer"], key
        assert other[key].get("output") == record.get("output"), key
        assert other[key].get("loglikelihoods", []) == pytest.approx(record.get("loglikelihoods", []), abs=1e-4)


def test_computed_tokens_keep_to_the_budget(data: Path, model: Any, tmp_path: Path) -> None:
    plan = Plan(("siqa", "gsm8k"), data, prompting="cot", budgets=(0, 5, 20))
    for key, record in answers(lm_of(model), plan, tmp_path / "run.jsonl").items():
        assert record["computed_tokens"] == key[4][1]
    ranged = Plan(("siqa",), data, prompting="cot", min_computed=3, max_computed=9)
    for record in answers(lm_of(model), ranged, tmp_path / "ranged.jsonl").values():
        assert 3 <= record["computed_tokens"] <= 9


def test_shots_are_not_asked(data: Path, model: Any, tmp_path: Path) -> None:
    found = answers(lm_of(model), Plan(("siqa",), data, shots=2), tmp_path / "run.jsonl")
    assert {key[1] for key in found} == set(range(2, PAIRS))
    (selected,) = select(["siqa"], data, shots=2)
    from attnrb.evaluation.runner import prepare

    question = prepare(lm_of(model), [selected], [Cell("direct")])[0]
    assert question.context.startswith("Context: c0\n")
    assert question.context.count("Answer: B\n\n") == 1  # of item 0
    assert question.context.count("Answer: A\n\n") == 1  # of item 1


def test_limit_and_order(data: Path, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = answers(lm_of(model), Plan(("siqa", "mmlu_anatomy"), data, limit=2), path)
    assert {key[:2] for key in first} == {(task, item) for task in ("siqa", "mmlu_anatomy") for item in (0, 1)}
    size = path.stat().st_size
    more = answers(lm_of(model), Plan(("siqa", "mmlu_anatomy"), data, limit=3), path)
    assert len(more) == 12
    assert path.read_bytes()[:size].count(b'"task"') == 8  # what was there is untouched, and only the rest is new
    drawn = [Plan(("piqa",), data, limit=3, shuffle=True, seed=seed) for seed in (0, 0, 1, 2, 3)]
    chosen = [{key[1] for key in answers(lm_of(model), plan, tmp_path / f"{n}.jsonl")} for n, plan in enumerate(drawn)]
    assert chosen[0] == chosen[1]
    assert any(each != chosen[0] for each in chosen[2:])


class _Killed(BaseException):
    pass


@pytest.mark.slow
def test_stopped_anywhere_and_gone_on_with(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan((*TASKS, "gsm8k"), data, (STRONG,), "both", (4,))
    whole = answers(lm_of(model), plan, tmp_path / "whole.jsonl")
    path = tmp_path / "stopped.jsonl"
    lines = 0
    write = os.write

    def killed(handle: int, content: bytes) -> int:
        nonlocal lines
        if lines and b'"task"' in content:
            lines -= 1
            if lines == 0:
                write(handle, content[: len(content) // 2])  # what a kill leaves
                raise _Killed
        return write(handle, content)

    monkeypatch.setattr(os, "write", killed)
    stops = 0
    for lines in (1, 4, 9, 2, 30, 7):  # noqa: B007 (the function above counts it down)
        try:
            evaluate(lm_of(model), plan, path, model="tiny")
        except _Killed:
            stops += 1
    monkeypatch.undo()
    assert stops >= 4
    evaluate(lm_of(model), plan, path, model="tiny")
    records = list(read_records(path))
    keys = [key for key, _ in records]
    assert len(keys) == len(set(keys))  # nothing twice
    assert set(keys) == set(whole)  # nothing lost
    timeless = [{name: value for name, value in record.items() if name != "seconds"} for _, record in records]
    assert all({**whole[key], **record} == whole[key] | record for key, record in records)
    assert all(record["answer"] == whole[key]["answer"] for key, record in zip(keys, timeless, strict=True))


def test_full_disk(data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    plan = Plan(TASKS, data, (STRONG,))
    write = os.write
    room = 8

    def full(handle: int, content: bytes) -> int:
        nonlocal room
        if b'"attnrb_eval"' in content:
            return write(handle, content)
        room -= 1
        if room == 0:
            return write(handle, content[:10])  # a part still fits
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFileError, match=r"No space left on device; the \d+ finished items in it are kept"):
        evaluate(lm_of(model), plan, path, model="tiny")
    monkeypatch.undo()
    kept = [key for key, _ in read_records(path)]
    assert len(kept) == 7
    assert path.read_bytes().endswith(b"\n")
    assert len(answers(lm_of(model), plan, path)) == 2 * (2 * 5 + 2 * PAIRS)


def test_a_changed_question_is_asked_again(model: Any, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    path = tmp_path / "run.jsonl"
    plan = Plan(("siqa",), data, (STRONG,))
    evaluate(lm_of(model), plan, path, model="tiny")
    file = data / "siqa.jsonl"
    file.write_text(file.read_text("utf-8").replace("Context: c3", "Context: changed"), "utf-8")
    evaluate(lm_of(model), plan, path, model="tiny")
    assert [key[1] for key, _ in read_records(path)].count(3) == 4
    assert len(list(read_records(path))) == 2 * PAIRS + 2


class TestRunFile:
    def test_another_identity_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        with RunFile(path, {"dtype": "float32"}) as file:
            file.start({})
        with pytest.raises(RunFileError, match="was made with dtype 'float32' and not 'bfloat16': name another"):
            RunFile(path, {"dtype": "bfloat16"})

    def test_two_runs_do_not_share_a_file(self, tmp_path: Path) -> None:
        with RunFile(tmp_path / "run.jsonl", {}), pytest.raises(RunFileError, match="is in use by another run"):
            RunFile(tmp_path / "run.jsonl", {})

    def test_another_file_is_refused_and_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("my notes\nand more\n", "utf-8")
        with pytest.raises(RunFileError, match="is no file of a run"):
            RunFile(path, {})
        assert path.read_text("utf-8") == "my notes\nand more\n"

    def test_what_is_known_before_the_model_is_told_before(self, tmp_path: Path) -> None:
        path = tmp_path / "run.jsonl"
        check_usable(path, {"chat": True})
        assert not path.exists()
        with RunFile(path, {"model": "x", "chat": False}) as file:
            file.start({})
            with pytest.raises(RunFileError, match="is in use by another run"):
                check_usable(path, {"chat": False})
        check_usable(path, {"chat": False})
        with pytest.raises(RunFileError, match="was made with chat False and not True: name another file"):
            check_usable(path, {"chat": True})
        before = path.read_bytes()
        path.write_bytes(before + b'{"attnrb_eval": 1, "iden')  # as a kill leaves it
        check_usable(path, {"chat": False})
        RunFile(path, {"model": "x", "chat": False}).close()  # no lock is left

    def test_a_place_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("", "utf-8")
        with pytest.raises(RunFileError, match="could not be opened"):
            RunFile(tmp_path / "file" / "run.jsonl", {})


def test_a_bar_counts_answers(data: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(("siqa",), data, (STRONG,), limit=2)
    evaluate(lm_of(model), plan, tmp_path / "run.jsonl", model="tiny", progress=True)
    assert "4 of 4 answers" in capsys.readouterr().err
    evaluate(lm_of(model), plan, tmp_path / "again.jsonl", model="tiny", progress=False)
    assert capsys.readouterr().err == ""


def test_lm_eval_arguments() -> None:
    from attnrb.hosts.lm_eval.model import _batch_size

    assert (_batch_size("auto"), _batch_size("auto:4"), _batch_size("8"), _batch_size(2)) == (None, None, 8, 2)
    for wrong in (0, "-1", "many"):
        with pytest.raises(ValueError, match="batch_size: expected a number"):
            _batch_size(wrong)


def test_what_somebody_else_has_written_is_read(tmp_path: Path) -> None:
    record = {"task": "t", "item": 0, "arm": "plain", "prompting": "direct", "budget": None, "answer": "1"}
    with RunFile(tmp_path / "run", {}) as first, RunFile(tmp_path / "run", {}, lock=False) as second:
        second.append([record])
        assert not first.records
        first.reread()
        assert list(first.records.values()) == [record]
