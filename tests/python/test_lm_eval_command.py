"""``attnrb lm-eval``: the harness' own command with its own arguments, and nothing that runs as Python starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_evaluation import save_roomy_model, save_task

pytestmark = pytest.mark.slow

for package in ("typer", "lm_eval"):
    pytest.importorskip(package)


def command(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "attnrb")) -> tuple[int, str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    ran = subprocess.run(
        [sys.executable, *program, "lm-eval", *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_a_task_of_its_own(tmp_path: Path) -> None:
    save_roomy_model(tmp_path / "model")
    tasks = save_task(tmp_path / "tasks")
    arguments = f"--model attnrb --model_args pretrained=model,alpha=0.2,layers=1-2 --include_path {tasks}"
    code, _, errors = command(tmp_path, *arguments.split(), "--tasks", "colours", "--output_path", "out.json")
    assert code == 0, errors[-3000:]
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text("utf-8"))
    assert found["config"]["model"] == "attnrb"
    assert found["n-samples"]["colours"]["effective"] == 6
    assert 0 <= found["results"]["colours"]["acc,none"] <= 1


def test_the_harness_own_help_and_usage(tmp_path: Path) -> None:
    code, out, _ = command(tmp_path, "--help")
    assert code == 0
    assert "lm-eval" in out
    code, _, errors = command(tmp_path, "run", "--no-such-option", "1")
    assert code == 2
    assert "--no-such-option" in errors


def test_no_code_of_attnrb_runs_as_python_starts() -> None:
    """Nothing of the package lies beside it in site-packages but what an editable install itself writes."""
    names = {file.name for file in importlib.metadata.files("attnrb") or () if "/" not in str(file)}
    assert not {name for name in names if not name.startswith("_editable_")}
    script = "import sys; print(sorted(name for name in sys.modules if 'attnrb' in name and 'editable' not in name))"
    command = [sys.executable, "-c", script, "lm_eval"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout == "[]\n"
