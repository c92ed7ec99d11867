"""Two gloo processes on this machine train one patched model on half a batch each; run by test_training_patch.py.

python train_two_processes.py STORE
"""

from __future__ import annotations

import sys
from typing import Any

import attnrb
import torch
import torch.multiprocessing
from test_training_patch import CONFIG, gradients, trainable
from tiny_models import tokens
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def loss_of(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch, labels=batch, use_cache=False).loss
    return loss


def wrapped(kind: str, model: Any) -> Any:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    batch, alone = tokens(4, 20), trainable()
    with attnrb.patch(alone, CONFIG):
        expected = gradients(alone, batch)
    for kind in ("ddp", "fsdp"):
        model = trainable()
        with attnrb.patch(model, CONFIG) as patched:
            spread = wrapped(kind, model)
            for _ in range(2):  # accumulate nothing, but go round twice: hooks must come off and on
                spread.zero_grad()
                loss_of(spread, batch[2 * rank : 2 * rank + 2]).backward()
        assert patched.stats.outliers > 0
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            if hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, k=kind, n=name: f"{k}, {n}: {m}"
            )
        distributed.barrier()
        if rank == 0:
            print(f"{kind}: gradients agree", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, they have what was imported, which takes longer than the training.
    torch.multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
