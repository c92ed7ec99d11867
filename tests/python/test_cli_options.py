"""What all commands share: options from a file, ``--json``, completion, examples, progress without a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "transformers", "yaml"):
    pytest.importorskip(package)

from attnrb.cli import console as console_module  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from rich.console import Console  # noqa: E402
from saved_tiny_model import TEXT, save_tiny_model  # noqa: E402
from typer.main import get_command  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run() -> Run:
    def run(*arguments: str | Path, columns: int = 100, **settings: Any) -> Result:
        environment = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
        return CliRunner().invoke(app, [str(each) for each in arguments], env=environment, **settings)

    return run


def one_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def sentence(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last: str = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"attnrb: .*[^.][.?]", last)
    return last


class TestFile:
    """``--config FILE.yaml``."""

    def test_gives_options_an_argument_flags_and_settings(self, run: Run, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "options.yaml"
        path.write_text(
            f"prompt: {TEXT}\nmodel: {folder}\nmax_new_tokens: 3\nchat: false\npolicy: rebalance\n"
            "set: {alpha: 0.4, layers: [1]}\nnormalize: true\ntemperature: null\n"
        )
        found = one_json(run("compare", "--config", path, "--json"))
        assert found["prompt"] == TEXT
        assert found["plain"]["tokens"] <= 3
        assert (found["config"]["alpha"], found["config"]["layers"], found["config"]["normalize"]) == (0.4, [1], True)

    def test_what_is_typed_counts_before_it(self, run: Run, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "options.yml"
        path.write_text("prompt: something else\nmodel: nowhere\nmax-new-tokens: 9\nalpha: 0.9\nseed: 4\n")
        typed = ("--model", folder, "-n", "2", "--alpha=0.3")
        found = one_json(run("compare", f"--config={path}", TEXT, *typed, "--json"))
        assert (found["prompt"], found["config"]["alpha"], found["seed"]) == (TEXT, 0.3, 4)
        assert found["plain"]["tokens"] <= 2

    def test_of_eval_is_told_from_policies_by_its_ending(self, run: Run, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval")
        path = tmp_path / "study.yaml"
        path.write_text("tasks: [piqa, siqa]\nprompting: nonsense\nconfig: [default]\n")
        assert "'config', which is no option" in sentence(run("eval", "-c", path))
        path.write_text("tasks: [piqa, siqa]\nprompting: nonsense\n")
        assert "prompting: expected direct, cot or both, got 'nonsense'" in sentence(run("eval", "-c", path))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("max_new_token: 3", r"names 'max_new_token', .*did you mean max-new-tokens\?"),
            ("- 3", "has no options by name"),
            ("a: [", "is not YAML"),
            ("chat: 3", "chat: expected true or false, got 3"),
            (None, "could not be read: No such file"),
        ],
    )
    def test_mistakes_are_one_sentence(self, run: Run, tmp_path: Path, content: str | None, message: str) -> None:
        path = tmp_path / "options.yaml"
        if content is not None:
            path.write_text(content)
        assert re.search(message, sentence(run("generate", "--config", path)))

    def test_another_ending_is_refused(self, run: Run) -> None:
        assert "config: expected a .yaml file" in sentence(run("generate", "--config", "options.toml"))


class TestJson:
    """``--json FILE``, ``--json -`` and ``--json``: alike in every command."""

    def test_prints_or_writes(self, run: Run, tmp_path: Path) -> None:
        printed = one_json(run("info", "--json"))
        assert one_json(run("info", "--json", "-")) == printed
        result = run("info", "--json", tmp_path / "out.json")
        assert result.exit_code == 0
        assert json.loads((tmp_path / "out.json").read_text("utf-8")) == printed
        assert str(printed["torch"]) in result.stdout  # the text is shown too
        assert "Wrote" in result.stderr

    @pytest.mark.parametrize("command", ["compare", "generate", "analyze", "info", "bench", "profile", "demo"])
    def test_every_command_has_it(self, run: Run, command: str, tmp_path: Path) -> None:
        result = run(command, "--json", tmp_path / "nowhere" / "out.json", *(["x y"] if command == "analyze" else []))
        assert "there is no folder" in sentence(result)

    def test_a_prompt_is_never_taken_for_a_file(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert "json: expected - or the name of a .json file" in sentence(run("compare", "--json", "Why is it?"))
        assert not list(tmp_path.iterdir())


def test_analyze_takes_its_text_as_compare_does(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    words = "some words more"
    found = one_json(run("analyze", tmp_path / "a.txt", words, "-", "--model", folder, "--json", "-", input=TEXT))
    assert [each["name"] for each in found["texts"]] == ["a.txt", "text 2", "standard input"]


def test_dtype_and_device_reach_the_model(run: Run, folder: Path) -> None:
    found = one_json(run("generate", TEXT, "-m", folder, "-n", "2", "--dtype", "bf16", "--device", "cpu", "--json"))
    assert found["dtype"] == "bfloat16"
    for command in ("compare", "generate", "profile", "demo"):
        assert "device: expected auto, cpu, cuda" in sentence(run(command, "--device", "gpu"))
        assert "got both" in sentence(run(command, "--device", "cpu", "--device-map", "auto"))


def test_a_layer_too_many_is_said_before_anything_is_generated(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnrb.studies import compare

    def generated(*_: object, **__: object) -> None:
        raise AssertionError("generated first")

    monkeypatch.setattr(compare, "generate", generated)
    message = sentence(run("compare", TEXT, "-m", folder, "--layers", "1-99"))
    assert "layers: the model's layers are 0 to 2, got 3-99" in message
    assert "the model's layers are 0 to 2" in sentence(run("compare", TEXT, "-m", folder, "--source-layer", "29"))


def every_command() -> dict[str, Any]:
    """All commands, those of groups as ``cache list``."""
    program = get_command(app)
    groups = {name: each for name, each in program.commands.items() if hasattr(each, "commands")}
    single = {name: each for name, each in program.commands.items() if name not in groups}
    inner = {f"{name} {each}": made for name, group in groups.items() for each, made in group.commands.items()}
    return {**single, **inner}


COMMANDS = every_command()
OTHERS = ("serve", "lm-eval")  # they hand their options on, --config and --json among them
WITHOUT_A_MODEL = ("bench", "cache clear", "cache list", "data", "info")


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {*OTHERS}))
def test_every_command_has_what_all_have_in_common(command: str) -> None:
    known = {opt for each in COMMANDS[command].params for opt in each.opts}
    assert "--config" in known
    if command in WITHOUT_A_MODEL:
        assert "--model" not in known
    else:
        assert {"--model", "-m", "--dtype", "--device", "--device-map", "--revision", "--threads"} <= known
    assert command in ("cache clear", "data") or "--json" in known


def test_the_bench_offers_the_dtypes_that_it_takes(run: Run) -> None:
    assert "auto" not in re.search(r"--dtype(.*?)--", run("bench", "--help").stdout, re.DOTALL)[1]  # type: ignore[index]
    assert "float16, got 'auto'" in sentence(run("bench", "--dtype", "auto"))


# The help of lm-eval is the harness' own.
@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"lm-eval"}))
def test_help_ends_with_examples_that_parse(run: Run, command: str) -> None:
    out = run(*command.split(), "--help", columns=120).stdout
    lines = [line.strip() for line in out.partition("Examples:")[2].splitlines() if line.strip()]
    assert lines
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", out.partition("Examples:")[0]))
    for line in lines:
        words = shlex.split(line.partition(" < ")[0])
        assert words[0] == "attnrb"
        if " ".join(words[1:]).startswith(command) and command not in OTHERS:
            assert {each for each in words if re.fullmatch(r"--?[a-z][a-z-]*", each)} <= known, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.slow
def test_completion(shell: str) -> None:
    """The shell's own protocol: a script to install, and an answer for what is typed so far."""
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'attnrb'; from attnrb.cli import main; main()"]
    script = subprocess.run(
        program, env={**os.environ, "_ATTNRB_COMPLETE": f"source_{shell}"}, capture_output=True, text=True, check=False
    )
    assert "attnrb" in script.stdout
    typed = "attnrb compare --policy em"
    asked = {"_ATTNRB_COMPLETE": f"complete_{shell}", "COMP_WORDS": typed, "COMP_CWORD": "3"}
    asked |= {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = subprocess.run(program, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert "emphasis" in answer.stdout


class TestProgress:
    """Where there is no terminal, nobody has to guess whether something is still at work."""

    def test_a_line_now_and_then_says_what_is_at_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console_module, "LINE_SECONDS", 0.01)
        said = io.StringIO()
        monkeypatch.setattr(console_module, "errors", lambda: Console(file=said, width=80))
        with console_module.steps() as step:
            step("Generating")
            end = time.monotonic() + 20
            while "so far" not in said.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
        lines = said.getvalue().splitlines()
        assert lines[0] == "Generating …"
        assert re.fullmatch(r"Generating … \d+ s so far", lines[1])
        before = said.getvalue()
        time.sleep(0.05)
        assert said.getvalue() == before  # it ends with the work

    def test_a_block_of_answers_may_take_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("lm_eval")
        from attnrb.cli import running
        from attnrb.evaluation.runner import Progress

        monkeypatch.setattr(console_module, "LINE_SECONDS", 0.01)
        said = io.StringIO()
        monkeypatch.setattr(running, "errors", lambda: Console(file=said, width=120))
        with running.progress() as tell:
            tell(Progress(4, 16, 40, 160, "direct, plain"))
            end = time.monotonic() + 20
            while "so far" not in said.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
            tell(Progress(16, 16, 160, 160, "direct, plain"))
        first, reminded, *_, last = said.getvalue().splitlines()
        assert first == "4 of 16 answers, direct, plain"
        assert re.fullmatch(r"4 of 16 answers, direct, plain; \d+ s so far", reminded)
        assert last == "16 of 16 answers, done"

    def test_the_time_left_is_that_of_the_questions_at_hand(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What came before the first of them, and what other questions took, tells nothing of their speed."""
        pytest.importorskip("lm_eval")
        from attnrb.cli import running
        from attnrb.evaluation.runner import Progress

        clock = [1000.0]
        monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
        left = running._TimeLeft()

        def after(seconds: float, state: Progress) -> str:
            clock[0] += seconds
            return left(state)

        assert after(0, Progress(0, 1, 0, 1, "Ranking heads")) == ""
        assert after(600, Progress(4, 16, 40, 160, "Starting")) == ""
        assert after(30, Progress(5, 16, 50, 160, "plain")) == f"{running.duration(330)} left"
        assert after(30, Progress(16, 16, 160, 160, "plain")) == "done"
        assert after(5, Progress(0, 8, 0, 80, "Starting")) == ""
        assert after(2, Progress(4, 8, 40, 80, "plain")) == f"{running.duration(2)} left"
        assert after(90, Progress(0, 8, 0, 80, "Starting")) == ""  # as many once more
        assert after(3, Progress(4, 8, 40, 80, "plain")) == f"{running.duration(3)} left"

    def test_analyze_says_how_much_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from attnrb.analysis import Progress
        from attnrb.cli import analyze

        monkeypatch.setattr(console_module, "LINE_SECONDS", 0.01)
        said = io.StringIO()
        with analyze._lines(Console(file=said, width=120)) as tell:
            tell(Progress(text=1, texts=4, fraction=0.0, tokens=2224, run="plain"))
            end = time.monotonic() + 20
            while "so far" not in said.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
        assert re.match(r"Analysing text 2 of 4, 2,224 tokens, plain: 25 %, \d+ s left; \d+ s so far", said.getvalue())


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    from attnrb.cli.console import explain

    for package, extra in (
        ("datasets", "eval"),
        ("optuna.samplers", "eval"),
        ("plotly", "analysis"),
        ("peft", "train"),
    ):
        said = explain(ModuleNotFoundError(f"No module named {package!r}", name=package))
        assert said == f"this needs the package {package.partition('.')[0]}: run `pip install 'attnrb[{extra}]'`"
    assert explain(ModuleNotFoundError("No module named 'other'", name="other")) == "No module named 'other'"


def test_a_locale_of_ascii_is_named_as_the_cause() -> None:
    """Packages read files of their own in the locale's encoding: PyTorch does so in its templates of kernels."""
    from attnrb.cli.console import explain
    from attnrb.models.checkpoint import ModelError

    for encoding, hint in (("ascii", True), ("utf-8", False)):
        error = ModelError("model: it could not be loaded")
        error.__cause__ = UnicodeDecodeError(encoding, b"\xe2", 0, 1, "ordinal not in range(128)")
        assert explain(error).endswith("set PYTHONUTF8=1") == hint
