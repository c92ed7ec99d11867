"""The attention function of patched models: what transformers calls in place of its own, once in every layer.

It is told which forward it belongs to by a keyword argument that the patch adds to the model's call and that the model
hands down to its layers, so two forwards never share outliers, whatever threads they run in. A model that drops the
argument on the way is served all the same, by the forward that runs in this thread (`current_forward`).

Note: [Layers alike]
For one decoded token the kernel of a layer takes some microseconds, and finding out in Python what to tell it takes as
long: dtype, device, number of heads, what the mask means. All that is the same in nearly every layer of a forward, so
the first layer with a mask keeps what it found (`Common`), and those after it only make sure that they are alike. What
is left costs several times what a loop over it would measure, since a model's weights pass through the processor's
caches in every step and leave nothing of this program there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnrb.hosts.session import AttentionCall, Forward, current_forward
from attnrb.ops.attention import attend, attention_weights
from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.policies.base import LayerView

if TYPE_CHECKING:
    from attnrb.hosts.transformers.geometry import Geometry

__all__ = ["FORWARD", "GEOMETRY", "Common", "attention"]

# The keyword argument that carries the `Forward`, and the attribute that carries a mask's geometry (see masks.py).
FORWARD = "attnrb_forward"
GEOMETRY = "_attnrb_geometry"

# Arguments that change what attention computes and that the ops do not know. transformers passes many others (position
# ids, labels and so on), which do not concern attention functions.
_UNSUPPORTED = {
    "position_bias": "position biases added to the scores",
    "head_mask": "head masks",
    "indices": "sparse attention over chosen keys",
    "block_indices": "sparse attention over chosen blocks",
    "sinks": "per-key sinks",
    "cache": "paged caches (continuous batching)",
}
_UNSUPPORTED_NAMES = frozenset(_UNSUPPORTED)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | torch.Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    attnrb_forward: Forward | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Edited attention behind the `AttentionInterface` of transformers.

    Args:
        module: the attention layer, with ``layer_idx``.
        query: ``[B, H, M, D]``.
        key: ``[B, Hk, N, D]``, cached keys included.
        value: ``[B, Hk, N, Dv]``.
        attention_mask: what masks.py made, or a mask ``[B, 1 or H, M, N]`` of the user's.
        dropout: must be 0.
        scaling: factor on the scores.
        is_causal: used where there is no mask.
        sliding_window: part of the mask already, and needed only where there is none.
        softcap: bound of the scores.
        s_aux: sinks ``[H]``.
        attnrb_forward: which forward this is.
        others: not used, but refused where they would change what attention means.

    Returns:
        ``[B, M, H, Dv]``, contiguous, and the weights ``[B, H, M, N]`` as applied, edited where they are, in the dtype
        of ``query``; None where nobody asked for them, which keeps memory linear.
    """
    forward = current_forward() if attnrb_forward is None else attnrb_forward
    layer = getattr(module, "layer_idx", None)
    if (
        forward is None
        or layer is None
        or not 0 <= layer < forward.plan.shape.layers
        or dropout
        or not _UNSUPPORTED_NAMES.isdisjoint(others)
    ):
        _check_call(module, forward, layer, dropout, others)
    assert forward is not None
    assert layer is not None

    common = forward.common.get(id(attention_mask))
    if common is None or not common.serves(attention_mask, query, key):
        common = Common.of(forward, module, attention_mask, query, key, is_causal, sliding_window)
        forward.common[id(attention_mask)] = common
    if isinstance(scaling, torch.Tensor):
        scaling = float(scaling)
    scores = _Scores(common.geometry, scaling, softcap, s_aux)

    plan = forward.plan
    edit, emit = None, None
    if layer in plan.required:
        _check_heads(forward, module, layer, query.shape[1])
        emit = plan.emits.get(layer)
        if layer in plan.edited:
            edit = forward.session.edit(LayerView(layer, query, key, scores.named))
    output, outliers = common.attend(query, key, value, scores, edit, emit)
    if outliers is not None:
        forward.emitted(layer, outliers, common.geometry.tokens)
    forward.called.add(layer)

    if forward.observer is not None:
        again = partial(_attention_again, query, key, scores, edit)
        forward.observer(AttentionCall(layer, query, key, value, again, scores.named(), edit, forward.found))
    weights = attention_weights(query, key, edit=edit, **scores.named()) if forward.weights else None
    return output.transpose(1, 2), weights


class _Scores:
    """How the query·key of one layer become scores, and which keys a query sees."""

    __slots__ = ("geometry", "scale", "sinks", "softcap")

    def __init__(
        self, geometry: Geometry, scale: float | None, softcap: float | None, sinks: torch.Tensor | None
    ) -> None:
        self.geometry = geometry
        self.scale = scale
        self.softcap = softcap
        self.sinks = sinks

    def named(self) -> Mapping[str, Any]:
        """As `attnrb.functional` takes them."""
        visibility = self.geometry.visibility
        return {"scale": self.scale, "visibility": visibility, "softcap": self.softcap, "sinks": self.sinks}


