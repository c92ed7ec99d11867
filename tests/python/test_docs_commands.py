"""Commands that the documentation shows exist, with the options that they are shown with; its data parses."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "yaml"):
    pytest.importorskip(package)

import yaml  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from conftest import REPOSITORY  # noqa: E402
from typer.main import get_command  # noqa: E402

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PROGRAM: Any = get_command(app)
GROUPS = {name: each.commands for name, each in PROGRAM.commands.items() if hasattr(each, "commands")}
NAMES = (*(f"{group} {name}" for group, names in GROUPS.items() for name in names), *PROGRAM.commands)
OTHERS_OPTIONS = ("serve", "lm-eval")  # they hand on what they do not know


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command of a page, by its name, and its words."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith(("    attnrb ", "attnrb "))]
    lines += re.findall(r"`(attnrb [^`]+)`", text.replace("\n", " "))
    for line in lines:
        line = line.split(" #")[0].split(" < ")[0].rstrip(" .;")
        try:
            words = shlex.split(line)
        except ValueError:
            continue  # prose
        found = next((name for name in NAMES if " ".join(words[1:]).startswith(name)), None)
        if found is not None:
            yield found, words[1 + len(found.split()) :]


def params(name: str) -> list[Any]:
    """The parameters of a command."""
    command = PROGRAM
    for part in name.split():
        command = command.commands[part]
    return list(command.params)


SHOWN = [(page, *each) for page in PAGES for each in commands(page) if each[0] not in OTHERS_OPTIONS]


def test_there_are_some() -> None:
    assert len(SHOWN) > 40
    assert {"compare", "eval", "data", "cache list", "study emphasis"} <= {name for _, name, _ in SHOWN}


@pytest.mark.parametrize(
    ("page", "name", "words"), SHOWN, ids=[f"{page.stem}-{number}" for number, (page, *_) in enumerate(SHOWN)]
)
def test_a_command_has_the_options_that_it_is_shown_with(page: Path, name: str, words: list[str]) -> None:
    known = {opt for each in params(name) for opt in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    assert used <= known, used - known
    takes_words = any(each.param_type_name == "argument" for each in params(name))
    single = [each for each in params(name) if not getattr(each, "is_flag", False)]
    valued = {opt for each in single for opt in each.opts}
    before = ["", *words]
    loose = [word for place, word in enumerate(words) if not word.startswith("--") and before[place] not in valued]
    loose = [word for word in loose if word == "-" or not re.match(r"-[a-z]$", word)]
    assert takes_words or not loose, loose


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_data_and_of_python_parse(page: Path) -> None:
    for block in blocks(page, "json"):
        for line in block.splitlines() if block.count("\n{") else [block]:
            json.loads(line)
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    for block in blocks(page, "python"):
        if not block.startswith(" "):  # else lines of a recipe, which test_recipes.py puts where they belong
            ast.parse(block)


def test_a_file_of_options_in_the_documentation_is_one_of_eval(tmp_path: Path) -> None:
    from attnrb.cli.command import _read

    (block,) = blocks(DOCS / "start.md", "yaml")
    (tmp_path / "options.yaml").write_text(block, encoding="utf-8")
    found = {param.name: values for param, values in _read(tmp_path / "options.yaml", params("eval"))}
    assert found["tasks"] == ["--tasks=piqa,siqa"]
    assert found["set_"] == ["--set=strength=8", "--set=layers=1-12"]
