"""What one layer's attention looks like under any edit: from its weights as applied, a few rows at a time.

`attnrb.analysis.measure` knows what a gain on the source layer's outliers does to every sum, and needs no weights. What
other policies do (a bias on keys, lists of their own, shares) is measured here, from the definitions, in time that
grows with n² · H and memory that grows with n.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnrb.analysis.measure import Entries, LayerSums, seen_by
from attnrb.analysis.rows import LayerKeys
from attnrb.hosts.session import AttentionCall
from attnrb.text.classes import TOKEN_CLASSES

__all__ = ["measure_weights"]

_WEIGHTS = 1 << 22  # in memory at a time


def measure_weights(
    call: AttentionCall, classes: Tensor, threshold: float, source: Entries | None, is_source: bool
) -> tuple[LayerSums, Entries]:
    """As `attnrb.analysis.measure.measure`."""
    length, heads = call.query.shape[2], call.query.shape[1]
    device = call.query.device
    kept = LayerKeys.of(call, torch.arange(length, dtype=torch.int64, device="cpu"))
    one_hot = torch.zeros(length, len(TOKEN_CLASSES), dtype=torch.float64, device=device)
    one_hot[torch.arange(length, device=device), classes.to(device)] = 1
    slots = torch.arange(length, device=device)
    entropy, first, distance, on_source = (
        torch.zeros(heads, length, dtype=torch.float64, device=device) for _ in range(4)
    )
    by_class = torch.zeros(heads, len(TOKEN_CLASSES), dtype=torch.float64, device=device)
    column = torch.zeros(heads, length, dtype=torch.float64, device=device)
    found: list[Tensor] = []
    step = max(1, _WEIGHTS // (heads * length))
    for start in range(0, length, step):
        rows = slots[start : start + step]
        weights = kept.weights(rows).double()
        shares = weights / weights.sum(2, keepdim=True)
        entropy[:, rows] = -torch.special.xlogy(shares, shares).sum(2)
        first[:, rows] = shares[..., 0]
        distance[:, rows] = rows - shares @ slots.double()
        by_class += (shares @ one_hot).sum(1)
        column += weights.sum(1)
        own = (weights > threshold) & (slots != rows[:, None])
        places = own.nonzero()
        places[:, 1] += start
        found.append(places)
        if is_source:
            on_source[:, rows] = torch.where(own, shares, 0.0).sum(2)
        elif source is not None:
            mine = (source.query >= start) & (source.query < start + step) & (source.head < heads)
            head, query, key = source.at(mine).to(device)
            on_source[:, rows] = on_source[:, rows].index_put(
                (head, query - start), shares[head, query - start, key], accumulate=True
            )
    places = torch.cat(found)
    order = (places[:, 0] * length + places[:, 1]).argsort(stable=True)
    entries = Entries(*places[order].unbind(1))
    looked = on_source if is_source or source is not None else torch.full_like(on_source, torch.nan)

    def array(values: Tensor) -> np.ndarray:
        return np.asarray(values.cpu().numpy())

    return (
        LayerSums(
            queries=length,
            entropy=array(entropy.sum(1)),
            first_key=array(first[:, 1:].sum(1)),
            mean_distance=array(distance.sum(1)),
            outlier_share=array(looked.sum(1)),
            token_class=array(by_class.T),
            outliers=array(torch.bincount(entries.head, minlength=heads).double()),
            received=array(column / seen_by(call)),
            share=array(column / column.sum(1, keepdim=True)),
            on_source=array(looked.mean(0)),
        ),
        entries,
    )
