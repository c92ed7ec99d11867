"""Gradient checkpointing: layers run again in the backward, where the model must be patched still.

A layer that runs again is told which forward it belongs to as it was the first time, and computes the same. In a model
whose patch was removed meanwhile it would ask for PyTorch's own attention instead, and the gradients would be those of
another function.
"""

from __future__ import annotations

from typing import Any

import torch

from attnrb.hosts.transformers.decoder import patch_of
from attnrb.hosts.transformers.interface import attribute, every_module

__all__ = ["expect_backward"]


def expect_backward(decoder: torch.nn.Module, output: Any) -> None:
    """Refuse a backward through a forward with checkpoints once the patch is gone.

    Args:
        decoder: a patched decoder.
        output: what its forward returned.
    """
    if not (decoder.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    node = getattr(hidden, "grad_fn", None)
    if node is None or not any(attribute(each, "gradient_checkpointing") for each in every_module(decoder)):
        return

    def check(_: Any) -> None:
        if patch_of(decoder) is None:
            raise RuntimeError(
                "the patch was removed before the backward of a forward with gradient checkpointing, which runs the "
                "layers again: call backward while the model is patched"
            )

    node.register_prehook(check)
