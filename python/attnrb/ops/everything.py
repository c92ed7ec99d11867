"""What a gain does where no outliers are named and every visible key is one: no kernel's matter."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["strengthened"]


def strengthened(lse: Tensor, gain: Tensor, rule: str, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the rules of Note: [Edited attention] come to where every visible key is an outlier.

    The rest of a row is its sink, so that m is 1 less the sink's share.

    Args:
        lse: of the plain rows.
        gain: of each row, broadcastable to ``lse``.
        rule: none, row or rest.
        sinks: likewise.

    Returns:
        What each row of the output is multiplied by, and the log-sum-exp.
    """
    more = 1 + gain
    share = torch.zeros_like(lse)
    if sinks is not None:
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.to(lse.dtype) - lse))
    factor = more.expand_as(lse)
    if rule == "row":
        total = share + more * (1 - share)
        factor = torch.where(total == 0, 0.0, more / total)
        lse = lse + torch.log(total)
    elif rule == "rest":
        factor = torch.where(share == 0, 1.0, more)
    return factor, lse
