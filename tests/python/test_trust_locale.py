"""The command line where the locale knows ASCII alone, and Python's UTF-8 mode is off: as in some containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "transformers"):
    pytest.importorskip(package)

from attnrb.text.reading import as_typed  # noqa: E402
from saved_tiny_model import save_tiny_model, tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no such locale")

TEXT = "größe 日本 😀 the quick brown"
PROGRAM = """
import sys
from attnrb.cli.app import app
commands = " ".join(sys.argv[1:]).split(" ;; ")
for command in commands:
    try:
        app([part.replace("~", " ") for part in command.split(" ")], prog_name="attnrb")
    except SystemExit as done:
        print(f"\\n==== {done.code}", flush=True)
"""


def ran(*commands: list[str | Path], stdin: str = "") -> list[tuple[str, str]]:
    """What each command printed, and its exit code: all in one process."""
    argv = " ;; ".join(" ".join(str(each).replace(" ", "~") for each in command) for command in commands)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argv.encode()],
        env=environment | {"PYTHONIOENCODING": "", "TERM": "dumb"},
        input=stdin.encode(),
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    parts = done.stdout.decode("ascii").split("\n==== ")
    codes = [part.partition("\n")[0] for part in parts[1:]]
    outputs = [parts[0], *(part.partition("\n")[2] for part in parts[1:-1])]
    assert len(codes) == len(commands), done.stderr.decode()
    return list(zip(outputs, codes, strict=True))


@pytest.mark.slow
def test_text_goes_in_and_out(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "m")
    (tmp_path / "naïve.txt").write_text(TEXT, "utf-8")
    (tmp_path / "words").write_text("größe the", "utf-8")
    short: list[str | Path] = ["-m", model, "-n", "2"]
    analyze: list[str | Path] = ["analyze", "-m", model, "--json"]
    found = ran(
        ["generate", TEXT, *short, "--json", "-"],
        ["generate", "-", *short, "--json", "-"],
        ["generate", TEXT, *short],
        ["compare", TEXT, *short],
        [*analyze, "-", "--text-string", TEXT],
        [*analyze, "-", tmp_path / "naïve.txt", "--function-words", tmp_path / "words"],
        [*analyze, tmp_path / "größe.json", TEXT],
        ["--help"],
        ["analyze", "--help"],
        ["info"],
        ["generate", "-m", tmp_path / "größe", TEXT],
        stdin=TEXT,
    )
    codes = [code for _, code in found]
    assert codes == ["0"] * 10 + ["1"]
    assert [json.loads(output)["prompt"] for output, _ in found[:2]] == [TEXT, TEXT]
    expected = analyzed(TEXT)
    reports = [json.loads(output) for output, _ in found[4:6]]
    reports.append(json.loads((tmp_path / "größe.json").read_text("utf-8")))
    assert [report["texts"][0]["token"] for report in reports] == [expected] * 3


def analyzed(text: str) -> list[str]:
    """The texts of the tokens, as a report has them in this process."""
    from attnrb.analysis import analyze
    from saved_tiny_model import tiny_model

    report: Any = analyze(tiny_model(), tiny_tokenizer(), [text]).to_dict()
    tokens: list[str] = report["texts"][0]["token"]
    return tokens


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("größe".encode(), "größe"),
        (b"plain", "plain"),
        ("é".encode("latin-1"), "\udce9"),  # bytes of another encoding stay what they are, and are refused later
        ("日本 😀".encode(), "日本 😀"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_was_typed(raw: bytes, text: str, encoding: str) -> None:
    assert as_typed(raw.decode(encoding, "surrogateescape")) == text


def test_half_a_pair_stays() -> None:
    assert as_typed("a \ud83d b") == "a \ud83d b"
