"""The Python examples of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.model
@pytest.mark.usefixtures("smollm2_folder")
def test_model_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    exec(EXAMPLES[0], {})
    out = capsys.readouterr().out
    assert out.startswith("Three reasons to sleep well:")
    assert "rows=" in out


def test_tensor_example() -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[1], names)
    assert getattr(names["output"], "shape", None) == (1, 8, 256, 64)
