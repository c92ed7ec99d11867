"""The fine-tuning example: from records to the report, killed and resumed; bad input named; the cards re-made."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

for package in ("typer", "rich", "transformers", "accelerate", "peft", "plotly"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import make_cards  # noqa: E402
from attnrb import LearnedGains, RebalanceConfig  # noqa: E402
from saved_tiny_model import LAYERS, save_tiny_model, tiny_model, tiny_tokenizer  # noqa: E402
from structured.data import read_records  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

THREADS = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
SIZES = ("--held-out", "4", "--length", "32", "--evaluations", "2", "--analysis-texts", "1", "--alpha", "0.5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cards.jsonl"
    path.write_text(make_cards.document(24))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / "finetune_structured.py"), *map(str, arguments)]


def run(*arguments: str | Path, code: int = 0) -> Result:
    """In this process: importing takes longer than training these models."""
    from finetune_structured import app

    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text("utf-8"))


# ------------------------------------------------------------------------------------------------------- whole runs


# The program, killed by itself as soon as a checkpoint of the second arm is whole: no clock decides where.
KILLED = """
import os, runpy, signal, sys
from pathlib import Path

touch = Path.touch

def touch_and_die(path, *arguments, **options):
    touch(path, *arguments, **options)
    if path.name == "complete" and "rebalanced-seed0" in path.parts:
        os.kill(os.getpid(), signal.SIGKILL)

