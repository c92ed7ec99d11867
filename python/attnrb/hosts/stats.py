"""What a patch did, counted as it runs."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch

from attnrb.decisions import tell

__all__ = ["PatchStats", "warn_of_general_mask"]

# Counts are kept as the ops return them and added up when someone asks, or when this many rows are waiting: adding up
# at once would cost a few operations in every forward, and on an accelerator a wait.
_MOST_ROWS_WAITING = 1 << 20
_MOST_FORWARDS_WAITING = 256


class PatchStats:
    """What a patch did so far. A row is one query in one head of the source layer; padding does not count.

    With ``boost_all`` no outliers are looked for, so there are no rows either.
    """

    def __init__(self) -> None:
        self._forwards = 0
        self._layers: set[int] = set()
        self._rows = self._outliers = self._most = 0
        self._general_masks = 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._rows_waiting = 0
        self._lock = threading.RLock()  # threads may run one patched model at once

    def reset(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self._forwards = self._rows = self._outliers = self._most = self._general_masks = self._rows_waiting = 0
            self._layers.clear()
            self._waiting.clear()

    @property
    def forwards(self) -> int:
        """How many forwards of the model completed."""
        return self._forwards

    @property
    def rebalanced_layers(self) -> tuple[int, ...]:
        """The layers that were re-balanced, ascending."""
        return tuple(sorted(self._layers))

    @property
    def layers(self) -> int:
        """How many layers were re-balanced."""
        return len(self._layers)

    @property
    def general_masks(self) -> int:
        """How many masks ``[B, 1, M, N]`` were built: one for each kind of attention and forward that needs one.

        Everything else that attnrb keeps grows with the number of queries or of keys, and such a mask with both. Masks
        of four dimensions that the user passes do not count.
        """
        return self._general_masks

    @property
    def rows(self) -> int:
        """How many rows were searched for outliers."""
        self._add_up()
        return self._rows

    @property
    def outliers(self) -> int:
        """How many outliers were found in all."""
        self._add_up()
        return self._outliers

    @property
    def outliers_per_row(self) -> float:
        """How many outliers a row has on average; 0.0 when there was no row."""
        return self.outliers / self.rows if self.rows else 0.0

    @property
    def max_outliers_per_row(self) -> int:
        """How many outliers the fullest row has."""
        self._add_up()
        return self._most

    def to_dict(self) -> dict[str, Any]:
        """Every figure, JSON-ready."""
        return {
            "forwards": self.forwards,
            "rebalanced_layers": list(self.rebalanced_layers),
            "general_masks": self.general_masks,
            "rows": self.rows,
            "outliers": self.outliers,
            "outliers_per_row": self.outliers_per_row,
            "max_outliers_per_row": self.max_outliers_per_row,
        }

    def __repr__(self) -> str:
        return (
            f"PatchStats(forwards={self.forwards}, layers={self.layers}, rows={self.rows}, "
            f"outliers_per_row={self.outliers_per_row:.2f}, max_outliers_per_row={self.max_outliers_per_row})"
        )

    def add_counts(self, counts: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Note the outliers of one forward.

        Args:
            counts: int32 ``[B, H, M]``: outliers of each row.
            tokens: bool ``[B, M]``: which queries are tokens rather than padding; None: all.
        """
        if counts.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph counts nothing
        with self._lock:
            self._waiting.append((counts, tokens))
            self._rows_waiting += counts.numel()
            if self._rows_waiting > _MOST_ROWS_WAITING or len(self._waiting) >= _MOST_FORWARDS_WAITING:
                self._add_up()

    def add_forward(self, rebalanced_layers: set[int]) -> None:
        """Note that a forward completed, and which layers it re-balanced."""
        with self._lock:
            self._forwards += 1
            self._layers |= rebalanced_layers

    def add_general_mask(self, reason: str) -> None:
        """Note that a mask of all queries and keys is built, and say so the first time.

        Args:
            reason: why, as part of a sentence.
        """
        with self._lock:
            self._general_masks += 1
            first = self._general_masks == 1
        if first:
            warn_of_general_mask(reason)

    def _add_up(self) -> None:
        with self._lock:
            self._add_up_waiting()

    def _add_up_waiting(self) -> None:
        if not self._waiting:
            return
        rows = [
            (counts if tokens is None else counts.transpose(1, 2)[tokens]).flatten() for counts, tokens in self._waiting
        ]
        self._waiting, self._rows_waiting = [], 0
        # To one device: the layers of a model, and so of two forwards, may be on several.
        together = torch.cat([row.to(rows[0].device) for row in rows])
        if together.numel():
            self._rows += together.numel()
            self._outliers += int(together.sum())
            self._most = max(self._most, int(together.max()))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_of_general_mask(reason: str) -> None:
    """Say that a mask of all queries and keys is built, to users and to the log ``attnrb``.

    Args:
        reason: why, as part of a sentence.
    """
    message = (
        f"attnrb builds a mask of all queries and keys, whose memory grows with both, because {reason}; results are "
        "right, and PatchStats.general_masks counts such masks"
    )
    tell("general_mask", reason)
    warnings.warn(message, stacklevel=2)
