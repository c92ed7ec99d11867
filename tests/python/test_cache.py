"""``attnrb cache``: what is kept of GGUF files is listed, and goes when it is told to."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

for package in ("typer", "rich", "transformers", "gguf"):
    pytest.importorskip(package)

from attnrb import models  # noqa: E402
from attnrb.cli.app import app  # noqa: E402
from attnrb.models.cache import clear, copies  # noqa: E402
from saved_tiny_model import save_tiny_gguf  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

NOW = importlib.metadata.version("transformers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a copy that is used, one of another transformers, and what a kill left."""
    monkeypatch.setenv("ATTNRB_CACHE", str(tmp_path / "cache"))
    models.load(save_tiny_gguf(tmp_path / "tiny.gguf"))
    place = tmp_path / "cache" / "models"
    for name, made_by in (("other-1234", {"transformers": "4.0.0", "files": {}}), ("older-5678", {"files": {}})):
        (place / name).mkdir()
        (place / name / "attnrb.json").write_text(json.dumps(made_by))
        (place / name / "weights").write_bytes(b"x" * 1000)
    (place / ".writing-x").mkdir()
    return place


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["cache", *map(str, arguments)], env={"COLUMNS": "120", "TERM": "dumb"})


def test_a_copy_says_what_made_it(folder: Path) -> None:
    found = {each.name.split("-")[0]: each for each in copies()}
    assert set(found) == {"tiny", "other", "older", ".writing"}
    assert (found["tiny"].transformers, found["tiny"].in_use) == (NOW, True)
    assert (found["other"].transformers, found["other"].in_use) == ("4.0.0", False)
    assert (found["older"].transformers, found["older"].in_use) == (None, True)
    assert found["other"].bytes == 1000 + (folder / "other-1234" / "attnrb.json").stat().st_size


def test_unused_ones_go_alone(folder: Path) -> None:
    assert {each.name for each in clear(unused=True)} == {"other-1234", ".writing-x"}
    assert {each.name.split("-")[0] for each in copies()} == {"tiny", "older"}
    assert [each.name for each in clear("OLDER")] == ["older-5678"]
    with pytest.raises(ValueError, match="holds nothing whose name begins with 'older'"):
        clear("older")
    assert len(clear()) == 1
    assert copies() == []


def test_commands(folder: Path, tmp_path: Path) -> None:
    out = run("list").stdout
    assert "other-1234" in out
    assert "4.0.0, not used now" in out
    found = json.loads(run("list", "--json").stdout)
    assert found["folder"] == str(folder.parent)
    assert len(found["copies"]) == 4
    result = run("clear", "--unused")
    assert result.exit_code == 0
    assert result.stdout.startswith("Removed 2 copies, ")
    assert not (folder / "other-1234").exists()
    assert run("clear", "nothing").exit_code == 1
    assert "Removed 2 copies" in run("clear").stdout
    assert "0 MB in " in run("list").stdout


def test_a_cache_that_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRB_CACHE", "")
    assert "turned off" in run("list").stdout
    assert "Removed 0 copies" in run("clear").stdout
