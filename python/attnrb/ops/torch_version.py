"""Which PyTorch this is, where its versions differ."""

from __future__ import annotations

import torch

__all__ = ["TORCH_VERSION"]

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
"""Major and minor."""
