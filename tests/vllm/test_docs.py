"""The commands and examples of docs/vllm.md, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import servers

PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text("utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def block(kind: str, beginning: str) -> str:
    """The example that begins so."""
    found: list[str] = re.findall(rf"^```{kind}\n({re.escape(beginning)}.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of the server that the page's command starts; the model has its name and lies in a folder."""
    import attnrb.models

    folder, port = tmp_path_factory.mktemp("smollm2"), servers.free_port()
    model, tokenizer = attnrb.models.load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    *_, command = block("shell", "pip install torch").splitlines()
    before, options = shlex.split(command)[:3], shlex.split(command)[3:]
    assert before == ["attnrb", "serve", MODEL]
    assert options[-2:] == ["--port", "8000"]
    with servers.serving(folder, port, [*options[:-2], "--served-model-name", MODEL], folder / "log.txt"):
        yield port


def test_curl(port: int) -> None:
    command = block("shell", "curl").replace("localhost:8000", f"localhost:{port}")
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "cotton" in json.loads(ran.stdout)["choices"][0]["message"]["content"]


def test_the_client_of_openai(port: int) -> None:
    pytest.importorskip("openai", reason="the example of the page is for the package openai")
    names: dict[str, Any] = {}
    exec(block("py", "from openai").replace("localhost:8000", f"localhost:{port}"), names)
    assert "cotton" in names["answer"].choices[0].message.content


def test_options_for_a_server_without_the_middleware(port: int) -> None:
    body = {**json.loads(block("json", "{")), "model": MODEL, "max_tokens": 8}
    said = httpx.post(f"http://localhost:{port}/v1/completions", json=body, timeout=300)
    assert said.status_code == 200, said.text
    assert said.json()["usage"]["completion_tokens"] == 8


def test_offline(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("python", "from attnrb.models"), "utf-8")
    ran = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "cotton" in ran.stdout.splitlines()[-1]