Path.touch = touch_and_die
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_study_goes_on_and_ends_as_if_nothing_had_been(model: Path, data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--model", model, "--data", data, "--steps", "24", "--learning-rate", "0.02", *SIZES)
    run("--output", whole, *options)
    python, *program = command("--output", killed, *options)
    died = subprocess.run([python, "-c", KILLED, *program], env=THREADS, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    finished = json.loads((killed / "plain-seed0" / "result.json").read_text())
    half = killed / "rebalanced-seed0" / "checkpoints" / "checkpoint-999"
    half.mkdir()  # as a kill in the middle of saving leaves it
    resumed = subprocess.run(
        command("--output", killed, *options), env=THREADS, capture_output=True, text=True, timeout=300, check=False
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert json.loads((killed / "plain-seed0" / "result.json").read_text()) == finished, "what is finished is kept"

    found, expected = report(killed), report(whole)
    for name in ("before", "differences", "layers"):
        assert found[name] == expected[name]
    assert [each["arm"] for each in found["runs"]] == ["plain", "rebalanced"]
    for came, other in zip(found["runs"], expected["runs"], strict=True):
        for name in ("training", "held_out_curve", "held_out", "attention"):
            assert came[name] == other[name], name
        losses = [loss for _, loss in came["training"]]
        assert len(losses) == 24
        assert sum(losses[-5:]) < sum(losses[:5]), "it learns"
    plain, rebalanced = found["runs"]
    assert plain["training"] != rebalanced["training"]
    for run_report in found["runs"]:
        for name in ("non_semantic", "first_key", "entropy", "outlier_overlap"):
            for when in ("before", "after"):
                assert len(run_report["attention"][when]["layers"][name]) == LAYERS
    assert not half.exists()
    adapter = killed / "rebalanced-seed0" / "adapter"
    assert RebalanceConfig.from_pretrained(adapter) == RebalanceConfig(alpha=0.5)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (killed / "plain-seed0" / "adapter" / "rebalance_config.json").exists()
    page = (killed / "report.html").read_text("utf-8")
    assert "re-balanced, seed 0" in page
    assert "http" not in page.split("<script>")[0].replace("http-equiv", ""), "it loads nothing"


def test_gains_learn_alone(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gains"
    options = ("--model", model, "--data", data, "--train", "gains", "--steps", "12", *SIZES)
    run("--output", folder, *options, "--learning-rate", "0.05")
    (found,) = report(folder)["runs"]
    learned = LearnedGains.load(folder / "gains-seed0")
    assert learned.matrix().tolist() == found["gains"]
    moved = torch.tensor(found["gains"]) - torch.tensor(report(folder)["fixed_gains"])
    assert moved.abs().max() > 0.01
    against = {each["against"] for each in report(folder)["differences"]}
    assert against == {"fixed gains, before training", "plain, before training"}
    before = report(folder)["before"]["held_out"]
    assert found["held_out"]["float32"] < before["rebalanced"]["float32"], "they learnt"
    assert not list(folder.rglob("model.safetensors")), "no copy of the frozen model"
    page = (folder / "report.html").read_text("utf-8")
    (heat,) = re.findall(r'<script type="application/json" id="moved-0">(.*?)</script>', page)
    spec = json.loads(heat)
    assert spec["data"][0]["colorscale"] == "change", "as all pages: what grew is orange"
    assert spec["layout"]["yaxis"] == {"title": {"text": "layer"}}, "layer 0 at the bottom, as on all pages"
    assert spec["data"][0]["z"] == [pytest.approx(row, abs=1e-6) for row in moved.tolist()]
    settings = page.partition("<h2>Settings</h2>")[2].partition("</section>")[0]
    assert "None" not in settings and "<td>learning_rate</td><td>0.05</td>" in settings
    # The same again does nothing but write the report again; other settings are refused.
    run("--output", folder, *options, "--learning-rate", "0.05")
    refused = run("--output", folder, *options, "--learning-rate", "0.06", code=1)
    assert "holds a study with another learning_rate, 0.05 and not 0.06" in refused.stderr


def test_full_fine_tuning_saves_the_model(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    options = ("--model", model, "--data", data, "--train", "full", "--arm", "rebalanced", "--precision", "float32")
    run("--output", folder, *options, "--steps", "4", *SIZES)
    (found,) = report(folder)["runs"]
    assert found["held_out"]["float32"] != report(folder)["before"]["held_out"]["rebalanced"]["float32"]
    saved = folder / "rebalanced-seed0" / "model"
    assert RebalanceConfig.from_pretrained(saved).alpha == 0.5
    assert (saved / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["lora", "full", "gains"])
def test_killed_after_the_last_step_it_trains_no_more(kind: str, data: Path, tmp_path: Path) -> None:
    from structured.data import Blocks
    from structured.settings import Run, Settings
    from structured.training import train

    settings = Settings(
        train=kind,
        model=None,
        data=data,
        config=RebalanceConfig(alpha=0.5),
        steps=3,
        epochs=None,
        limit=None,
        held_out=2,
        length=32,
        batch_size=2,
        accumulate=1,
        learning_rate=0.01,
        rank=2,
        precision="float32",
        evaluations=1,
        analysis_texts=0,
    )
    records = read_records(data, held_out=2, limit=None, seed=0)
    blocks = [Blocks(tiny_tokenizer(), texts, 32) for texts in (records.training, records.held_out)]
    run = Run("gains" if kind == "gains" else "rebalanced", 0)
    once, again = (train(tiny_model(), run, settings, *blocks, tmp_path, lambda *_: None) for _ in range(2))
    assert again.losses == once.losses
    assert [step for step, _ in once.losses.held_out] == [3]
    for name, weight in once.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    if kind == "gains":
        assert torch.equal(once.gains.gains, again.gains.gains)
    else:
        moved = (once.model.state_dict()[name] != weight for name, weight in tiny_model().state_dict().items())
        assert any(bool(each.any()) for each in moved)


def test_without_a_terminal_the_end_of_a_run_is_said_once_and_its_loss_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from structured import progress

    said = io.StringIO()
    monkeypatch.setattr(progress, "errors", lambda: Console(file=said, width=120))
    with progress.training_progress() as (_, show):
        for held_out in (None, None, 2.5, 2.5, 2.5):
            show("plain, seed 0", 8, 8, 1.5, held_out)
    assert said.getvalue().splitlines() == [
        "plain, seed 0: step 8 of 8, loss 1.500",
        "plain, seed 0: step 8 of 8, loss 1.500, held out 2.500",
    ]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"a": 1}', "{"], r"line 2: not JSON"),
        (["", '{"a": 1}', "[1]"], r"line 3: expected an object, got a list"),
        (['{"text": ""}'], r"line 1: text: expected a string that is not empty"),
        (['{"a": {"b": 1}}'], r"line 1: a: expected a string, number, truth value or list of them, got an object"),
        (["{}"], r"line 1: expected fields"),
        (["null"] * 9, r"line 5: expected an object, got null; and 4 more$"),
        (['{"a": 1}'], r"expected more records than the 1 to be held out, got 1"),
    ],
)
def test_bad_rows_are_named_by_line(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_records(path, held_out=1, limit=None, seed=0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not be read: No such file"):
        read_records(tmp_path / "none.jsonl", held_out=1, limit=None, seed=0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_records(tmp_path / "latin.jsonl", held_out=1, limit=None, seed=0)


def test_records_become_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"name": "bolt", "size": 3, "sold": True, "in": ["A", 1.5]}, {"text": "as it\nis", "other": 1}, {"x": "é"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8")
    records = read_records(path, held_out=1, limit=None, seed=3)
    texts = {"name: bolt\nsize: 3\nsold: true\nin: A, 1.5", "as it\nis", "x: é"}
    assert {*records.training, *records.held_out} == texts
    again = read_records(path, held_out=1, limit=1, seed=3)
    assert again.held_out == records.held_out, "a limit changes nothing of what is held out"
    assert again.training == records.training[:1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "some"), "train: expected lora, full or gains, got 'some'"),
        (("--steps", "3", "--epochs", "1"), "steps: give steps or epochs, not both"),
        (("--train", "gains", "--arm", "plain"), "arm: learnt gains have no arms"),
        (("--arm", "both"), "arm: expected plain or rebalanced, got 'both'"),
        (("--threshold", "2"), "threshold: expected a number between 0 and 1"),
        (("--held-out", "99999"), "data: expected more records than the 99,999 to be held out, got 2,500"),
    ],
)
def test_errors_are_one_sentence(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "--output", tmp_path / "study", code=1)
    assert result.stderr.startswith(f"attnrb: {message}")
    assert not (tmp_path / "study").exists(), "nothing was begun"


def test_a_folder_of_something_else_is_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused = run("--output", tmp_path, "--data", data, "--held-out", "4", code=1)
    assert "holds something else; name a new folder" in refused.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------- the cards


def test_the_cards_are_what_their_script_makes() -> None:
    content = make_cards.PATH.read_bytes()
    assert content == make_cards.document().encode()
    assert len(content) < 1_000_000
    cards = [json.loads(line) for line in content.decode().splitlines()]
    assert len(cards) == make_cards.CARDS
    assert {tuple(card) for card in cards} == {tuple(cards[0])}, "the same fields on each"


def test_a_card_by_hand() -> None:
    card = make_cards.card("hex bolt", 8, 5, "steel 8.8", "plain", 50)
    assert card["number"] == "HB-08-040-88P"
    assert (card["pitch"], card["across flats"], card["length"]) == ("1.25 mm", "13 mm", "40 mm")
    # A cylinder of 7.25 mm by 40 mm and a head of 1.1 · 8³ mm³, of 7.85 g/cm³.
    assert card["mass"] == "17.4 g"
    assert card["pack mass"] == "0.87 kg"
