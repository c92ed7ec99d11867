"""The Python examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("smollm2_folder")
def test_model_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    exec(EXAMPLES[0], names)
    assert "cotton" in names["tokenizer"].decode(names["output"][0, names["marked"].inputs["input_ids"].shape[1] :])
    exec(EXAMPLES[1], names)
    out = capsys.readouterr().out
    assert out.startswith("Three reasons to sleep well:")
    assert "rows=" in out


def test_it_is_short_and_shows_something_first() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:30])
    assert "make demo" in first_screen
    assert "attnrb.Emphasis" in first_screen
    assert "![" in first_screen


def test_tensor_example() -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[2], names)
    assert getattr(names["output"], "shape", None) == (1, 8, 256, 64)
