"""``attnrb data``: files of questions from data sets, here from folders that stand in for those of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "datasets"):
    pytest.importorskip(package)

from attnrb.cli.app import app  # noqa: E402
from attnrb.evaluation import hub_data, mmlu  # noqa: E402
from attnrb.evaluation.data import DataError, read_items  # noqa: E402
from conftest import shared_folder  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

PIQA = [
    {"goal": "To boil, what?", "sol1": "an “egg”", "sol2": "None", "label": 0},
    {"goal": "Open\na jar", "sol1": "twist", "sol2": "NA", "label": 1},
]
SIQA = [
    {
        "context": "Ann left.",
        "question": "Why?",
        "answerA": "to eat",
        "answerB": "to, rest",
        "answerC": "no",
        "label": "3",
    }
]
GSM8K = [{"question": "How many?", "answer": "First 1,000.\nThen 200 more.\n#### 1,200"}]
MMLU = {"question": 'Which, "of these",\nis it?', "choices": ["a", "b,c", "None", "d"], "answer": 2, "subject": "x"}


def save(folder: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Folders as the hub's data sets have them, for two subjects of MMLU."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    subjects = {name: group for name, group in mmlu.SUBJECTS.items() if name in ("anatomy", "sociology")}
    monkeypatch.setattr(mmlu, "SUBJECTS", subjects)
    for subject in subjects:
        save(tmp_path / "mmlu" / subject, "test", [MMLU])
    return {
        "piqa": str(save(tmp_path / "piqa", "validation", PIQA)),
        "siqa": str(save(tmp_path / "siqa", "validation", SIQA)),
        "gsm8k": str(save(tmp_path / "gsm8k", "test", GSM8K)),
        "mmlu": str(tmp_path / "mmlu"),
    }


def test_files_are_what_evaluation_reads(sources: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = {each.task: each for each in hub_data.make(sources, out, sources=sources)}
    assert {task: each.items for task, each in made.items()} == {"piqa": 2, "siqa": 1, "gsm8k": 1, "mmlu": 2}
    first, second = read_items(out, "piqa").items
    assert (first.prompt, first.choices, first.gold) == ("Question: To boil, what?\nAnswer:", ("an “egg”", "None"), 0)
    assert (second.choices, second.gold) == (("twist", "NA"), 1)
    siqa = read_items(out, "siqa")
    assert (siqa.items[0].choices, siqa.items[0].answer) == (("to eat", "to, rest", "no"), "C")
    assert siqa.note is None  # it has three choices, as the original
    assert read_items(out, "gsm8k").items[0].answer == "1200"
    anatomy = read_items(out, "mmlu_anatomy").items[0]
    assert anatomy.question == MMLU["question"]
    assert (anatomy.choices, anatomy.answer) == (tuple(MMLU["choices"]), "C")


def test_sums_tell_what_changed(sources: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub_data.make(["piqa", "gsm8k"], out, sources={name: sources[name] for name in ("piqa", "gsm8k")})
    hub_data.make(["mmlu"], out, sources={"mmlu": sources["mmlu"]})
    assert hub_data.check_sums(out) == []
    listed = [line.split("  ")[1] for line in (out / hub_data.SUMS_FILE).read_text("utf-8").splitlines()]
    assert listed == ["gsm8k.jsonl", "mmlu/anatomy_test.csv", "mmlu/sociology_test.csv", "piqa.jsonl"]
    (out / "piqa.jsonl").write_text("{}\n")
    (out / "gsm8k.jsonl").unlink()
    assert hub_data.check_sums(out) == ["gsm8k.jsonl", "piqa.jsonl"]
    with pytest.raises(DataError, match="there is no SHA256SUMS"):
        hub_data.check_sums(tmp_path)


def test_questions_have_a_sum_of_their_own(sources: dict[str, str], tmp_path: Path) -> None:
    """The order of fields does not count, a changed answer does."""
    one = hub_data.make(["piqa"], tmp_path / "out", sources={"piqa": sources["piqa"]})[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "piqa.jsonl").read_text("utf-8").splitlines()]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(dict(sorted(row.items()))) + "\n" for row in rows))
    assert hub_data.items_sum([read_items(tmp_path, "piqa")]) == one.sum
    rows[0]["gold"] = 1
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert hub_data.items_sum([read_items(tmp_path, "piqa")]) != one.sum


@pytest.mark.parametrize("task", ["mmlu", "piqa", "siqa", "gsm8k"])
def test_the_known_sums_are_those_of_the_studies(task: str, shared: Path) -> None:
    folder = shared_folder()
    assert folder is not None
    sets = [read_items(folder / "data", each) for each in hub_data._members(task)]
    assert hub_data.items_sum(sets) == hub_data.KNOWN[task]


def test_what_cannot_be_made(sources: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks: expected some of mmlu, piqa, siqa, gsm8k, got hellaswag"):
        hub_data.make(["hellaswag"], tmp_path / "out")
    with pytest.raises(DataError, match=r"source: 'siqa' is not among the tasks to make \(piqa\)"):
        hub_data.make(["piqa"], tmp_path / "out", sources={"piqa": "x", "siqa": "x"})
    with pytest.raises(DataError, match=r"a row of .* is not as expected \(KeyError: 'goal'\); it has"):
        hub_data.make(["piqa"], tmp_path / "out", sources={"piqa": sources["siqa"]})
    with pytest.raises(DataError, match="could not be read"):
        hub_data.make(["piqa"], tmp_path / "out", sources={"piqa": str(save(tmp_path / "x", "test", PIQA))})


class TestCommand:
    def run(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "100", "TERM": "dumb"})

    def test_makes_and_checks(self, sources: dict[str, str], tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = self.run("piqa", "--out", out, "--source", f"piqa={sources['piqa']}")
        assert result.exit_code == 0, result.output
        assert f"piqa: 2 questions of {sources['piqa']}, other ones than those of docs/results.md" in result.stdout
        assert "are as SHA256SUMS says" in self.run("--out", out, "--check").stdout
        (out / "piqa.jsonl").write_text("")
        result = self.run("--out", out, "--check")
        assert result.exit_code == 1
        assert "1 files are not as SHA256SUMS says: piqa.jsonl" in result.stderr

    def test_a_source_without_a_place(self) -> None:
        result = self.run("piqa", "--source", "piqa")
        assert result.exit_code == 1
        assert "source: expected NAME=PLACE" in result.stderr
