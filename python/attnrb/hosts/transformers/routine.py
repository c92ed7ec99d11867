"""Layers that have nothing special about them: the short way from a model's attention to the native ops.

Note: [Layers alike]
For one decoded token the kernel of a layer takes some microseconds, and finding out in Python what to tell it takes as
long: dtype, device, number of heads, what the mask means. All that is the same in nearly every layer of a forward, so
the first layer with a mask keeps what it found, and those after it only make sure that they are alike. What is left
costs several times what a loop over it would measure, since a model's weights pass through the processor's caches in
every step and leave nothing of this program there.

Whoever wants more than the output (gradients, casts, weights, an observer) takes the long way, in attnrb.attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from attnrb.ops.operands import NATIVE_DTYPES
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import visibility_arguments

if TYPE_CHECKING:
    from attnrb.hosts.transformers.attention import Forward
    from attnrb.hosts.transformers.masks import Geometry

__all__ = ["Routine"]

_source_attention = torch.ops.attnrb.source_attention.default
_rebalanced_attention = torch.ops.attnrb.rebalanced_attention.default


@dataclass(slots=True)
class Routine:
    """What the layers of one forward that share a mask have in common: see `Note: [Layers alike]`."""

    mask: torch.Tensor  # kept alive: its id is what a routine is found by
    geometry: Geometry
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    device_type: str
    visibility: tuple[Any, ...]

    @staticmethod
    def of(forward: Forward, mask: torch.Tensor, geometry: Geometry, query: torch.Tensor) -> Routine | None:
        """The routine for layers with this mask and such queries; None: they need the long way.

        Args:
            forward: the forward they belong to.
            mask: what masks.py made.
            geometry: what it means.
            query: ``[B, H, M, D]``.
        """
        shape, dtype, device = query.shape, query.dtype, query.device
        heads = shape[1] == forward.plan.local_heads or shape[1] == forward.plan.heads
        if not heads or dtype not in NATIVE_DTYPES:
            return None
        geometry = geometry.on(device)
        visibility = visibility_arguments(geometry.visibility, shape[2], 0)
        routine = Routine(mask, geometry, shape, dtype, device, device.type, visibility.for_older_ops())
        return routine if routine.serves(query) and not visibility.beyond_older_ops else None

    def serves(self, query: torch.Tensor) -> bool:
        """Whether a layer with this query is alike, and neither gradients nor casts are asked for."""
        return (
            query.shape == self.shape
            and query.dtype is self.dtype
            and query.device == self.device
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(self.device_type)
        )

    def attention(
        self,
        forward: Forward,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output ``[B, H, M, Dv]`` of a layer: it finds the outliers, or uses them, or stays as it is."""
        plan = forward.plan
        if layer == plan.source_layer:
            output, _, indices, counts = _source_attention(
                query, key, value, plan.threshold, *self.visibility, scale, softcap or 0.0, sinks
            )
            forward.found(Outliers(indices, counts), self.geometry.tokens)
        else:
            gain = plan.gain(layer, self.shape[1], self.device)
            outliers, gain = plan.nothing(query) if gain is None else (forward.outliers_for(layer, self.device), gain)
            output = _rebalanced_attention(
                query, key, value, *outliers, gain, plan.normalize, *self.visibility, scale, softcap or 0.0, sinks
            )
        forward.called.add(layer)
        return cast(torch.Tensor, output)