class Common:
    """What the layers of one forward that share a mask have in common: see `Note: [Layers alike]`."""

    __slots__ = ("device", "dtype", "geometry", "keys", "mask", "shape")

    def __init__(self, mask: torch.Tensor | None, geometry: Geometry, query: torch.Tensor, keys: int | None) -> None:
        """Keep what a layer found.

        Args:
            mask: what it was given; kept alive, since its id is what this is found by.
            geometry: what the mask means, on the layer's device.
            query: ``[B, H, M, D]``.
            keys: N, where the meaning depends on it; None where it does not.
        """
        self.mask = mask
        self.geometry = geometry
        self.shape, self.dtype, self.device = query.shape, query.dtype, query.device
        self.keys = keys

    @staticmethod
    def of(
        forward: Forward,
        module: torch.nn.Module,
        mask: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        is_causal: bool | None,
        sliding_window: int | None,
    ) -> Common:
        """Find out what a mask means for such queries, and for the layers after this one."""
        geometry: Geometry | None = getattr(mask, GEOMETRY, None)
        keys = None
        if geometry is None:
            keys = key.size(2)
            before = forward.common.get(id(mask))
            if before is not None and before.mask is mask and before.keys == keys:
                geometry = before.geometry
            else:
                geometry = _read_mask(forward, module, mask, query, keys, is_causal, sliding_window)
        return Common(mask, geometry.on(query.device), query, keys)

    def serves(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether a layer with this mask and query is alike."""
        return (
            mask is self.mask
            and query.shape == self.shape
            and query.dtype is self.dtype
            and query.device == self.device
            and (self.keys is None or key.size(2) == self.keys)
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: _Scores,
        edit: Edit | None,
        emit: float | None,
    ) -> tuple[torch.Tensor, Outliers | None]:
        """Output ``[B, H, M, Dv]`` of a layer, and its outliers where ``emit`` asks for them.

        The op is called as it is where nothing has to be checked, recorded or cast.
        """
        return attend(query, key, value, edit=edit, emit=emit, **scores.named())


def _attention_again(
    query: torch.Tensor, key: torch.Tensor, scores: _Scores, edit: Edit | None, value: torch.Tensor
) -> torch.Tensor:
    """The attention of one layer with these values, edited where it is."""
    return attend(query, key, value, edit=edit, emit=None, **scores.named())[0]


def _check_heads(forward: Forward, module: torch.nn.Module, layer: int, heads: int) -> None:
    shape = forward.plan.shape
    if heads not in (shape.local_heads, shape.heads):
        raise NotImplementedError(
            f"layer {layer} ({type(module).__name__}) has {heads} query heads, others {shape.heads}. Outliers "
            "pair by head index, so attnrb re-balances layers with as many heads as the model's configuration names; "
            "leave this one out with RebalanceConfig(layers=...)"
        )


def _read_mask(
    forward: Forward,
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    keys: int,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Geometry:
    """What a mask says that bears no geometry (any more)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and (sliding_window or not causal):
        raise NotImplementedError(
            f"{type(module).__name__} gave its attention no mask where it needs one (a sliding window, or attention to "
            "later tokens): attnrb supports models whose masks come from transformers' AttentionMaskInterface"
        )
    from attnrb.hosts.transformers.masks import read_mask

    return read_mask(mask, forward.first_slot, query.size(2), keys)


def _check_call(
    module: torch.nn.Module,
    forward: Forward | None,
    layer: int | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """Raise if this call cannot be served, saying why; arguments that are there but None do no harm."""
    name = type(module).__name__
    if forward is None:
        raise RuntimeError(
            f"{name} called its attention without the argument {FORWARD!r}, by which attnrb tells one forward from "
            "another, and no forward of a patched model runs in this thread. Most likely a part of a patched model was "
            "called by itself: call the whole model, or remove the patch first. Or gradient checkpointing runs a layer "
            "again that does not hand keyword arguments down to its attention: turn it off for this model"
        )
    if layer is None:
        raise NotImplementedError(
            f"{name} has no layer_idx, so attnrb cannot tell which layer it is: attnrb supports models whose attention "
            "modules know their layer"
        )
    if not 0 <= layer < forward.plan.shape.layers:
        raise NotImplementedError(
            f"{name} has the layer_idx {layer}, which is none of the model's {forward.plan.shape.layers} decoder layers"
        )
    if dropout:
        raise NotImplementedError(
            f"{name} asks for attention dropout of {dropout}, which attnrb does not support: call model.eval(), or set "
            "the model's attention dropout to 0"
        )
    for argument, meaning in _UNSUPPORTED.items():
        if others.get(argument) is not None:
            raise NotImplementedError(f"{name} uses {meaning} ({argument}), which attnrb does not support")
