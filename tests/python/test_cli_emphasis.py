"""Markup on the command line, and the commands of emphasis, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)

import attnrb  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from rich.cells import cell_len  # noqa: E402
from saved_tiny_model import CHAT_TEMPLATE, LAYERS, save_tiny_model  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

PLAIN = "the quick brown fox jumps over the lazy dog while a slow"
MARKED = "the ((quick brown fox)) jumps over the lazy dog while a slow"
TOKENS = ("-n", "6")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run() -> Run:
    def run(*arguments: str | Path, columns: int = 100) -> Result:
        environment = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
        return CliRunner().invoke(app, [str(each) for each in arguments], env=environment)

    return run


def one_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error(result: Result) -> str:
    assert result.exit_code == 1
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


class TestCompare:
    def test_markup_means_emphasis(self, run: Run, folder: Path) -> None:
        found = one_json(run("compare", MARKED, "--model", folder, *TOKENS, "--json"))
        plain = one_json(run("compare", PLAIN, "--model", folder, *TOKENS, "--json"))
        assert found["config"] == attnrb.Emphasis().to_dict()
        assert found["prompt"] == MARKED
        assert found["prompt_tokens"] == plain["prompt_tokens"]  # those of the text without markup
        assert found["plain"]["token_ids"] == plain["plain"]["token_ids"]
        assert plain["config"]["policy"] == "rebalance"
        assert plain["spans"] is None
        assert plain["span_share"] == {"plain": [], "edited": []}

    def test_shares_of_the_span(self, run: Run, folder: Path) -> None:
        arguments = ("compare", MARKED, "--model", folder, *TOKENS, "--json", "--policy", "emphasis")
        strong = one_json(run(*arguments, "--set", "strength=8"))["span_share"]
        gone = one_json(run(*arguments, "--set", "strength=0"))["span_share"]
        none = one_json(run(*arguments, "--set", "strength=1"))["span_share"]
        assert len(strong["plain"]) == len(strong["edited"]) == LAYERS
        assert strong["plain"] == gone["plain"]
        assert gone["edited"] == [0.0] * LAYERS
        assert none["edited"] == pytest.approx(none["plain"], abs=1e-5)
        # Below the first edited layer nothing differs, so there the share is γm / (1 - m + γm) in each row.
        assert strong["edited"][0] > strong["plain"][0]

    @pytest.mark.parametrize("columns", [60, 100])
    def test_table_and_chart(self, run: Run, folder: Path, columns: int) -> None:
        result = run("compare", MARKED, "--model", folder, *TOKENS, columns=columns)
        assert result.exit_code == 0, result.output
        assert "with emphasis" in result.stdout
        assert "re-balanc" not in result.stdout
        assert "in 1 span, 3 layers edited" in result.stdout
        assert "Attention on the marked text, by layer" in result.stdout
        assert max(map(cell_len, result.stdout.splitlines())) <= columns

    @pytest.mark.parametrize("literal", [("--no-markup",), ("--alpha", "0.3"), ("--policy", "rebalance")])
    def test_markup_taken_literally(self, run: Run, folder: Path, literal: tuple[str, ...]) -> None:
        found = one_json(run("compare", MARKED, "--model", folder, *TOKENS, "--json", *literal))
        plain = one_json(run("compare", PLAIN, "--model", folder, *TOKENS, "--json"))
        assert found["config"]["policy"] == "rebalance"
        assert found["prompt_tokens"] > plain["prompt_tokens"]
        assert found["spans"] is None

    def test_strength_in_the_markup(self, run: Run, folder: Path) -> None:
        text = MARKED.replace("))", ":4))")
        [span] = one_json(run("compare", text, "--model", folder, *TOKENS, "--json"))["spans"]
        assert span["strength"] == 4

    def test_chat(self, run: Run, tmp_path: Path) -> None:
        chat = save_tiny_model(tmp_path / "chat", CHAT_TEMPLATE)
        found = one_json(run("compare", MARKED, "--model", chat, *TOKENS, "--json"))
        other = one_json(run("compare", MARKED, "--model", chat, *TOKENS, "--json", "--no-chat"))
        assert found["prompt_tokens"] == other["prompt_tokens"] + 2  # the template's <s> on either side
        assert found["spans"][0]["start"] == other["spans"][0]["start"] + 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((PLAIN, "--policy", "emphasis"), "nothing is marked; mark what matters as ((this))"),
            ((MARKED, "--policy", "emphasis", "--no-markup"), "--no-markup takes the prompt literally"),
            (("the ((quick fox",), "--no-markup"),
            ((MARKED, "--chat"), "no chat template"),
            ((MARKED, "--policy", "emphasis", "--set", "heads=smollm2-135m-instruct"), "30 layers of 9 heads"),
        ],
    )
    @pytest.mark.parametrize("command", ["compare", "generate"])
    def test_errors(self, run: Run, folder: Path, command: str, arguments: tuple[str, ...], message: str) -> None:
        assert message in error(run(command, *arguments, "--model", folder, *TOKENS))


class TestGenerate:
    def test_is_what_the_library_generates(self, run: Run, folder: Path) -> None:
        from attnrb.models import load

        arguments = ("generate", MARKED, "--model", folder, *TOKENS, "--json")
        found = one_json(run(*arguments, "--policy", "emphasis", "--set", "strength=16"))
        model, tokenizer = load(folder)
        marked = attnrb.mark(tokenizer, MARKED)
        with attnrb.patch(model, attnrb.Emphasis(strength=16)) as patched:
            expected = patched.generate(marked, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
        assert found["token_ids"] == expected
        assert found["spans"] == marked.spans.to_dict()["rows"][0]
        plain = one_json(run(*arguments, "--plain"))
        assert plain["config"] is None
        assert plain["token_ids"] == one_json(run("generate", PLAIN, *arguments[2:], "--plain"))["token_ids"]

    def test_learnt_strengths(self, run: Run, folder: Path, tmp_path: Path) -> None:
        from attnrb.models import load

        model, _ = load(folder)
        learned = attnrb.LearnedEmphasis(model, attnrb.Emphasis(strength=16))
        arguments = ("generate", MARKED, "--model", folder, *TOKENS, "--json")
        path = ("--policy", "learned_emphasis", "--set", f"path={learned.save(tmp_path)}")
        found = one_json(run(*arguments, *path))
        same = one_json(run(*arguments, "--policy", "emphasis", "--set", "strength=16"))
        assert found["token_ids"] == same["token_ids"]
        assert found["config"]["policy"] == "learned_emphasis"

    def test_counts_go_to_stderr(self, run: Run, folder: Path) -> None:
        result = run("generate", MARKED, "--model", folder, *TOKENS)
        assert result.exit_code == 0
        assert "in 1 span emphasised, 3 layers edited" in result.stderr


class TestProfile:
    def test_of_examples_in_a_file(self, run: Run, folder: Path, tmp_path: Path) -> None:
        from attnrb.models import load

        examples = tmp_path / "examples.jsonl"
        lines = [{"prompt": MARKED, "answer": " green"}, {"prompt": "((a lazy dog)) walks", "answer": " under"}]
        examples.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        out = tmp_path / "heads.json"
        arguments = ("profile", "--examples", examples, "--model", folder, "--keep", "3", "--out", out)
        found = one_json(run(*arguments, "--rows", "all", "--json"))
        model, tokenizer = load(folder)
        pairs = [(attnrb.mark(tokenizer, line["prompt"]), line["answer"]) for line in lines]
        expected = attnrb.profile_heads(model, tokenizer, attnrb.Emphasis(rows="all"), pairs, 3)
        written = attnrb.HeadProfile.load(out)
        assert written.scores == expected.scores
        assert found == written.to_dict()
        assert str(tmp_path) not in json.dumps(found)
        assert "--examples examples.jsonl" in found["about"]["command"]

    @pytest.mark.parametrize("columns", [16, 100])
    def test_heat_map(self, run: Run, folder: Path, tmp_path: Path, columns: int) -> None:
        out = tmp_path / "h.json"
        page = tmp_path / "h.html"
        arguments = ("--count", "2", "--model", folder, "--keep", "5", "-o", out, "--html", page)
        result = run("profile", *arguments, columns=columns)
        assert result.exit_code == 0, result.output
        assert page.read_text("utf-8").count("★</td>") == 5
        kept = attnrb.HeadProfile.load(out).chosen
        rows = [line for line in result.stdout.splitlines() if line[:4].strip().isdigit() and line[:3] != "   "]
        drawn = [line.count("★") for line in rows if "★" in line]
        assert sum(drawn) == sum(map(len, kept.values())) == 5
        assert "5 of 12 heads are kept" in " ".join(result.stdout.split())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "line 1 of e.jsonl is not JSON"),
            ('\n{"prompt": "((a)) b"}', "line 2 of e.jsonl: expected an object with prompt and answer"),
            ('{"prompt": "((a", "answer": "b"}', "line 1 of e.jsonl"),
            ("", "examples: expected at least one"),
        ],
    )
    def test_errors(self, run: Run, folder: Path, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "e.jsonl").write_text(text)
        out = tmp_path / "out.json"
        assert message in error(run("profile", "--examples", tmp_path / "e.jsonl", "--model", folder, "-o", out))
        assert not out.exists()


class TestDemo:
    def test_counts_what_was_right(self, run: Run, folder: Path) -> None:
        from attnrb.models import load
        from attnrb.studies.compare import compare
        from attnrb.studies.conflict import conflict_items, score_items

        found = one_json(run("demo", "--items", "6", "--model", folder, "--json"))
        model, tokenizer = load(folder)
        items = conflict_items(6)
        right = list(found["right"].values())
        assert len(right) == 5
        assert right[0] == score_items(model, tokenizer, items, None, "none").right
        assert found["comparison"]["plain"]["text"] == compare(model, tokenizer).plain.text
        assert right[2] == score_items(model, tokenizer, items, attnrb.Emphasis(strength=16.0)).right

    def test_table(self, run: Run, folder: Path) -> None:
        result = run("demo", "--items", "3", "--model", folder)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("of 3") == 5
        assert "asterisks around the newer fact" in result.stdout
