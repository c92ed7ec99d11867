"""Written answers in the study of emphasis: what follows an instruction, and generation in batches; and needles."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy", reason="studies need the package scipy")
pytest.importorskip("statsmodels", reason="studies need the package statsmodels")

import attnrb
import torch
from attnrb.studies.asked import Asked
from attnrb.studies.generation import generate
from attnrb.studies.instructions import KINDS, follows, instruction_items, repeats_itself
from attnrb.studies.material import different_items
from attnrb.studies.needle import needle_items
from attnrb.studies.plan import StudyPlan, study_tasks
from attnrb.studies.study_run import study_report
from attnrb.studies.writing import think, write
from saved_tiny_model import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

RIGHT = {
    "lower case": ("the door is old, they say.", " it is 3 o'clock there \n"),
    "upper case": ("THE DOOR IS OLD", "IT IS 3 O'CLOCK."),
    "no commas": ("The door is old.", "One; two and three"),
    "end phrase": ("The door is old. That is all.", "Old it is. That is all.\n"),
    "JSON": ('{"answer": "an old door"}', '```json\n{"answer": "an old door", "n": 1}\n```'),
}
WRONG = {
    "lower case": ("The door is old.", "1 2 3 4", ""),
    "upper case": ("THE DOOR iS OLD", "1 2 3", "OLD"),
    "no commas": ("old, they say it is", "Old.", ""),
    "end phrase": ("That is all. The door is old.", "the door. that is all."),
    "JSON": (
        '{"answer": "an old door"',
        'Here it is: {"answer": "an old door"}',
        '{"text": "an old door"}',
        '["answer", "an old", "door"]',
        '{"answer": 7, "a": "b c d e"}',
        '{"answer": "a b c", "answer": "d e f"}',
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_tells_what_follows_an_instruction(kind: str) -> None:
    assert [follows(kind, text) for text in RIGHT[kind]] == [True] * len(RIGHT[kind])
    assert [follows(kind, text) for text in WRONG[kind]] == [False] * len(WRONG[kind])


def test_items_of_all_kinds_come_with_an_answer_that_follows_them() -> None:
    items = different_items(instruction_items("held-out", 0), 300)
    assert len(items) == 300 and {item.group for item in items} == set(KINDS)
    other = {item.fingerprint for item in different_items(instruction_items("development", 0), 300)}
    assert not other & {item.fingerprint for item in items}
    for item in items:
        assert item.judge(item.answer)
        assert item.sentences[item.marked] == KINDS[item.group].instruction
        assert item.sentences[item.wrong] != item.sentences[item.marked]


def test_repetition_is_told() -> None:
    assert repeats_itself("and the door " * 5)
    assert not repeats_itself("and the door and the door")  # too short to say
    assert not repeats_itself("one two three four five six seven eight nine ten eleven")


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_the_span_is_the_instruction_in_a_chat_and_without_one(template: str | None) -> None:
    tokenizer = tiny_tokenizer(template)
    for item in itertools.islice(instruction_items("held-out", 0), 5):
        for form, span in (("as it is", "marked"), ("as it is", "wrong"), ("important", "none")):
            marked = item.prompt(tokenizer, form, span)
            [spans] = marked.spans
            assert len(spans) == (span != "none")
            ids = marked.inputs["input_ids"][0]
            decoded = tokenizer.decode(ids)
            assert item.text(form)[0] in decoded and decoded.endswith("<s>" if template else "Answer:\n")
            for each in spans:
                place = item.marked if span == "marked" else item.wrong
                assert item.sentences[place] in tokenizer.decode(ids[each.start : each.end])


@pytest.mark.parametrize("policy", [None, attnrb.Emphasis(strength=16), attnrb.Emphasis(strength=4, rows="last")])
def test_a_batch_is_written_as_each_prompt_alone(policy: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [item.prompt(tokenizer, span="marked") for item in itertools.islice(instruction_items("held-out", 0), 4)]
    assert len({prompt.inputs["input_ids"].shape[1] for prompt in prompts}) > 1
    model.config.max_position_embeddings = 4096
    if policy is None:
        found = write(model, tokenizer, prompts, 6)
        alone = [
            generate(model, tokenizer, prompt.inputs["input_ids"], max_new_tokens=6).token_ids for prompt in prompts
        ]
    else:
        with attnrb.patch(model, policy) as patched:
            found = write(model, tokenizer, prompts, 6, patched)
            alone = []
            for prompt in prompts:
                with patched.spans(prompt.spans, prompt=prompt.inputs["input_ids"].shape[1]):
                    alone.append(generate(model, tokenizer, prompt.inputs["input_ids"], max_new_tokens=6).token_ids)
    assert found == [(tokenizer.decode(ids), len(ids)) for ids in alone]


def test_thoughts_have_the_budget_s_tokens() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [item.prompt(tokenizer) for item in itertools.islice(instruction_items("held-out", 0), 2)]
    assert [tokens for _, tokens in think(model, tokenizer, prompts, 5, 4)] == [5, 5]


def test_a_needle_lies_where_its_item_says_and_others_like_it_elsewhere() -> None:
    for tokens in (96, 512, 2048):
        for item in itertools.islice(needle_items(tokens)("held-out", 0), 9):
            text = item.text()[0]
            # Characters stand for tokens; the last sentence may be left out.
            assert 0.8 * tokens - 40 < len(text) / 3.9 <= tokens
            assert item.candidates[0] in item.sentences[item.marked]
            others = [each for each in item.sentences if each.startswith("The word for the")]
            assert len(others) == 4 and item.sentences[item.wrong] in others and item.wrong != item.marked
            assert item.automatic == item.marked
            assert any(word in item.sentences[item.wrong] for word in item.candidates[1:])
            depth = item.marked / len(item.sentences)
            wanted = {"begin": 0.1, "middle": 0.5, "end": 0.9}[item.group.split()[0]]
            assert tokens == 96 or abs(depth - wanted) < 0.1
    with pytest.raises(ValueError, match="needles: expected prompts of 96 tokens or more"):
        StudyPlan(needles=(12,))


def test_needles_beyond_the_context_are_left_out_and_named() -> None:
    plan = StudyPlan(needles=(128, 4096))
    assert "needle 4096" not in study_tasks(plan, 2048) and "needle 128" in study_tasks(plan, 2048)
    asked = Asked(plan, 2048)
    assert asked.left_out == {"needle 4096": "its prompts are longer than the model's context of 2048 tokens"}


def test_a_study_writes_and_looks_for_needles(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model()
    model.config.max_position_embeddings = 512
    plan = StudyPlan(
        items=2, examples=1, development=1, strengths=(16.0,), keep=3, needles=(128, 1024), written=5, tokens=4
    )
    path = tmp_path / "run.jsonl"
    report = study_report(model, tiny_tokenizer(), plan, path, model_name="tiny")
    assert report is not None
    arms = {(each["arm"], each["task"]): each for each in report["results"]}
    for task in ("needle 128", "written"):
        for heads in ("all", "transferred"):
            assert (f"×16, {heads} heads", task) in arms
        assert ("text: repeated", task) in arms and ("text: alone", task) not in arms
        assert ("×16, transferred heads, wrong span", task) in arms
        assert ("×16, own heads", task) not in arms
    assert ("×16, transferred heads, automatic span", "needle 128") in arms
    assert list(report["left_out"]) == ["needle 1024"]
    assert 0 <= arms["plain", "written"]["repeating"] <= 1 and arms["plain", "written"]["items"] == 5
    written = [each for each in map(json.loads, path.read_text("utf-8").splitlines()) if each.get("task") == "written"]
    items = {item.fingerprint: item for item in study_tasks(plan)["written"].items(5, "held-out", 0)}
    for each in written:
        assert each["correct"] == follows(items[each["prompt"]].group, each["output"])
        assert each["tokens"] <= plan.tokens
