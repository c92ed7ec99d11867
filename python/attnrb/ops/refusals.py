"""The native ops as the functions of this package call them: what an op refuses is a ValueError, under every torch.

An op refuses an argument by ``std::invalid_argument``. torch 2.10 and 2.13 make a ValueError of it in Python. torch
2.15 passes the sentence on, but not its type: those who call ``torch.ops.attnrb.*`` by name get a RuntimeError. What
the torch at hand does is tried out once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["REFUSAL", "native_op"]

# The name of an argument, and what was expected: "query: expected 4 dimensions [B, H, M, D], got 3". What fails for
# another reason begins with "attnrb: ", and stays a RuntimeError.
_SENTENCE = re.compile(r"(?!attnrb: )\w+: ")


def _type_of_refusals() -> type[Exception]:
    try:
        torch.ops.attnrb.outlier_mask(torch.zeros(1, 1, 1, 1, dtype=torch.float32, device="cpu"), 2.0, 0)
    except (RuntimeError, ValueError) as refused:
        return type(refused)
    return ValueError


REFUSAL = _type_of_refusals()
"""What ``torch.ops.attnrb.*`` raise here where they refuse an argument."""


def native_op(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op whose refusals are ValueErrors; the op itself where they are anyway."""
    if REFUSAL is ValueError:
        return op

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return op(*arguments, **keywords)
        except REFUSAL as error:
            if type(error) is REFUSAL and _SENTENCE.match(str(error)):
                raise ValueError(str(error)) from None
            raise

    return call
