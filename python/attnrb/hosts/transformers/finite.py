"""Numbers of a model that are none: said in one sentence, wherever they show."""

from __future__ import annotations

from typing import NoReturn

import torch

__all__ = ["check_numbers", "refuse"]


def refuse(where: str = "") -> NoReturn:
    """Raise ValueError: the logits of a model are not finite.

    Args:
        where: after what, for the sentence.
    """
    raise ValueError(
        f"model: its logits are not finite{where}: its weights are damaged, or its activations exceed the range of the "
        "dtype; try dtype float32 or bfloat16 (--dtype)"
    )


def check_numbers(found: torch.Tensor) -> None:
    """Refuse log-likelihoods and the like that hold NaN: a comparison with one is false, and nobody would notice."""
    if bool(found.detach().isnan().any()):
        refuse()
