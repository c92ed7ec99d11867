"""The attention function of patched models: what transformers calls in place of its own, once in every layer.

It is told which forward it belongs to by a keyword argument that the patch adds to the model's call and that the model
hands down to its layers, so two forwards never share outliers, whatever threads they run in. A model that drops the
argument on the way is served all the same, by the forward that runs in this thread (`current_forward`).

Note: [Layers alike]
For one decoded token the kernel of a layer takes some microseconds, and finding out in Python what to tell it takes as
long: dtype, device, number of heads, what the mask means. All that is the same in nearly every layer of a forward, so
the first layer with a mask keeps what it found (`Alike`), and those after it only make sure that they are alike. What
is left costs several times what a loop over it would measure, since a model's weights pass through the processor's
caches in every step and leave nothing of this program there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnrb.decisions import tell
from attnrb.hosts.session import AttentionCall, Forward, current_forward
from attnrb.hosts.transformers.caches import check_keys
from attnrb.ops import functional
from attnrb.ops.attention import attend, attend_unchecked, unchecked_arguments
from attnrb.ops.edit import NO_EDIT, Edit, EditArguments
from attnrb.ops.operands import autocasts, native
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import visibility_arguments
from attnrb.policies.applied import applied_weights
from attnrb.policies.base import LayerView, Mixture

if TYPE_CHECKING:
    from attnrb.hosts.transformers.geometry import Geometry

__all__ = ["FORWARD", "GEOMETRY", "Alike", "attention"]

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
        or not 0 <= layer < len(forward.steps)
        or dropout
        or not _UNSUPPORTED_NAMES.isdisjoint(others)
    ):
        _check_call(module, forward, layer, dropout, others)
    assert forward is not None
    assert layer is not None
    if isinstance(scaling, torch.Tensor):
        scaling = float(scaling)
    if forward.continuous is not None:
        if query.size(1) not in forward.plan.shape.heads_of_layers and forward.steps[layer] is not None:
            _refuse_heads(forward, module, layer, query.size(1))
        output = forward.continuous.attention(forward, layer, query, key, value, scaling, softcap, s_aux, others)
        forward.called.add(layer)
        return output, None

    for alike in forward.alike:
        if alike.serves(attention_mask, query, key):
            break
    else:
        alike = Alike.of(forward, module, attention_mask, query, key, is_causal, sliding_window)
        forward.alike.append(alike)

    # `ready` is what the op is told; None where only the functions, which check and cast, can be told.
    edit: Edit | Mixture | None = None
    emit: float | None = None
    ready: EditArguments | None = NO_EDIT
    step = forward.steps[layer]
    if step is not None:
        if not alike.heads_fit:
            _refuse_heads(forward, module, layer, alike.heads)
        emit, edited = step
        if edited:
            if forward.left_out is not None:
                forward.left_out.settle(forward, layer, query)
            ready = forward.session.ready.get(layer) if alike.first_device else None
            if ready is None:
                edit = forward.session.edit(_View(layer, query, key, alike, scaling, softcap, s_aux))
                ready = None if isinstance(edit, Mixture) else unchecked_arguments(edit)
    if ready is not None and alike.visibility is not None and not torch.is_grad_enabled():
        output, outliers = attend_unchecked(query, key, value, ready, emit, alike.visibility, scaling, softcap, s_aux)
    else:
        edit = _named(edit, ready)
        output, outliers = _attend(_View(layer, query, key, alike, scaling, softcap, s_aux), value, edit, emit)
        output = output.transpose(1, 2)
    if outliers is not None:
        forward.emitted(layer, outliers, alike.geometry.tokens)
    forward.called.add(layer)

    if forward.observer is None and not forward.weights:
        return output, None
    edit, view = _named(edit, ready), _View(layer, query, key, alike, scaling, softcap, s_aux)
    if forward.observer is not None:
        again = partial(_attention_again, view, edit)
        forward.observer(AttentionCall(layer, query, key, value, again, view.scores, edit, forward.found))
    return output, applied_weights(view, edit) if forward.weights else None


class _View(LayerView):
    """See `LayerView`. One is made for every layer of every token, so it only keeps what it is given."""

    __slots__ = ("_alike", "_scale", "_sinks", "_softcap")

    def __init__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        alike: Alike,
        scale: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        self.layer = layer
        self.query = query
        self.key = key
        self.heads = alike.heads
        self.device = alike.device
        self._alike = alike
        self._scale = scale
        self._softcap = softcap
        self._sinks = sinks

    @property
    def scores(self) -> Mapping[str, Any]:
        visibility = self._alike.geometry.visibility
        return {"scale": self._scale, "visibility": visibility, "softcap": self._softcap, "sinks": self._sinks}


def _named(edit: Edit | Mixture | None, ready: EditArguments | None) -> Edit | Mixture | None:
    """The edit of a layer, where so far only the op's arguments of it are known."""
    return edit if edit is not None or ready is None or ready is NO_EDIT else Edit.of_arguments(ready)


