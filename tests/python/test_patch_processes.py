"""Patched models in two processes on the CPU: what they compute together is what one process computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from process_worker import CONFIG
from tiny_models import tiny, tokens

WORKER = Path(__file__).with_name("process_worker.py")
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NEUTRAL = ["--mixed_precision=no", "--dynamo_backend=no"]
# Named for GPUs, it is the launcher of several processes on one machine; the worker asks for the CPU.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", *NEUTRAL]


def in_two_processes(launcher: list[str], way: str, folder: Path, name: str) -> None:
    model, ids = tiny(name), tokens(2, 12)
    model.save_pretrained(folder)
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        logits = model(ids).logits
    with attnrb.patch(model, CONFIG):
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
    torch.save(ids, folder / "ids.pt")
    torch.save({"logits": logits, "rows": patched.stats.rows, "text": text}, folder / "expected.pt")

    # A launcher left over from another run would hand its own ranks down.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    port = ["--main_process_port=0"] if launcher is ACCELERATE else []
    ran = subprocess.run(
        [sys.executable, "-m", *launcher, *port, str(WORKER), way, str(folder)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("ok") == 2, ran.stdout


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_tensor_parallel(tmp_path: Path, name: str) -> None:
    in_two_processes(TORCHRUN, "tensor", tmp_path, name)


def test_data_parallel(tmp_path: Path) -> None:
    in_two_processes(ACCELERATE, "data", tmp_path, "llama")


def test_fully_sharded(tmp_path: Path) -> None:
    in_two_processes(TORCHRUN, "sharded", tmp_path, "llama")
