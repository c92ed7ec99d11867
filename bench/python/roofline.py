"""What this machine can do at most, by PyTorch's own measure: matrix products and plain reading, same threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import interleaved


def products(dtype: torch.dtype, *, size: int = 2048, seconds: float = 0.5) -> float:
    """GFLOP/s of torch.mm on square matrices, large enough to be bound by arithmetic.

    At the dtype given or at float32, whichever is faster: without matrix units a half-precision product may lose to
    the one that a kernel can always widen to.
    """
    a = torch.randn(size, size)
    b = a.to(dtype)
    contenders = {"at dtype": lambda: torch.mm(b, b), "at float32": lambda: torch.mm(a, a)}
    times = interleaved(contenders, seconds=seconds)
    return 2.0 * size**3 / min(taken.fastest for taken in times.values()) / 1e9


def product_probe(dtype: torch.dtype, size: int = 384) -> Callable[[], object]:
    """A short matrix product, on the unit that serves this dtype: how fast that is just now."""
    a = torch.randn(size, size).to(dtype)
    return lambda: torch.mm(a, a)


def reading(size: int, *, seconds: float = 0.5) -> float:
    """GB/s of reading so many bytes once.

    Reductions read each byte once and write nothing. Which of them keeps the memory busiest depends on how PyTorch was
    built, so several run and the fastest counts: all are lower bounds of what the memory gives.
    """
    floats = torch.randn(max(size // 4, 1))
    words = floats.view(torch.int32)
    times = interleaved(
        {
            "sum": floats.sum,
            "dot": lambda: torch.dot(floats, floats),
            "norm": floats.norm,
            "amax": floats.amax,
            "integer sum": words.sum,
        },
        seconds=seconds,
    )
    return floats.nbytes / min(taken.fastest for taken in times.values()) / 1e9
