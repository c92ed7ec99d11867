"""Patched models in two processes on the CPU: what they compute together is what one process computes."""

from __future__ import annotations

from pathlib import Path

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from launchers import ACCELERATE, TORCHRUN, launch
from process_worker import CONFIG, emphases, emphasised
from tiny_models import tiny, tokens

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("process_worker.py")


def in_two_processes(launcher: list[str], way: str, folder: Path, name: str) -> None:
    model, ids = tiny(name), tokens(2, 12)
    model.save_pretrained(folder)
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        logits = model(ids).logits
    with attnrb.patch(model, CONFIG):
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
    torch.save(ids, folder / "ids.pt")
    marked = [emphasised(model, ids, policy) for policy in emphases(model)]
    assert all((each - logits).abs().max() > 1e-2 for each, _ in marked)
    expected = {"logits": logits, "rows": patched.stats.rows, "text": text, "emphasised": marked}
    torch.save(expected, folder / "expected.pt")

    ran = launch(launcher, WORKER, way, folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("ok") == 2, ran.stdout


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_tensor_parallel(tmp_path: Path, name: str) -> None:
    in_two_processes(TORCHRUN, "tensor", tmp_path, name)


def test_data_parallel(tmp_path: Path) -> None:
    in_two_processes(ACCELERATE, "data", tmp_path, "llama")


def test_fully_sharded(tmp_path: Path) -> None:
    in_two_processes(TORCHRUN, "sharded", tmp_path, "llama")
