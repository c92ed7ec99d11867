"""Numbers as people type them: what only resembles one is refused, on the command line and in files of options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "transformers", "yaml"):
    pytest.importorskip(package)

from attnrb.cli.app import app  # noqa: E402
from attnrb.cli.command import Command, _number_options  # noqa: E402
from attnrb.cli.eval import _check_model_args, parse_budgets  # noqa: E402
from attnrb.cli.running import batch_size  # noqa: E402
from attnrb.cli.search import _bounds, _range  # noqa: E402
from attnrb.policies.checks import read_ranges  # noqa: E402
from attnrb.text.reading import is_number, is_whole_number  # noqa: E402
from saved_tiny_model import TEXT, save_tiny_model  # noqa: E402
from typer.main import get_command  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

NO_NUMBERS = ["1_0", "1_000", "\N{ARABIC-INDIC DIGIT ONE}", "\N{FULLWIDTH DIGIT TWO}", "0x10", "1 0", "1e", "", "ten"]
PASSED_ON = ("serve", "lm-eval")  # other programs parse these
SAMPLES = {"generate": (TEXT,), "compare": (TEXT,), "analyze": ("--text-string", TEXT), "eval": ("-t", "piqa")}


def run(*arguments: str | Path, **settings: Any) -> Result:
    environment = {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=environment, **settings)


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in (group or get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif name not in PASSED_ON:
            yield (*path, name), command


def numbers() -> list[tuple[tuple[str, ...], str, type]]:
    """Every option of every command that is a number."""
    found = []
    for path, command in commands():
        assert isinstance(command, Command), path
        options = {each.name: each.opts[0] for each in command.params}
        found += [(path, options[name], kind) for name, kind in _number_options(command.callback).items()]
    return found


def test_no_option_that_is_a_number_is_left_out() -> None:
    """By what each stands for where it is not given, and by what it may be at least."""
    found = {(path, option) for path, option, _ in numbers()}
    assert len(found) > 30
    for path, command in commands():
        for each in command.params:
            number = isinstance(each.default, (int, float)) and not isinstance(each.default, bool)
            assert not number or (path, each.opts[0]) in found


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_every_option(text: str) -> None:
    for path, option, _ in numbers():
        result = run(*path, f"{option}={text}")
        assert result.exit_code == 2, (path, option, result.output)
        assert f"{text!r} is not a valid" in result.output
        assert option in result.output


@pytest.mark.parametrize("text", ["1.0", "1e3", "nan", "inf", "-inf"])
def test_a_whole_number_is_one(text: str) -> None:
    for path, option, kind in numbers():
        if kind is int:
            result = run(*path, f"{option}={text}")
            assert (result.exit_code, f"{text!r} is not a valid integer" in result.output) == (2, True), (path, option)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    ("command", "option"),
    [(path[0], option) for path, option, kind in numbers() if kind is float and path[0] in SAMPLES],
)
def test_options_that_are_not_finite(tmp_path: Path, command: str, option: str, text: str) -> None:
    """Named in a sentence, before anything is written."""
    folder = save_tiny_model(tmp_path / "m")
    out = tmp_path / "out.json"
    data = ("--data", tmp_path, "--run", tmp_path / "run.jsonl") if command == "eval" else ()
    if command == "eval":
        pytest.importorskip("lm_eval")
        (tmp_path / "piqa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    result = run(command, f"{option}={text}", "-m", folder, "--json", out, *data, *SAMPLES[command])
    assert result.exit_code in (1, 2), result.output
    named = {option[2:].replace("-", "_")} | ({"megabytes"} if option == "--rows-mb" else set())
    assert any(name in result.output.replace("-", "_") for name in named)
    assert "Traceback" not in result.output and "did not foresee" not in result.output
    assert not out.exists()


def test_texts_that_hold_numbers() -> None:
    for text in ("1_0", "\N{ARABIC-INDIC DIGIT ONE}", "1.5"):
        with pytest.raises(ValueError, match="batch_size: expected"):
            batch_size(text)
        with pytest.raises(ValueError, match="budgets: expected"):
            parse_budgets(f"0,{text}")
        with pytest.raises(ValueError, match="layers: expected"):
            read_ranges("layers", f"0-{text}")
    for text in ("1_0", "nan", "inf", "1e999", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 400):
        with pytest.raises(ValueError, match="alpha: expected two numbers"):
            _bounds("alpha", f"0,{text}")
        with pytest.raises(ValueError, match="range: expected name=low,high"):
            _range(f"strength=0,{text}")
    assert (batch_size("12"), parse_budgets("0, 64"), _bounds("alpha", "0,.5")) == (12, (0, 64), (0, 0.5))
    assert _range("strength=1,8") == ("strength", 1, 8)


@pytest.mark.parametrize("text", ["0", "+7", "-3", "12345678901234567890"])
def test_whole_numbers(text: str) -> None:
    assert is_whole_number(text) and is_number(text)


class TestFile:
    """Options of a .yaml file: as they are written."""

    def made(self, tmp_path: Path, content: str) -> Path:
        path = tmp_path / "options.yaml"
        path.write_text(content, "utf-8")
        return path

    @pytest.mark.parametrize("value", ["1_0", "0x10", "0b1", "1:30", "2024-01-01", ".inf"])
    def test_other_notations_are_no_numbers(self, tmp_path: Path, value: str) -> None:
        result = run("generate", "--config", self.made(tmp_path, f"max_new_tokens: {value}\n"), TEXT)
        assert result.exit_code == 2
        assert f"{value!r} is not a valid integer" in result.output

    def test_a_zero_in_front_makes_no_other_number(self, tmp_path: Path) -> None:
        folder = save_tiny_model(tmp_path / "m")
        path = self.made(
            tmp_path, f"model: {folder}\nmax_new_tokens: 010\nseed: 010\nset: {{alpha: .5, layers: [01]}}\n"
        )
        result = run("generate", "--config", path, TEXT, "--json", "-")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["seed"], found["config"]["alpha"], found["config"]["layers"]) == (10, 0.5, [1])

    def test_a_branch_keeps_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from attnrb import models

        seen: list[Any] = []

        def load(*_: Any, **options: Any) -> None:
            seen.append(options["revision"])
            raise models.ModelError("enough")

        monkeypatch.setattr(models, "load", load)
        run("generate", "--config", self.made(tmp_path, "revision: 1.10\n"), TEXT)
        assert seen == ["1.10"]

    def test_lists_and_mappings_of_a_policy(self, tmp_path: Path) -> None:
        folder = save_tiny_model(tmp_path / "m")
        content = (
            f"model: {folder}\npolicy: emphasis\nset:\n  strength: 4\n  heads: {{0: [0, 2], 1: [1]}}\n  rows: all\n"
        )
        result = run("generate", "--config", self.made(tmp_path, content), f"(({TEXT[:20]})) and", "-n2", "--json", "-")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["config"]
        assert (found["strength"], found["rows"]) == (4, "all")
        assert {int(layer): heads for layer, heads in found["heads"].items()} == {0: [0, 2], 1: [1]}

    @pytest.mark.parametrize("content", ["seed: 1\nseed: 2\n", "set: {alpha: 1, alpha: 2}\n"])
    def test_a_key_that_stands_twice(self, tmp_path: Path, content: str) -> None:
        result = run("generate", "--config", self.made(tmp_path, content), TEXT)
        assert result.exit_code == 1
        assert re.search(r"is not YAML: the key '\w+' stands in it twice", result.output)


def test_arguments_of_the_harness_command() -> None:
    for args in (
        ["--model_args", "pretrained=x,alpha=1_0"],
        ["-a", "pretrained=x", "alpha=1_0"],
        ["--model_args=a=1_0"],
    ):
        with pytest.raises(ValueError, match="expected a number, or a name in quotes, got '1_0'"):
            _check_model_args(["--model", "attnrb", *args])
    _check_model_args(["--model_args", "pretrained=1_x,alpha=1e-3,revision='1_0'", "--tasks", "a=1_0"])
