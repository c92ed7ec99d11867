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


def prepared(folder: Path, name: str) -> Path:
    """A folder with a model and what one process computes with it."""
    folder.mkdir()
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
    return folder


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What two processes of torchrun say of every way that starts so: they take longer to start than to compute."""
    root = tmp_path_factory.mktemp("torchrun")
    ways = {"llama": ("tensor", "sharded"), "gemma3_text": ("tensor",)}
    folders = {name: prepared(root / name, name) for name in ways}
    asked = [(way, folders[name]) for name in ways for way in ways[name]]
    ran = launch(TORCHRUN, WORKER, *(part for pair in asked for part in pair))
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.splitlines()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_tensor_parallel(name: str, torchrun: list[str]) -> None:
    assert torchrun.count(f"ok tensor {name}") == 2


def test_fully_sharded(torchrun: list[str]) -> None:
    assert torchrun.count("ok sharded llama") == 2


def test_data_parallel(tmp_path: Path) -> None:
    ran = launch(ACCELERATE, WORKER, "data", prepared(tmp_path / "llama", "llama"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("ok data llama") == 2, ran.stdout
