"""Items from files: what stands in them is what is asked, and what cannot be asked is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from attnrb.evaluation import mmlu
from attnrb.evaluation.data import DataError, read_items, task_names


def mmlu_file(data: Path, rows: list[list[str]], subject: str = "anatomy") -> Path:
    path = data / "mmlu" / f"{subject}_test.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


TRAPS = [
    ["What is empty?", "None", "NA", "null", "nan", "A"],
    ['He said "yes", then "no"', "a, b", "c", "d\ne", 'f "g"', "B"],
    ["First line\nsecond line\r\nthird", "1", "2.0", "1e5", "007", "C"],
    ["Odd \u2028 separators \x0b and \x1c marks", " padded ", "true", "False", "", "D"],
    ["Ünïcödé 数学 😀", "α", "β", "γ", "δ", "A"],
]


def test_csv_traps(tmp_path: Path) -> None:
    mmlu_file(tmp_path, TRAPS)
    items = read_items(tmp_path, "mmlu_anatomy").items
    assert [[item.question, *item.choices, item.answer] for item in items] == [
        [row[0].strip(), *row[1:]] for row in TRAPS
    ]
    assert [item.index for item in items] == list(range(len(TRAPS)))
    assert items[0].prompt == "What is empty?\nA. None\nB. NA\nC. null\nD. nan\nAnswer:"


def test_traps_survive_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from attnrb.evaluation.tasks import direct_task

    mmlu_file(tmp_path, TRAPS)
    task = direct_task(read_items(tmp_path, "mmlu_anatomy"))
    for doc, row in zip(task.eval_docs, TRAPS, strict=True):
        assert doc["choices"] == row[1:5]
        assert all(choice in task.doc_to_text(doc) for choice in row[1:5])
        assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == row[5]


def test_groups() -> None:
    assert {group: len(members) for group, members in mmlu.GROUPS.items()} == {
        "stem": 19,
        "humanities": 13,
        "social_sciences": 12,
        "other": 13,
    }
    assert mmlu.groups_of("anatomy") == ("stem", "mmlu")
    assert mmlu.groups_of("virology") == ("other", "non_stem", "mmlu")


def test_groups_are_those_of_the_harness() -> None:
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    folder = Path(lm_eval_tasks.__file__).parent / "mmlu" / "default"
    found = {}
    for path in folder.glob("mmlu_*.yaml"):
        lines = dict(line.split(": ", 1) for line in path.read_text("utf-8").splitlines() if line.startswith('"t'))
        found[lines['"task"'].strip('"').removeprefix("mmlu_")] = lines['"tag"'].strip('"')
    assert {subject: f"mmlu_{group}_tasks" for subject, group in mmlu.SUBJECTS.items()} == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c,d,A\n", "line 1: expected 6 fields .*, got 5"),
        ("q,a,b,c,d,A\nq,a,b,c,d,e,A\n", "line 2: expected 6 fields .*, got 7"),
        ("q,a,b,c,d,E\n", "line 1: expected the letter A, B, C or D, got 'E'"),
        ("q,a,b,c,d,\n", "line 1: expected the letter A, B, C or D, got ''"),
        ('"two\nlines",a,b,c,d,A\nq,a,b\n', "line 3: expected 6 fields"),
        ('q,a,b,c,d,A\n"open,a,b,c,d,A\n', "line 2: unexpected end of data"),
        (",a,b,c,d,A\n", "line 1: expected a question, got none"),
        ("", "holds no items"),
    ],
)
def test_malformed_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "anatomy_test.csv").write_text(text, "utf-8")
    with pytest.raises(DataError, match=f"anatomy_test.csv.*{message}"):
        read_items(tmp_path, "mmlu_anatomy")


def lines(data: Path, name: str, *rows: object) -> Path:
    path = data / f"{name}.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


PIQA = {"query": "Question: boil an egg\n", "choices": ["in water", "in sand"], "gold": 0}
SIQA = {"query": "Context: x\nQuestion: y?\nChoices:\nA. one\nB. two\nAnswer:", "choices": ["A", "B"], "gold": 1}


def test_json_lines_of_each_kind(tmp_path: Path) -> None:
    lines(tmp_path, "piqa", PIQA)
    lines(tmp_path, "siqa", SIQA)
    lines(tmp_path, "gsm8k", {"context": "How many?", "answer": "1,234"})
    piqa, siqa, gsm8k = (read_items(tmp_path, name).items[0] for name in ("piqa", "siqa", "gsm8k"))
    assert (piqa.question, piqa.prompt, piqa.lettered) == ("boil an egg", "Question: boil an egg\nAnswer:", False)
    assert (siqa.question, siqa.choices, siqa.answer) == ("Context: x\nQuestion: y?", ("one", "two"), "B")
    assert siqa.prompt == SIQA["query"]
    assert (gsm8k.answer, gsm8k.gold, gsm8k.choices) == ("1234", None, ())
    assert "two-choice" in (read_items(tmp_path, "siqa").note or "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PIQA, "{"], "line 2: no JSON"),
        (["[]"], "line 1: expected an object, got list"),
        ([{**PIQA, "gold": 2}], "line 1: gold: expected an index from 0 to 1, got 2"),
        ([{**PIQA, "gold": True}], "line 1: gold"),
        ([{**PIQA, "choices": "ab"}], "line 1: choices: expected a list of texts"),
        ([{**PIQA, "choices": ["a"]}], "line 1: choices: expected 2 to 26, got 1"),
        ([{**PIQA, "query": ""}], "line 1: query: expected some text"),
        ([{**SIQA, "query": "no options"}], "line 1: query: expected a line 'A. ...'"),
        ([{"context": "x", "answer": "many"}], "line 1: answer: expected a number, got 'many'"),
        ([PIQA, {"context": "x", "answer": "1"}], "line 2: expected the fields of the lines before"),
        ([], "holds no items"),
    ],
)
def test_malformed_json(tmp_path: Path, rows: list[object], message: str) -> None:
    lines(tmp_path, "piqa", *rows)
    with pytest.raises(DataError, match=f"piqa.jsonl.*{message}"):
        read_items(tmp_path, "piqa")


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*virology_test\.csv"):
        read_items(tmp_path, "mmlu_virology")
    with pytest.raises(DataError, match="there is no folder"):
        task_names(tmp_path / "nowhere")
    (tmp_path / "piqa.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_items(tmp_path, "piqa")


@pytest.mark.shared
def test_shared_data(shared: Path) -> None:
    data = shared / "data"
    counts = {name: len(read_items(data, name).items) for name in task_names(data)}
    assert sum(count for name, count in counts.items() if name.startswith("mmlu_")) == 14042
    assert (counts["piqa"], counts["siqa"], counts["gsm8k"]) == (1838, 1954, 1319)
    siqa = [json.loads(line) for line in (data / "siqa.jsonl").read_text("utf-8").splitlines()]
    assert [item.prompt for item in read_items(data, "siqa").items] == [row["query"] for row in siqa]


def test_public_names_are_what_they_are_whatever_was_used_before() -> None:
    """A name that a submodule shares would become that module once anything of it is imported."""
    pytest.importorskip("optuna")
    pytest.importorskip("lm_eval")
    import attnrb.evaluation

    for _ in range(2):
        found = [name for name in attnrb.evaluation.__all__ if not callable(getattr(attnrb.evaluation, name))]
        assert found == []
