"""What `attnrb.analysis` measures, computed the slow and obvious way from n×n weights in NumPy float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attnrb.analysis import TOKEN_CLASSES
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def dense_measures(
    weights: dict[int, Floats],
    outliers: dict[int, NDArray[np.bool_]],
    seen: dict[int, NDArray[np.bool_]],
    classes: Sequence[str],
    source_layer: int,
) -> dict[str, Floats]:
    """Every measure of one text, ``[L, H]`` or for ``received`` ``[L, H, n]``.

    Args:
        weights: for each layer the weights that it applies, ``[H, n, n]``; rows need not sum to 1.
        outliers: for each layer its own outliers, likewise.
        seen: for each layer which keys each query sees, ``[n, n]``.
        classes: of each token.
        source_layer: the layer whose outliers are compared with.
    """
    n = len(classes)
    position = np.arange(n)
    names = ["received", "entropy", "first_key", "mean_distance", "outliers_per_row", "outlier_overlap"]
    result: dict[str, list[Floats]] = {name: [] for name in [*names, "outlier_share", *TOKEN_CLASSES]}
    for layer, w in sorted(weights.items()):
        p = w / w.sum(2, keepdims=True)
        result["received"].append(w.sum(1) / seen[layer].sum(0))
        result["entropy"].append(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(2).mean(1))
        result["first_key"].append(p[:, 1:, 0].mean(1))
        result["mean_distance"].append((p * (position[:, None] - position[None, :])).sum(2).mean(1))
        own, source = outliers[layer], outliers[source_layer]
        result["outliers_per_row"].append(own.sum((1, 2)) / n)
        result["outlier_overlap"].append((own & source).sum((1, 2)) / (own | source).sum((1, 2)))
        result["outlier_share"].append((p * source).sum(2).mean(1))
        for name in TOKEN_CLASSES:
            result[name].append(p[:, :, [each == name for each in classes]].sum(2).mean(1))
    return {name: np.stack(rows) for name, rows in result.items()}
