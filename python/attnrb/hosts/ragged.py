"""Ragged batches, in which the queries of many texts follow each other: what hosts that run them have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnrb.policies.base import LayerView

__all__ = ["BatchView"]


class BatchView(LayerView):
    """What a session may see that serves many texts at once: which layer, how many heads and rows, and where.

    Args:
        layer: which layer.
        query: ``[T, H, D]``.
        key: of whatever shape the host keeps keys in.
        rows: B, the texts of the batch.
    """

    __slots__ = ("_rows",)

    def __init__(self, layer: int, query: Tensor, key: Tensor, rows: int) -> None:
        super().__init__(layer, query, key, _no_scores, query.shape[1], query.device)
        self._rows = rows

    @property
    def rows(self) -> int:
        """B."""
        return self._rows


def _no_scores() -> Mapping[str, Any]:
    raise RuntimeError("a policy whose plan says that it reads no keys looked at them: give its plan reads_keys=True")
