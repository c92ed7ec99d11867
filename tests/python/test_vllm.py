"""The quick part of the tests inside vLLM; `make test-vllm` runs all of them, in an environment of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "vllm"


@pytest.mark.vllm
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed here, and wants a transformers of its own: make test-vllm",
)
def test_a_tiny_llama_inside_vllm() -> None:
    # In a process of its own: an engine keeps threads and settings that other tests would notice.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(TESTS / "pytest.ini"),
        str(TESTS / "test_tiny_models.py"),
    ]
    ran = subprocess.run([*command, "-k", "llama"], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_vllm_finds_the_plugin() -> None:
    from importlib.metadata import entry_points

    found = {each.name: each.value for each in entry_points(group="vllm.general_plugins")}
    assert found.get("attnrb") == "attnrb.hosts.vllm.plugin:register"
    # A class named there would concern every engine of whoever has attnrb installed.
    assert "attnrb" not in {each.name for each in entry_points(group="vllm.logits_processors")}
