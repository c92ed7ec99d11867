"""Where the tests find a kernel of PyTorch's under an op of attnrb (docs/cuda.md, "Whose kernel computes what")."""

from __future__ import annotations

import os

import torch
from torch import Tensor

EMULATED = "ATTNRB_TEST_EMULATED_CUDA" in os.environ
ON_CUDA = EMULATED or os.environ.get("ATTNRB_TEST_DEVICE") == "cuda"


def computes(dtype: torch.dtype, queries: int, keys: int, *, plainly_causal: bool) -> bool:
    """Whether one computes the dense part of such a case, of aligned rows and a width that it takes."""
    return ON_CUDA and dtype != torch.float32 and queries == keys and queries >= 64 and plainly_causal


def emulated_lse(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The log-sum-exp of the kernel that stands in the place of a GPU's; causal, as many queries as keys."""
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)[1]
    assert isinstance(lse, Tensor)
    return lse
