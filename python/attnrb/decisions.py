"""Decisions that cost speed or memory, told in one line each at level INFO to the logger ``attnrb``.

    import logging
    logging.basicConfig(level=logging.INFO)      # or of attnrb alone: logging.getLogger("attnrb").setLevel(...)

A program that asks for nothing sees nothing. The same line is told once in a process, since layers decide alike, and
so does every token. Nothing is told from within a compiled graph; what is decided while it is traced is.
"""

from __future__ import annotations

import logging
from typing import Final

__all__ = ["DECISIONS", "forget", "tell"]

_log = logging.getLogger("attnrb")
_log.addHandler(logging.NullHandler())

# Of each decision, what the line says before its reason. docs/logging.md explains them; a test compares the two.
DECISIONS: Final = {
    "cast": "operands are copied to another dtype",
    "conversion": "weights are converted on loading",
    "dense": "plain PyTorch computes in place of a native op, for memory of all weights of a block of queries",
    "dense_gradient": "the backward pass of such a call computes its weights again, or keeps all of them",
    "gathered": "keys and values are copied out of their blocks, and each sequence has a call of its own",
    "general_mask": "a mask of all queries and keys is built, whose memory grows with both",
    "no_cuda_ops": "CUDA tensors are computed by plain PyTorch",
    "outliers_kept": "outliers are kept from one layer to those above it",
    "own_kernels": "attnrb's own kernels compute the dense part of long prompts on CUDA",
    "parts": "attention is computed several times a layer",
    "text_kept": "something of each text is kept from one forward to the next",
    "weights": "weights [B, H, M, N] are computed in a second pass and returned",
}

_MOST = 4096  # lines that are remembered
_told: set[tuple[str, str]] = set()


def tell(decision: str, reason: str) -> None:
    """Tell of one decision, unless the same line was told before.

    Args:
        decision: one of `DECISIONS`.
        reason: why, as part of a sentence; it holds no number that changes from call to call.
    """
    import torch

    if torch.compiler.is_dynamo_compiling() or (decision, reason) in _told:
        return
    if _log.isEnabledFor(logging.INFO):
        if len(_told) < _MOST:
            _told.add((decision, reason))
        _log.info("%s: %s, because %s", decision, DECISIONS[decision], reason)


def forget() -> None:
    """Tell everything again from now on, as in a new process."""
    _told.clear()
