"""``attnrb analyze``: what it prints and writes, where texts and configurations come from, how errors read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)

from attnrb import RebalanceConfig  # noqa: E402
from attnrb.analysis import AttentionReport  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from attnrb.policies.parse import parse_policy  # noqa: E402
from saved_tiny_model import LAYERS, TEXT, save_tiny_model, tiny_model  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def analyze(*arguments: str | Path, columns: int = 100, **settings: Any) -> Result:
    environment = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)], env=environment, **settings)


def error_of(result: Result) -> str:
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]  # progress may come first
    assert len(lines) == 1
    assert re.fullmatch(r"attnrb: .*[^.]\.", lines[0])
    return lines[0]


@pytest.mark.parametrize("columns", [80, 120])
def test_prints_every_layer_and_the_sinks(folder: Path, columns: int) -> None:
    result = analyze("-m", folder, "-t", TEXT, "--compare", "alpha=0.5", columns=columns)
    assert result.exit_code == 0, result.output
    for layer in range(LAYERS):
        assert re.search(rf"^ +{layer} +plain( +\d+\.\d+( %)?)+", result.stdout, re.MULTILINE)
    assert result.stdout.count("rebalanced") >= LAYERS + 2
    assert "Sinks, plain" in result.stdout
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_writes_every_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    html, document, plots = tmp_path / "a.html", tmp_path / "a.json", tmp_path / "plots"
    table = tmp_path / "a.csv"
    result = analyze("-m", folder, "-t", TEXT, "--html", html, "--json", document, "--png", plots, "--csv", table)
    assert result.exit_code == 0, result.output
    assert html.read_text("utf-8").startswith("<!DOCTYPE html>")
    report = AttentionReport.from_json(document)
    assert report.runs[0].model == folder.name and report.after.config is None
    assert len(list(plots.glob("*.png"))) == 7
    assert table.read_text("utf-8") == report.to_csv()
    assert str(html) in result.stderr.replace("\n", "")


def test_prints_json(folder: Path) -> None:
    result = analyze("-m", folder, "-t", TEXT, "--compare", "default", "--json", "-")
    assert result.exit_code == 0, result.output
    report = AttentionReport.from_json(result.stdout)
    assert report.after.config == RebalanceConfig()


def test_reads_files_lines_and_standard_input(folder: Path, tmp_path: Path) -> None:
    plain, lines = tmp_path / "plain.txt", tmp_path / "many.jsonl"
    plain.write_text(TEXT, "utf-8")
    lines.write_text('{"text": "one two"}\n\n{"text": "three\\u2028four"}\n', "utf-8")
    arguments = ["-m", folder, "-t", plain, "-t", lines, "-t", "-", "-t", "words as they are", "--json", "-"]
    result = analyze(*arguments, input="from a pipe")
    assert result.exit_code == 0, result.output
    report = AttentionReport.from_json(result.stdout)
    names = ["plain.txt", "many.jsonl:1", "many.jsonl:3", "standard input", "text 5"]
    assert [text.name for text in report.texts] == names
    texts = ["".join(token.text for token in text.tokens) for text in report.texts]
    assert texts == [TEXT, "one two", "three\u2028four", "from a pipe", "words as they are"]


def test_baseline(folder: Path, tmp_path: Path) -> None:
    result = analyze("-m", folder, "-t", TEXT, "--baseline", folder, "--json", "-")
    assert result.exit_code == 0, result.output
    report = AttentionReport.from_json(result.stdout)
    assert [run.label for run in report.runs] == ["baseline", "model"]


def test_function_words_from_a_file(folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("fox\nDOG", "utf-8")
    result = analyze("-m", folder, "-t", "the fox", "--function-words", words, "--json", "-")
    tokens = AttentionReport.from_json(result.stdout).texts[0].tokens
    text = "".join(token.text for token in tokens if token.token_class == "function_word")
    assert text.strip() == "fox"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "text: expected a file, a text of several words or -"),
        (["-t", "missing.txt"], "there is no file 'missing.txt'"),
        (["--text-string", "x"], "fewer than two tokens"),
        (["-t", TEXT, "--compare", "alpha"], "config: expected"),
        (["-t", TEXT, "--compare", "beta=1"], "unknown 'beta'"),
        (["-t", TEXT, "--compare", "missing.json"], "could not be read"),
        (["-t", TEXT, "--compare", "{"], "is not JSON"),
        (["-t", TEXT, "--compare", "default", "--threshold", "0.5"], "threshold: 0.5 differs"),
        (["-t", TEXT, "--threshold", "5"], "threshold: expected a number between 0 and 1"),
        (["-t", TEXT, "--json", "missing/out.json"], "json: 'missing/out.json' cannot be written"),
        (["-t", TEXT, "--chat"], "chat template"),
        (["-t", TEXT, "-m", "missing/folder/model"], "model: "),
        (["-t", TEXT, "--function-words", "missing"], "could not be read"),
    ],
)
def test_errors_are_one_sentence(folder: Path, arguments: list[str], message: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = [] if "-m" in arguments else ["-m", str(folder)]
    assert message in error_of(analyze(*model, *arguments))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert "no tokenizer" in error_of(analyze("-m", tmp_path, "-t", TEXT))


def test_malformed_lines_are_named(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "many.jsonl"
    for content in ('{"text": "a b"}\n{"no": 1}\n', '{"text": "a b"}\n{"text": 3}', '{"text": "a b"}\nnot json'):
        lines.write_text(content, "utf-8")
        assert "line 2: expected an object with a string named text" in error_of(analyze("-m", folder, "-t", lines))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in error_of(analyze("-m", folder, "-t", binary))


def test_a_full_disk_keeps_what_was_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    document, html = tmp_path / "a.json", tmp_path / "a.html"
    with mock.patch.object(AttentionReport, "to_html", side_effect=OSError(28, "No space left on device")):
        result = analyze("-m", folder, "-t", TEXT, "--json", document, "--html", html)
    assert "could not be written: No space left on device" in error_of(result)
    assert AttentionReport.from_json(document).text_count == 1


@pytest.mark.parametrize(("missing", "option"), [("plotly", "--html"), ("matplotlib", "--png")])
def test_missing_packages_are_named_before_the_work(folder: Path, missing: str, option: str) -> None:
    with mock.patch.dict("sys.modules", {f"{missing}.offline": None, f"{missing}.figure": None}):
        message = error_of(analyze("-m", folder, "-t", TEXT, option, "out"))
    assert missing in message and "pip install 'attnrb[analysis]'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default", RebalanceConfig()),
        ("alpha=0.3,normalize=true", RebalanceConfig(alpha=0.3, normalize=True)),
        ("alpha=1, layers=1-3+7, source_layer=0", RebalanceConfig(alpha=1, layers=[1, 2, 3, 7])),
        ("heads=0+2,depth=31", RebalanceConfig(heads=[0, 2], depth=31)),
        ("gains=0+0.5+-1", RebalanceConfig(gains=[0, 0.5, -1])),
        ('{"alpha": 0.3, "heads": {"2": [1]}}', RebalanceConfig(alpha=0.3, heads={2: [1]})),
    ],
)
def test_configurations(text: str, expected: RebalanceConfig) -> None:
    assert parse_policy(text) == expected


@pytest.mark.parametrize("place", ["gains", "gains/learned_gains.safetensors"])
def test_learnt_gains(place: str, folder: Path, tmp_path: Path) -> None:
    import torch
    from attnrb import LearnedGains
    from saved_tiny_model import tiny_model

    learned = LearnedGains(tiny_model(), RebalanceConfig(threshold=0.02))
    with torch.no_grad():
        learned.gains += 0.5
    learned.save(tmp_path / "gains")
    result = analyze("-m", folder, "-t", TEXT, "--compare", tmp_path / place, "--json", "-")
    assert result.exit_code == 0, result.output
    report = AttentionReport.from_json(result.stdout)
    assert report.threshold == 0.02
    assert report.after.gains is not None
    assert report.after.gains.tolist() == learned.matrix().tolist()
    missing = analyze("-m", folder, "-t", TEXT, "--compare", tmp_path / "none.safetensors")
    assert "compare: " in error_of(missing) and "no such file" in error_of(missing)


def test_configuration_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = RebalanceConfig(alpha=0.7, heads={3: [0]})
    path.write_text(json.dumps(config.to_dict()), "utf-8")
    assert parse_policy(str(path)) == config
