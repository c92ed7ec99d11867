"""``lm_eval --model attnrb``: the harness' own command knows the model, and no other process notices anything."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_evaluation import save_roomy_model, save_task

TARGET = "attnrb.hosts.lm_eval.model:AttnrbLM"

# As much of a harness as the start of a process can meet.
REGISTRY = """
class Registry(dict):
    def register(self, name, *, target):
        self[name] = target
model_registry = Registry()
"""
MODELS = """
from lm_eval.api.registry import model_registry
model_registry.register("hf", target="x:y")
"""
MAIN = """
import json, sys
before = [type(each).__name__ for each in sys.meta_path]
import lm_eval.models
from lm_eval.api.registry import model_registry
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"attnrb", "torch", "_attnrb_lm_eval"})
watching = "_Watch" in [type(each).__name__ for each in sys.meta_path]
print(json.dumps({"models": model_registry, "loaded": loaded, "before": "_Watch" in before, "after": watching}))
"""

installed = pytest.mark.skipif(
    not any(file.name == "_attnrb_lm_eval.pth" for file in importlib.metadata.files("attnrb") or ()),
    reason="attnrb is on the path without being installed",
)


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    files = {"__init__.py": "", "api/__init__.py": "", "api/registry.py": REGISTRY, "models/__init__.py": MODELS}
    for name, content in {**files, "__main__.py": MAIN}.items():
        path = tmp_path / "fake" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "fake"


def start(harness: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(harness)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@installed
@pytest.mark.parametrize("way", ["-m lm_eval", "-u -m lm_eval run", "-mlm_eval", "lm_eval", "lm-eval", "__main__.py"])
def test_every_way_to_start_it(harness: Path, way: str) -> None:
    arguments: list[str | Path] = [*way.split()]
    if not way.startswith("-"):  # a script of that name, as pip installs them
        arguments = [harness / "lm_eval" / "__main__.py" if way == "__main__.py" else harness / way]
        if way != "__main__.py":
            arguments = [harness / "bin" / way]
            arguments[0].parent.mkdir()
            arguments[0].write_text(MAIN)
    ran = start(harness, *arguments, "--model", "attnrb")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert found["models"] == {"hf": "x:y", "attnrb": TARGET}
    assert found["loaded"] == ["_attnrb_lm_eval"]  # neither torch nor attnrb: the model may be another one
    assert (found["before"], found["after"]) == (True, False)


@installed
def test_no_other_process_notices(harness: Path) -> None:
    (harness / "other.py").write_text(MAIN)
    found = json.loads(start(harness, harness / "other.py").stdout)
    assert found["models"] == {"hf": "x:y"}
    assert found["loaded"] == []


@installed
def test_a_model_of_that_name_is_kept(harness: Path) -> None:
    models = harness / "lm_eval" / "models" / "__init__.py"
    models.write_text(f"{MODELS}model_registry.register('attnrb', target='theirs:Model')\n")
    assert json.loads(start(harness, "-m", "lm_eval").stdout)["models"]["attnrb"] == "theirs:Model"


@installed
def test_another_kind_of_harness_goes_on_without_it(harness: Path) -> None:
    (harness / "lm_eval" / "models" / "__init__.py").write_text("")
    (harness / "lm_eval" / "api" / "registry.py").write_text("MODELS = {}\n")
    (harness / "lm_eval" / "__main__.py").write_text("import lm_eval.models\nprint('goes on')\n")
    ran = start(harness, "-m", "lm_eval")
    assert (ran.returncode, ran.stdout) == (0, "goes on\n")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.endswith("use attnrb lm-eval\n")


@installed
def test_without_a_harness_nothing_happens(tmp_path: Path) -> None:
    ran = start(tmp_path, "-S", "-c", "pass", "lm_eval")
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = start(tmp_path, "-c", "import importlib.util; print(importlib.util.find_spec('no_such_package'))", "lm_eval")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "None\n", "")


def test_pip_knows_both_files_and_removes_them() -> None:
    names = {file.name for file in importlib.metadata.files("attnrb") or () if "/" not in str(file)}
    if not names:
        pytest.skip("attnrb is on the path without being installed")
    assert {"_attnrb_lm_eval.pth", "_attnrb_lm_eval.py"} <= names


@installed
def test_the_real_command(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    save_roomy_model(tmp_path / "model")
    save_task(tmp_path / "tasks")
    program = Path(sys.executable).with_name("lm_eval")
    arguments = f"--model attnrb --model_args pretrained=model,alpha=0.2,layers=1-2 --include_path {tmp_path / 'tasks'}"
    command = [program, *arguments.split(), "--tasks", "colours", "--output_path", "out.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text("utf-8"))
    assert found["config"]["model"] == "attnrb"
    assert found["n-samples"]["colours"]["effective"] == 6
    assert 0 <= found["results"]["colours"]["acc,none"] <= 1