class Alike:
    """What the layers of one forward that share a mask have in common: see `Note: [Layers alike]`."""

    __slots__ = (
        "device",
        "dtype",
        "first_device",
        "geometry",
        "heads",
        "heads_fit",
        "keys",
        "mask",
        "on_cpu",
        "shape",
        "visibility",
    )

    def __init__(
        self,
        mask: torch.Tensor | None,
        geometry: Geometry,
        query: torch.Tensor,
        keys: int | None,
        forward: Forward,
    ) -> None:
        """Keep what a layer found.

        Args:
            mask: what it was given; kept alive, since this is found by it.
            geometry: what the mask means, on the layer's device.
            query: ``[B, H, M, D]``.
            keys: N, where the meaning depends on it; None where it does not.
            forward: of which a layer found it.
        """
        self.mask = mask
        self.geometry = geometry
        self.shape, self.dtype, self.device = query.shape, query.dtype, query.device
        self.heads, self.on_cpu = query.shape[1], query.is_cpu
        self.heads_fit = self.heads in forward.plan.shape.heads_of_layers
        self.first_device = not forward.alike or forward.alike[0].device == self.device
        self.keys = keys
        # As the op takes it; None where calls have to be checked, cast or traced. Autocast is asked about once: were it
        # turned on between layers alike, in whose dtype nothing changes, they would stay more precise than asked for.
        cast = autocasts(query)
        plain = native(query) and not cast and not torch.compiler.is_compiling()
        self.visibility = visibility_arguments(geometry.visibility) if plain else None

    @staticmethod
    def of(
        forward: Forward,
        module: torch.nn.Module,
        mask: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        is_causal: bool | None,
        sliding_window: int | None,
    ) -> Alike:
        """Find out what a mask means for such queries, and for the layers after this one."""
        geometry: Geometry | None = getattr(mask, GEOMETRY, None)
        keys: int | None = key.size(2)
        if geometry is not None and torch.compiler.is_compiling():
            keys = None  # a graph would be one for this number of keys
        elif geometry is not None:
            check_keys(module, geometry.keys, key.size(2), query.size(2))
        else:
            read = (each.geometry for each in forward.alike if each.mask is mask and each.keys == keys)
            geometry = next(read, None)
            if geometry is None:
                geometry = _read_mask(forward, module, mask, query, key.size(2), is_causal, sliding_window)
        return Alike(mask, geometry.on(query.device), query, keys, forward)

    def serves(self, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether a layer with this mask and query is alike."""
        return (
            mask is self.mask
            and query.shape == self.shape
            and query.dtype is self.dtype
            and (query.is_cpu if self.on_cpu else query.device == self.device)
            and (self.keys is None or key.size(2) == self.keys)
        )


def _attend(
    view: LayerView, value: torch.Tensor, edit: Edit | Mixture | None, emit: float | None
) -> tuple[torch.Tensor, Outliers | None]:
    """Output ``[B, H, M, Dv]`` of a layer under an edit, and its outliers where ``emit`` asks for them."""
    if not isinstance(edit, Mixture):
        return attend(view.query, view.key, value, edit=edit, emit=emit, **view.scores)
    tell("parts", "a share of attention is asked for: one pass over each part of the prompt, and one to emit outliers")
    parts = [
        functional.attention(view.query, view.key, value, edit=each, **scores) for each, scores in edit.parts(view)
    ]
    shares = edit.weigh([part.lse for part in parts], view)
    mixed = sum(share[..., None] * part.output for share, part in zip(shares, parts, strict=True))
    assert isinstance(mixed, torch.Tensor)
    # A mixture has no one softmax: its outliers are those of the layer as it is.
    found = None if emit is None else attend(view.query, view.key, value, edit=None, emit=emit, **view.scores)[1]
    return mixed.to(view.query.dtype), found


def _attention_again(view: LayerView, edit: Edit | Mixture | None, value: torch.Tensor) -> torch.Tensor:
    """The attention of one layer with these values, edited where it is."""
    return _attend(view, value, edit, None)[0]


def _refuse_heads(forward: Forward, module: torch.nn.Module, layer: int, heads: int) -> None:
    raise NotImplementedError(
        f"layer {layer} ({type(module).__name__}) has {heads} query heads, others {forward.plan.shape.heads}. Outliers "
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

    if mask is not None and forward.made is not None and not torch.compiler.is_compiling():
        geometry = forward.made.of_copy(mask)
        if geometry is not None:
            return geometry
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
        if others.get(argument) is not None and (argument != "cache" or forward.continuous is None):
            raise NotImplementedError(f"{name} uses {meaning} ({argument}), which attnrb does not support")
