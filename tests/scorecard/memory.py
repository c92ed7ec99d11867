"""Memory above the operands against the length, and the exponent of its growth.

    python tests/scorecard/memory.py

Each length runs in a process of its own, on one thread: the peak of the resident set (Linux) while the call runs, less
what there was before it. The exponent is the slope of a line through the logarithms: 1 is linear, 2 would be a matrix
of all queries and keys.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from row import Tally, run

_BAR = 1.1
_DOUBLINGS = 3
HEADS, KEY_HEADS, WIDTH = 8, 2, 64


def _prefill(torch: Any, functional: Any, tensors: list[Any]) -> object:
    found = functional.source_attention(*tensors)
    return found, functional.rebalanced_attention(*tensors, found[2], 0.1, normalize=True)


def _edited(torch: Any, functional: Any, tensors: list[Any]) -> object:
    from attnrb import Edit

    bias = torch.zeros(1, 1, tensors[1].shape[2])
    return functional.attention(*tensors, edit=Edit(key_bias=bias), emit=0.01)


def _received(torch: Any, functional: Any, tensors: list[Any]) -> object:
    return functional.received_attention(*tensors[:2])


def _training(torch: Any, functional: Any, tensors: list[Any]) -> object:
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output, _, outliers = functional.source_attention(*tensors)
    below = functional.rebalanced_attention(*tensors, outliers, 0.1)
    return torch.autograd.grad((output.float().sum() + below.float().sum()), tensors)


CALLS = {"re-balancing": _prefill, "key bias": _edited, "received attention": _received, "training": _training}


def peak(name: str, keys: int) -> int:
    """Bytes above the operands, in this very process, which must not have done anything else."""
    import torch
    from attnrb import functional

    torch.set_num_threads(1)

    def operands(count: int) -> list[torch.Tensor]:
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        return [torch.empty(1, each, count, WIDTH, dtype=torch.bfloat16).normal_() for each in heads]

    # Code and libraries come in with a first call, whatever the length.
    CALLS[name](torch, functional, operands(8))
    tensors = operands(keys)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    kept = CALLS[name](torch, functional, tensors)
    found = _resident("VmHWM") - before
    del kept
    return found


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def exponent(lengths: list[int], peaks: list[int]) -> float:
    """Least-squares slope of log peak over log length."""
    x, y = [math.log(n) for n in lengths], [math.log(max(p, 1)) for p in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def work(tally: Tally) -> None:
    """Measure every call at every length."""
    lengths = [tally.options.shortest << doubling for doubling in range(_DOUBLINGS + 1)]
    for name in list(CALLS)[: tally.count]:
        peaks = []
        for keys in lengths:
            command = [sys.executable, __file__, "--peak", name, str(keys)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if ran.returncode:
                tally.fault(f"{name}, {keys} keys: {ran.stderr[-300:]}")
                return
            peaks.append(int(ran.stdout))
            tally.counts["measurements"] += 1
            tally.counts[f"{name}: KiB above the operands at {keys:,} keys"] = peaks[-1] // 1024
        found = exponent(lengths, peaks)
        tally.see(f"{name}: exponent", found)
        if found > _BAR and tally.options.shortest >= 1024:  # below, a page of memory is a large part
            tally.fault(f"{name}: memory grows with the power {found:.2f} of the length")


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print(peak(sys.argv[-2], int(sys.argv[-1])))
    else:
        sys.exit(run("memory", __doc__, work, count=len(CALLS), shortest=2048))
