"""The notebooks run from their first cell to their last, and say what is stored with them."""

from __future__ import annotations

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def program() -> Any:
    """docs/notebooks.py, which is a script."""
    spec = spec_from_file_location("docs_notebooks", REPOSITORY / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook: Any) -> list[list[tuple[str, str]]]:
    """Of each code cell: the kinds of its outputs, and the words that it printed; numbers differ between machines.

    What a cell prints reaches the notebook in pieces whose borders depend on the clock, so neighbouring pieces of one
    stream are put together first.
    """
    said = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        pieces: list[tuple[str, str]] = []
        for each in cell["outputs"]:
            kind = each["output_type"]
            if kind == "display_data":
                kind = ",".join(sorted(each["data"]))
            elif kind == "stream":
                kind = each["name"]
            words = "".join(each.get("text", ""))
            if pieces and pieces[-1][0] == kind in ("stdout", "stderr"):
                words = pieces.pop()[1] + words
            pieces.append((kind, words))
        said.append([(kind, re.sub(r"[\d.]+", "0", words)) for kind, words in pieces])
    return said


def test_pieces_of_a_stream_are_one_text() -> None:
    def printed(*pieces: str) -> dict[str, Any]:
        streams = [{"output_type": "stream", "name": "stdout", "text": [each]} for each in pieces]
        return {"cells": [{"cell_type": "code", "outputs": streams}]}

    assert outputs(printed("a 1.5\n", "b\n")) == outputs(printed("a 2", "\nb\n")) == [[("stdout", "a 0\nb\n")]]


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_folder")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_is_stored(path: Path, program: Any) -> None:
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason="notebooks need the extra notebooks (pip install 'attnrb[notebooks]')")
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert outputs(program.run(path)) == outputs(stored)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_shows_code_and_outputs(path: Path, program: Any) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "run docs/notebooks.py: outputs are not stored"
    page = program.page(stored)
    assert page.startswith("# ")
    assert page.count("```python\n") == len(code)
    assert "notebook-output" in page
    assert str(Path.home()) not in page


def test_what_shows_itself_does_so_on_the_site(program: Any) -> None:
    from attnrb.reports.fragment import fragment, shaded

    ours = fragment("Title", "lead", shaded([("a\n\n<b>", 0.5, True)]))
    page = program.shown({"output_type": "execute_result", "data": {"text/html": [ours], "text/plain": ["Report"]}})
    assert "\n" not in page and page.startswith("<div") and "a&#10;&#10;&lt;b&gt;" in page
    other = {"text/html": "<script>alert(1)</script>", "text/plain": "Other"}
    assert program.shown({"output_type": "execute_result", "data": other}) == (
        '<pre class="notebook-output">Other</pre>'
    )


def test_what_a_cell_prints_is_no_markup(program: Any) -> None:
    said = {"output_type": "stream", "name": "stdout", "text": ["<script>alert(1)</script>"]}
    assert program.shown(said) == '<pre class="notebook-output">&lt;script&gt;alert(1)&lt;/script&gt;</pre>'
