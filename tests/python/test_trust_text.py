"""Text on its way in: byte-order marks, lone surrogates, numbers that are none, long fields, names of no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)

import attnrb  # noqa: E402
from attnrb.cli.analyze import names_a_file, read_texts  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from attnrb.cli.profile import read_examples  # noqa: E402
from attnrb.evaluation.data import DataError, read_items  # noqa: E402
from attnrb.policies import HeadProfile  # noqa: E402
from attnrb.policies.parse import parse_option, parse_policy  # noqa: E402
from attnrb.text.reading import check_text, read_text  # noqa: E402
from saved_tiny_model import TEXT, save_tiny_model, tiny_tokenizer  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

MARK = b"\xef\xbb\xbf"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments: str | Path, **settings: Any) -> Result:
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": None, "FORCE_COLOR": None}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=environment, **settings)


# ------------------------------------------------------------------------------------------------ byte-order marks


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_a_mark_is_no_token(folder: Path, tmp_path: Path, name: str) -> None:
    content = (json.dumps({"text": TEXT}) + "\n" if name.endswith("jsonl") else TEXT).encode()
    found = []
    for place, data in (("with", MARK + content), ("without", content)):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_bytes(data)
        result = run("analyze", "--model", folder, "--text", tmp_path / place / name, "--json", "-")
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["texts"][0]["token"])
    assert found[0] == found[1]


@pytest.mark.parametrize("command", ["generate", "analyze"])
def test_a_mark_on_standard_input(folder: Path, command: str) -> None:
    arguments = ("--text", "-", "--json", "-") if command == "analyze" else ("-", "--json", "-n", "3")
    found = [json.loads(run(command, *arguments, "-m", folder, input=start + TEXT).stdout) for start in ("\ufeff", "")]
    key = "texts" if command == "analyze" else "token_ids"
    assert found[0][key] == found[1][key]


def test_marks_before_options_words_and_items(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(MARK + b'{"alpha": 0.3}')
    assert parse_policy(str(tmp_path / "c.json")) == attnrb.RebalanceConfig(alpha=0.3)
    (tmp_path / "rebalance_config.json").write_bytes(MARK + b'{"alpha": 0.3}')
    assert attnrb.RebalanceConfig.from_pretrained(tmp_path).alpha == 0.3
    saved = HeadProfile([[1.0, 2.0]], keep=1).save(tmp_path / "p.json")
    saved.write_bytes(MARK + saved.read_bytes())
    assert HeadProfile.load(saved).chosen == {0: (1,)}
    (tmp_path / "e.jsonl").write_bytes(MARK + b'{"prompt": "((a)) b", "answer": " c"}\n')
    assert read_examples(tiny_tokenizer(), tmp_path / "e.jsonl")[0][1] == " c"
    (tmp_path / "words").write_bytes(MARK + b"der die")
    assert read_text(tmp_path / "words").split() == ["der", "die"]
    (tmp_path / "t.jsonl").write_bytes(MARK + b'{"context": "How many?", "answer": 12}\n')
    assert read_items(tmp_path, "t").items[0].answer == "12"


# ------------------------------------------------------------------------------------------------ surrogates


def test_what_holds_a_lone_surrogate_is_refused() -> None:
    for value in ("a\ud83d", ["x", "\udc00"], {"a": {"b": ("\udfff",)}}, {"\ud800": 1}):
        with pytest.raises(ValueError, match=r"x: expected text, but character \d is U\+D"):
            check_text("x", value)
    for fine in ("a\U0001f600", ["日本", 1, None, True], {}, 0.5):
        check_text("x", fine)


def test_a_prompt_with_one() -> None:
    tokenizer = tiny_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    chat = [{"role": "user", "content": "((a)) \ud83d"}]
    for prompt in ("((a\ud83d)) b", ["fine", "((b)) \udc00"], chat, [chat]):
        with pytest.raises(ValueError, match="text: expected text, but character"):
            attnrb.mark(tokenizer, prompt)
    with pytest.raises(ValueError, match="text: expected text, but character 1 is"):
        attnrb.spans(tokenizer, "\udfffa", [(0, 1)])


def test_texts_with_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine enough"}\n{"text": "half \\ud83d a pair"}\n')
    result = run("analyze", "--model", folder, "--text", tmp_path / "a.jsonl")
    assert result.exit_code == 1
    assert "a.jsonl:2: expected text, but character 6 is U+D83D" in result.stderr


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("text", ["1_000", "1_0.5", "١٢", "0x10", "1 000", "--1", "1e", "."])
def test_what_is_no_number_is_no_option(text: str) -> None:
    assert parse_option("strength", text) == text
    with pytest.raises((TypeError, ValueError), match="strength"):
        parse_policy(f"emphasis(strength={text})")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"alpha": 0.1, "alpha": 0.9}', b'{"keep": 1, "keep": 2}', b"\xff"]
)
def test_files_beside_a_model_and_of_heads(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rebalance_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"rebalance_config\.json: "):
        attnrb.Policy.from_pretrained(tmp_path)
    (tmp_path / "heads.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"heads\.json: "):
        HeadProfile.load(tmp_path / "heads.json")


@pytest.mark.parametrize("text", ["8", "-8", "+8", "8.", ".5", "0.25", "1e3", "1E-3", "inf", "-Infinity"])
def test_what_is_a_number_is_one_as_an_option(text: str) -> None:
    found = parse_option("strength", text)
    assert found == float(text) and isinstance(found, (int, float))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"policy": "rebalance", "alpha": \xff}', "is not UTF-8 text: byte 33"),
        ('{"alpha": 0.3}'.encode("utf-16"), "is not UTF-8 text but UTF-16, which an editor can save as UTF-8: byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"policy": "rebalance", "alpha": NaN}', "alpha: expected a finite number"),
        (b"[1]", "options: expected a mapping"),
        (b'{"alpha": 0.1, "alpha": 0.9}', "the key 'alpha' stands in it twice"),
        (b"", "is not JSON"),
    ],
)
def test_a_file_that_is_no_policy(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises((TypeError, ValueError), match=message):
        parse_policy(str(tmp_path / "c.json"))


# ------------------------------------------------------------------------------------------------ examples


def test_a_separator_within_an_example_ends_no_line(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "((a\u2028b)) c", "answer": " d\u0085"}, ensure_ascii=False)
    (tmp_path / "e.jsonl").write_text(f"{line}\r\n{line}\n", "utf-8", newline="")
    assert [answer for _, answer in read_examples(tiny_tokenizer(), tmp_path / "e.jsonl")] == [" d\u0085"] * 2


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "((a)) b", "answer": NaN}',
        '{"prompt": "((a)) b", "answer": 3}',
        '{"prompt": "((a)) b", "answer": ""}',
        '{"prompt": "((a)) b", "answer": " \\ud800"}',
        '{"prompt": "((a \\udc00)) b", "answer": " c"}',
        '{"prompt": ["((a)) b"], "answer": " c", "more": 1}',
        '{"prompt": "((a)) b", "prompt": "((c)) b", "answer": " c"}',
        "[" * 100_000,
    ],
)
def test_an_example_that_is_none_names_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "e.jsonl").write_text(f'{{"prompt": "((a)) b", "answer": " c"}}\n{line}\n', "utf-8")
    with pytest.raises(ValueError, match=r"examples: line 2 of e\.jsonl"):
        read_examples(tiny_tokenizer(), tmp_path / "e.jsonl")


# ------------------------------------------------------------------------------------------------ items


NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "true", "null", "[1]", "{}"]
TEXTS_OF_NO_NUMBERS = "nan|NaN|infinity|inf|1_000|1e999|١٢|1,00|12 000|0x10||-|.|e5|--1|1.2.3"


@pytest.mark.parametrize("answer", [*NO_NUMBERS, *(f'"{text}"' for text in TEXTS_OF_NO_NUMBERS.split("|"))])
def test_what_is_no_number_is_no_answer(tmp_path: Path, answer: str) -> None:
    lines = ['{"context": "How many?", "answer": 1}', f'{{"context": "How many?", "answer": {answer}}}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(DataError, match=r"data: t\.jsonl, line 2: "):
        read_items(tmp_path, "t")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("12", "12"),
        ("-0.5", "-0.5"),
        ("1e3", "1000.0"),
        ('"12"', "12"),
        ('" 12 "', "12"),
        ('"1,200.5"', "1200.5"),
        ('"+3"', "+3"),
        ('".5"', ".5"),
        ('"7."', "7."),
        ('"1e5"', "1e5"),
        ('"12,345,678"', "12345678"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_what_is_a_number_is_one(tmp_path: Path, answer: str, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"context": "How many?", "answer": {answer}}}\n', "utf-8")
    assert read_items(tmp_path, "t").items[0].answer == text


@pytest.mark.parametrize(
    "row",
    [
        {"query": "a \ud83d b", "choices": ["x", "y"], "gold": 0},
        {"query": "a b", "choices": ["x", "\udc00"], "gold": 0},
        {"context": "how \ud83d", "answer": 1},
    ],
)
def test_an_item_with_half_a_pair_names_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    fine = {name: 1 if name == "answer" else value for name, value in row.items()}
    fine |= {name: "fine" for name in ("query", "context") if name in row}
    fine |= {"choices": ["x", "y"]} if "choices" in row else {}
    (tmp_path / "t.jsonl").write_text(json.dumps(fine) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: .*half of a surrogate pair"):
        read_items(tmp_path, "t")


@pytest.mark.parametrize("size", [131_073, 1_000_000])
def test_a_field_may_be_long(tmp_path: Path, size: int) -> None:
    (tmp_path / "mmlu").mkdir()
    question = "x" * size
    (tmp_path / "mmlu" / "anatomy_test.csv").write_text(f'"{question}",a,b,c,d,A\n')
    assert read_items(tmp_path, "mmlu_anatomy").items[0].question == question


# ------------------------------------------------------------------------------------------------ files and texts


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "docs/LICENSE",
        "notes.txt",
        "my notes.txt",
        "日本.md",
        "ordner/日本",
        "v1.2.3",
        "~/x",
        "C:\\x",
        "a.JSONL",
    ],
)
def test_a_name_of_no_file_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert names_a_file(name)
    monkeypatch.chdir(tmp_path)
    result = run("analyze", "--model", folder, "--text", name)
    assert result.exit_code == 1
    assert "text: there is no file" in result.stderr
    assert "--text-string takes a text as it is" in result.stderr
    assert read_texts([], [name]) == [("text 1", name)]


@pytest.mark.parametrize(
    "text", ["two words", "今天很好.我们走", "one\nof several lines.txt", "I met the U.S. team", "naïve"]
)
def test_a_text_is_a_text(text: str) -> None:
    assert read_texts([text], []) == [("text 1", text)]


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not be read: Is a directory"):
        read_texts([str(tmp_path)], [])


def test_a_prompt_that_names_a_file_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text(TEXT)
    for command in ("generate", "compare"):
        told = run(command, "prompt.txt", "-m", folder, "-n", "2")
        assert told.exit_code == 0
        assert "the prompt 'prompt.txt' is also the name of a file, and is taken as text" in told.stderr
        assert "name of a file" not in run(command, "prompt", "-m", folder, "-n", "2").stderr


def test_texts_and_strings_are_numbered_together(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("of a file")
    found = read_texts([str(tmp_path / "f"), "two words"], ["LICENSE", "x" * 10_000])
    assert [each.name for each in found] == ["f", "text 2", "text 3", "text 4"]
    assert found[2].text == "LICENSE"
    with pytest.raises(ValueError, match="text: expected a file, a text of several words or - "):
        read_texts([], [])


@pytest.mark.parametrize("line", ['{"context": "How many?", "answer": 1, "answer": 2}', "[" * 100_000])
def test_an_item_that_says_two_things_names_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text(line, "utf-8")
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: no JSON of texts and numbers .*(twice|deeply)"):
        read_items(tmp_path, "t")
