"""One of several processes of a patched model; `test_patch_processes.py` starts it under torchrun or accelerate.

    process_worker.py WAY FOLDER [WAY FOLDER ...]

FOLDER has the model, ``ids.pt`` and ``expected.pt`` (what one process gave). Exit code 0 and ``ok WAY NAME`` on every
rank mean that everything was equal. Several ways run one after the other, so that the processes start once.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attnrb
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

CONFIG = attnrb.RebalanceConfig(alpha=0.5, threshold=0.05, heads={1: [0, 3], 2: [0, 1, 2, 3], 3: [1, 2]})
ROUNDING = 1e-4

SPANS = attnrb.Spans(((attnrb.Span(2, 5), attnrb.Span(6, 7, 3.0)), (attnrb.Span(4, 6),)))
# Heads that lie on both ranks, on one of two, and on none.
HEADS = {0: (1, 2), 1: (0,), 3: (0, 1, 3)}


def emphases(model: Any) -> list[attnrb.Policy]:
    """Emphasis whose heads differ: one bias for all, chosen heads, a least share, strengths that differ by head."""
    learned = attnrb.LearnedEmphasis(attnrb.policies.model_shape(model), attnrb.Emphasis(rows="all"))
    with torch.no_grad():
        learned.gains.normal_(1.0, 1.0, generator=torch.Generator().manual_seed(3))
    return [
        attnrb.Emphasis(strength=8.0),
        attnrb.Emphasis(strength=8.0, heads=HEADS, outside=0.3),
        attnrb.Emphasis(share=0.5, heads=HEADS),
        learned.requires_grad_(False),
    ]


def emphasised(model: Any, ids: torch.Tensor, policy: attnrb.Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and greedy text behind the batch."""
    marked = attnrb.Marked({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, SPANS)
    with torch.no_grad(), attnrb.patch(model, policy) as patched:
        with patched.spans(SPANS):
            logits = model(ids).logits
        return logits, patched.generate(marked, max_new_tokens=4, do_sample=False)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


class Communication(TorchDispatchMode):
    """Counts the collective operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


def tensor_parallel(folder: Path, ids: torch.Tensor, expected: dict[str, Any]) -> None:
    """Heads are split between the ranks: each keeps its own outliers, and nothing more is sent than without a patch."""
    model = split_model(folder)
    with torch.no_grad():
        with Communication() as plain:
            model(ids)
        with attnrb.patch(model, CONFIG) as patched, Communication() as rebalanced:
            logits = model(ids).logits
    assert plain.calls, "the model was not split"
    assert rebalanced.calls == plain.calls, (rebalanced.calls, plain.calls)
    assert_close(logits, expected["logits"])
    # This rank searched only the rows of its own heads.
    assert patched.stats.rows * dist.get_world_size() == expected["rows"], patched.stats
    with attnrb.patch(model, CONFIG):
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.tolist() == expected["text"].tolist()
    for policy, (logits, text) in zip(emphases(model), expected["emphasised"], strict=True):
        mine, written = emphasised(model, ids, policy)
        assert_close(mine, logits)
        assert written.tolist() == text.tolist()


def split_model(folder: Path) -> Any:
    try:
        from transformers.distributed import DistributedConfig

        options: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")}
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except (ImportError, TypeError):  # before transformers 5.10 or so
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


def data_parallel(folder: Path, ids: torch.Tensor, expected: dict[str, Any]) -> None:
    """Each process takes some of the prompts; together they write what one process wrote."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = accelerator.prepare_model(AutoModelForCausalLM.from_pretrained(folder).eval(), evaluation_mode=True)
    inner = accelerator.unwrap_model(model)
    with attnrb.patch(model, CONFIG), accelerator.split_between_processes(ids) as mine, torch.no_grad():
        text = inner.generate(mine, max_new_tokens=8, do_sample=False)
        logits = model(mine).logits
    assert accelerator.gather(text).tolist() == expected["text"].tolist()
    assert_close(accelerator.gather(logits.contiguous()), expected["logits"])


def fully_sharded(folder: Path, ids: torch.Tensor, expected: dict[str, Any]) -> None:
    """Parameters are split between the ranks and gathered layer by layer; patched before or after that."""
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for before in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        patched = attnrb.patch(model, CONFIG) if before else None
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        with torch.no_grad(), patched or attnrb.patch(model, CONFIG):
            assert_close(model(ids).logits, expected["logits"])


@contextmanager
def process_group() -> Any:
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


WAYS = {"tensor": tensor_parallel, "data": data_parallel, "sharded": fully_sharded}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        for way, folder in zip(sys.argv[1::2], map(Path, sys.argv[2::2]), strict=True):
            WAYS[way](folder, torch.load(folder / "ids.pt"), torch.load(folder / "expected.pt"))
            sys.stdout.write(f"ok {way} {folder.name}\n")  # at once: the other rank writes to the same pipe
            sys.stdout.flush()
