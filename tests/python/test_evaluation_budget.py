"""The budget of computed tokens: in `generate`, batched and padded, and against scripted models that want to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from attnrb.hosts.lm_eval.budget import ComputedTokenBudget
from saved_tiny_model import tiny_model, tiny_tokenizer

END = 1
VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def run(budget: ComputedTokenBudget, wishes: Sequence[int], steps: int, prompt: Sequence[int] = (5, 6, 7)) -> list[int]:
    """The tokens that a model writes whose likeliest token is `wishes[k]` at step k (then the last wish again)."""
    ids = list(prompt)
    for step in range(steps):
        scores = torch.zeros(1, VOCABULARY)
        scores[0, wishes[min(step, len(wishes) - 1)]] = 1.0
        token = int(budget(torch.tensor([ids]), scores).argmax())
        ids.append(token)
        if token == END:
            break
    return ids[len(prompt) :]


def budget_of(tokenizer: Any, minimum: int, maximum: int, answer_tokens: int | None = 2) -> ComputedTokenBudget:
    return ComputedTokenBudget(
        tokenizer, minimum, maximum, cue=" Answer:", continuation=" more.", answer_tokens=answer_tokens
    )


def test_at_the_maximum_the_cue_is_written(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 0, 5)
    written = run(budget, [40], 40)
    assert written == [40] * 5 + list(budget.cue) + [40] * 2 + [END]
    reading = budget.read(written)
    assert reading.computed == (40,) * 5
    assert reading.answer == (40, 40)
    assert reading.answered
    assert reading.extensions == 0


def test_a_budget_of_0_answers_at_once(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 0, 0)
    written = run(budget, [40], 40)
    assert written[: len(budget.cue)] == list(budget.cue)
    assert budget.read(written).computed_tokens == 0


def test_who_stops_early_is_made_to_go_on(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 20, 40)
    written = run(budget, [40, 41, END], 100)
    reading = budget.read(written)
    size = len(budget.continuation)
    assert written[:2] == [40, 41]
    assert tuple(written[2 : 2 + size]) == budget.continuation
    assert 20 <= reading.computed_tokens <= 40
    assert reading.extensions == -(-18 // size)  # as often as it takes to come from 2 tokens to 20
    assert reading.answered


def test_who_stops_after_the_minimum_answers(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 2, 40)
    written = run(budget, [40, 41, 42, END], 100)
    assert written[:3] == [40, 41, 42]
    assert tuple(written[3 : 3 + len(budget.cue)]) == budget.cue
    assert budget.read(written).computed == (40, 41, 42)


def test_an_own_cue_counts_from_the_minimum_on(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 2, 60)
    written = run(budget, [40, 41, *budget.cue, 50], 100)
    assert written == [40, 41, *budget.cue, 50, 50, END]
    assert budget.read(written).computed == (40, 41)


def test_an_own_cue_before_the_minimum_does_not_start_the_answer(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 30, 60)
    written = run(budget, [40, 41, *budget.cue, 50], 200)
    reading = budget.read(written)
    assert reading.computed_tokens >= 30
    assert reading.extensions == 1
    assert tuple(written[2 : 1 + len(budget.cue)]) == budget.cue[:-1]


def test_the_maximum_cuts_a_continuation_short(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 4, 4)
    written = run(budget, [40, END], 100)
    reading = budget.read(written)
    assert reading.computed_tokens == 4
    assert reading.computed[1:] == budget.continuation[:3]


def test_without_a_number_of_answer_tokens_the_model_ends(tokenizer: Any) -> None:
    budget = budget_of(tokenizer, 0, 1, answer_tokens=None)
    written = run(budget, [40] * 20 + [END], 100)
    assert written[-1] == END
    assert len(budget.read(written).answer) == 20 - 1 - len(budget.cue)
    with pytest.raises(ValueError, match="answer_tokens"):
        _ = budget.new_tokens


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[END] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [[5, 9, 13], [70, 71, 72, 73, 74, 75], [100], [5, 9, 13, 17]]


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 0), (0, 12), (7, 7), (5, 20), (16, 16)])
def test_generate_keeps_to_the_budget(tokenizer: Any, model: Any, minimum: int, maximum: int) -> None:
    budget = budget_of(tokenizer, minimum, maximum, answer_tokens=3)
    inputs = left_padded(PROMPTS)
    output = model.generate(
        **inputs, logits_processor=[budget], max_new_tokens=budget.new_tokens, do_sample=False, pad_token_id=END
    )
    for reading in budget.read_all(output[:, inputs["input_ids"].shape[1] :]):
        assert reading.answered
        assert minimum <= reading.computed_tokens <= maximum
        assert len(reading.answer) <= 3


def test_a_batch_is_the_rows_one_by_one(tokenizer: Any, model: Any) -> None:
    def readings(prompts: Sequence[Sequence[int]]) -> list[Any]:
        budget = budget_of(tokenizer, 6, 18, answer_tokens=3)
        inputs = left_padded(prompts)
        output = model.generate(
            **inputs, logits_processor=[budget], max_new_tokens=budget.new_tokens, do_sample=False, pad_token_id=END
        )
        return budget.read_all(output[:, inputs["input_ids"].shape[1] :])

    assert readings(PROMPTS) == [readings([prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_sampling_and_beams(tokenizer: Any, model: Any, settings: dict[str, Any]) -> None:
    budget = budget_of(tokenizer, 4, 9, answer_tokens=2)
    inputs = left_padded(PROMPTS)
    output = model.generate(
        **inputs, logits_processor=[budget], max_new_tokens=budget.new_tokens, pad_token_id=END, **settings
    )
    for reading in budget.read_all(output[:, inputs["input_ids"].shape[1] :]):
        assert reading.answered
        assert 4 <= reading.computed_tokens <= 9


def test_within_the_budget_the_model_is_left_alone(tokenizer: Any, model: Any) -> None:
    inputs = left_padded(PROMPTS)
    plain = model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=END)
    budget = budget_of(tokenizer, 0, 10)
    budgeted = model.generate(
        **inputs, logits_processor=[budget], max_new_tokens=budget.new_tokens, do_sample=False, pad_token_id=END
    )
    start = inputs["input_ids"].shape[1]
    for row, (free, held) in enumerate(zip(plain[:, start:].tolist(), budgeted[:, start:].tolist(), strict=True)):
        computed = budget.read(held).computed
        assert computed == tuple(free[: len(computed)]), row


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"minimum": -1}, ValueError, "minimum: expected 0 or above, got -1"),
        ({"minimum": 9, "maximum": 8}, ValueError, "minimum: expected at most the maximum of 8, got 9"),
        ({"maximum": 1.5}, TypeError, "maximum: expected an integer, got 1.5"),
        ({"answer_tokens": 0}, ValueError, "answer_tokens: expected 1 or above"),
        ({"cue": ""}, ValueError, "cue: expected some text"),
        ({"continuation": ""}, ValueError, "continuation: expected some text"),
        ({"cue": "x", "continuation": "x"}, ValueError, "continuation: expected none with the cue"),
        ({"end_token_ids": []}, ValueError, "end_token_ids"),
    ],
)
def test_refuses(tokenizer: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ComputedTokenBudget(tokenizer, **settings)
