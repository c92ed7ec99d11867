"""Small tasks of emphasis, and where profiles of heads transfer between them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import attnrb
from attnrb.studies.conflict import score_items
from attnrb.studies.tasks import TASKS, TaskItem, task_examples, task_items
from attnrb.studies.transfer import main, random_heads, transfer, transfer_table
from saved_tiny_model import LAYERS, tiny_model, tiny_tokenizer
from test_conflict import margin

GENERATED = [task for task in TASKS if task != "conflict"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("task", TASKS)
def test_items_are_the_same_each_time_and_grow_at_the_end(task: str) -> None:
    assert task_items(task, 30) == task_items(task, 30)
    assert task_items(task, 30)[:12] == task_items(task, 12)
    assert task_items(task, 30) != task_items(task, 30, seed=1)
    assert task_items(task, 30) != task_items(task, 30, split="development")


@pytest.mark.parametrize("task", TASKS)
def test_candidates_differ_and_the_right_one_is_first(task: str) -> None:
    for item in (*task_items(task, 60), *task_items(task, 60, split="development")):
        assert len(set(item.candidates)) == len(item.candidates) >= 2
        assert item.answer == f" {item.candidates[0]}"


def generated(task: str, count: int, split: str = "held-out") -> list[TaskItem]:
    items = [item for item in task_items(task, count, split=split) if isinstance(item, TaskItem)]
    assert len(items) == count
    return items


@pytest.mark.parametrize("split", ["development", "held-out"])
def test_what_is_marked_decides(split: str) -> None:
    for item in generated("retrieval", 60, split):
        place, person = item.marked.removesuffix(".").split(": ")
        assert item.candidates[0] == person
        assert item.behind.endswith(f"The person with the key of the {place.lower()} is called")
        whole = f"{item.before} {item.behind}"
        assert person not in whole and all(other in whole for other in item.candidates[1:])
    for item in generated("story", 60, split):
        assert item.marked.endswith(f" to the {item.candidates[0]}.")
        person, thing = item.marked.split()[0], item.marked.split()[3]
        assert item.behind.endswith(f"{person} looked for the {thing}, and found it in the")
        assert f"into the {item.candidates[1]}." in item.behind and item.candidates[0] not in item.behind
    ways = {item.marked: item.candidates for item in generated("instruction", 60, split)}
    assert len(ways) == 3
    for item in generated("instruction", 60, split):
        assert f" is {item.candidates[1]}. " in item.behind
        if "CAPITAL" in item.marked:
            assert item.candidates[0] == item.candidates[1].upper()
        elif "quotation" in item.marked:
            assert item.candidates[0] == f'"{item.candidates[1]}"'
        else:
            assert item.candidates[0] in ("rouge", "bleu", "vert", "jaune", "blanc", "noir")


@pytest.mark.parametrize("task", GENERATED)
def test_splits_share_no_questions(task: str) -> None:
    mine, yours = ({item.behind for item in generated(task, 200, split)} for split in ("development", "held-out"))
    assert mine and yours and not mine & yours


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("markup", ["span", "asterisks", "none"])
def test_prompts(tokenizer: Any, task: str, markup: str) -> None:
    for item in generated(task, 6):
        stars = "**" if markup == "asterisks" else ""
        marked = item.prompt(tokenizer, markup)
        text = f"{item.before} {stars}{item.marked}{stars} {item.behind}".strip()
        assert marked.texts[0] == text
        spans = marked.spans[0]
        assert len(spans) == (markup == "span")
        for span in spans:
            ids = marked.inputs["input_ids"][0, span.start : span.end]
            assert tokenizer.decode(ids).strip() == item.marked


def test_scores_are_those_of_the_model_with_a_mask(model: Any, tokenizer: Any) -> None:
    for task in GENERATED:
        items = task_items(task, 3)
        scores = score_items(model, tokenizer, items, attnrb.Emphasis(strength=16.0))
        exact = tiny_model().double()
        bias = 2.772588722239781  # ln 16
        expected = [margin(exact, tokenizer, item, "span", bias) for item in items]
        assert scores.margins == pytest.approx(expected, abs=10 * 20 * 100 * 2**-24)


def test_bad_arguments(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="task: expected one of conflict, retrieval, instruction, story, got 'sums'"):
        task_items("sums", 1)
    for task in TASKS:
        with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
            task_items(task, 0)
        with pytest.raises(ValueError, match="split: expected one of development, held-out, got 'test'"):
            task_items(task, 1, split="test")
    with pytest.raises(ValueError, match="markup: expected one of span, asterisks, none, got 'older'"):
        task_items("story", 1)[0].prompt(tokenizer, "older")


def test_transfer_is_scoring_with_each_profile(model: Any, tokenizer: Any) -> None:
    steps: list[str] = []
    found = transfer(model, tokenizer, items=3, strength=4.0, keep=4, progress=steps.append)
    assert steps and list(found) == ["none", "all", "random", *TASKS]
    assert all(list(right) == list(TASKS) for right in found.values())
    profile = attnrb.profile_heads(model, tokenizer, None, task_examples(tokenizer, "story"), 4)
    items = task_items("retrieval", 3)
    kept = attnrb.Emphasis(strength=4.0, heads=profile)
    assert found["story"]["retrieval"] == score_items(model, tokenizer, items, kept).right
    assert found["none"]["story"] == score_items(model, tokenizer, task_items("story", 3), None, "none").right
    table = transfer_table(found, 3).splitlines()
    assert len(table) == 2 + len(found)
    assert table[2].startswith("| no emphasis |") and table[-1].startswith("| profile of story |")
    assert table[2].count("%") == len(TASKS)


def test_random_heads_are_as_many_and_others() -> None:
    profile = attnrb.HeadProfile([[float(head) for head in range(4)]] * LAYERS, 5)
    drawn = [random_heads(profile, seed) for seed in (0, 0, 1)]
    assert all(sum(map(len, each.chosen.values())) == 5 for each in drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_command_prints_a_table(model: Any, tokenizer: Any, tmp_path: Any, capsys: Any) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "found.json"
    main(["--model", str(tmp_path / "model"), "--items", "1", "--keep", "3", "--json", str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith("| heads | conflict | retrieval | instruction | story |")
    assert '"keep": 3' in file.read_text()
