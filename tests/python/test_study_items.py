"""The items of the study of emphasis, and the likelihoods of their candidates."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import attnrb
import torch
from attnrb.studies.answers import answer_row, log_likelihoods
from attnrb.studies.candidates import candidate_batches, candidate_scores
from attnrb.studies.material import FORMS, MATERIAL, study_items
from saved_tiny_model import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("task", MATERIAL)
def test_each_task_has_500_different_items_in_each_split_and_none_in_both(task: str) -> None:
    held_out, development = study_items(task, 500), study_items(task, 500, split="development")
    prints = {item.fingerprint for item in held_out}
    assert len(prints) == 500
    assert not prints & {item.fingerprint for item in development}
    assert study_items(task, 40) == held_out[:40]
    assert study_items(task, 40, seed=1) != held_out[:40]


@pytest.mark.parametrize("task", MATERIAL)
def test_an_item_holds_what_it_says(task: str) -> None:
    for item in study_items(task, 60):
        assert len(set(item.candidates)) == len(item.candidates) >= 2
        right = item.sentences[item.marked]
        if task == "irrelevant":
            assert item.candidates[0] not in right
            continue
        assert item.wrong != item.marked
        assert any(other in item.sentences[item.wrong] for other in item.candidates[1:])
        assert item.candidates[0] not in item.sentences[item.wrong]
        assert (item.candidates[0] in right) == (task != "instruction")
        for span in ("marked", "wrong", "automatic"):
            text, [(start, end)] = item.text(span=span)
            assert text[start:end] in item.sentences
        assert {form: item.text(form)[0].count(right) for form in FORMS} == dict.fromkeys(FORMS, 1) | {"repeated": 2}


def test_the_automatic_span_shares_the_question_s_words_and_knows_no_answer() -> None:
    item = study_items("conflict", 1)[0]
    assert item.sentences[item.automatic] == item.sentences[item.wrong]  # the older fact has the question's words
    for item in study_items("retrieval", 60):
        assert item.automatic == item.marked


def test_bad_forms_and_counts_are_refused() -> None:
    item = study_items("story", 1)[0]
    with pytest.raises(ValueError, match="form: expected one of"):
        item.text("bold")
    with pytest.raises(ValueError, match="span: expected one of"):
        item.text(span="right")
    with pytest.raises(ValueError, match="span: expected none where the text itself points"):
        item.text("alone", "marked")
    with pytest.raises(ValueError, match="task: expected one of"):
        study_items("chess", 1)
    with pytest.raises(ValueError, match="count: expected at most"):
        study_items("irrelevant", 100_000)


@pytest.mark.parametrize("policy", [None, attnrb.Emphasis(strength=16), attnrb.Emphasis(strength=4, rows="last")])
def test_likelihoods_from_the_prompt_s_cache_are_those_of_whole_rows(policy: Any) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    items = [study_items(task, 1)[0] for task in ("conflict", "instruction", "several")]
    prompts = [
        [answer_row(model, tokenizer, item.prompt(tokenizer, span="marked"), " " + each, "item") for each in candidates]
        for item in items
        for candidates in [(*item.candidates, "t")]
    ]
    prompts = [[*rows[:3], rows[-1]] for rows in prompts]
    assert len({len(rows[0].prompt) for rows in prompts}) > 1
    assert {len(row.answer) > 1 for rows in prompts for row in rows} == {True, False}
    prompts = [[*rows, rows[0]._replace(answer=rows[0].answer[:1])] for rows in prompts]
    flat = [row for rows in prompts for row in rows]
    if policy is None:
        with torch.inference_mode():
            found = candidate_scores(model, prompts)
            whole = log_likelihoods(model, flat)
    else:
        with torch.inference_mode(), attnrb.patch(model, policy) as patched:
            found = candidate_scores(model, prompts, patched)
            whole = log_likelihoods(model, flat, patched)
    expected = [float(each.sum()) for each in whole]
    # A few float32 operations in another order, on log-likelihoods of up to tens of nats.
    assert [each for mine in found for each in mine] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("answer_tokens", [1000, 30, 1])
def test_batches_hold_each_prompt_once_and_no_more_than_they_may(answer_tokens: int) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [
        [answer_row(model, tokenizer, item.prompt(tokenizer), " " + each, "item") for each in item.candidates]
        for task in ("retrieval", "conflict", "instruction")
        for item in study_items(task, 12)
    ]
    batches = list(candidate_batches(prompts, 400, answer_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(36))
    for batch in batches:
        answers = [len(row.answer) for index in batch for row in prompts[index] if len(row.answer) > 1]
        assert len(batch) == 1 or len(batch) * max(len(prompts[index][0].prompt) for index in batch) <= 400
        assert len(batch) == 1 or len(answers) * max(answers, default=0) <= answer_tokens
    assert len(batches) < 36 or answer_tokens == 1


def test_short_prompts_with_short_answers_come_first() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [
        [answer_row(model, tokenizer, item.prompt(tokenizer), answer, "item")]
        for item in (*study_items("retrieval", 8), *study_items("conflict", 8))
        for answer in (" t", " " + 40 * "t ")
    ]
    order = [index for batch in candidate_batches(prompts, 400, 400) for index in batch]
    assert all(index % 2 == 0 for index in order[:16])
    for half in (order[:16], order[16:]):
        lengths = [len(prompts[index][0].prompt) for index in half]
        assert lengths == sorted(lengths)
