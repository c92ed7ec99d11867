"""The attention function of patched models: what transformers calls in place of its own, once in every layer.

It is told which forward it belongs to by a keyword argument that the patch adds to the model's call and that the model
hands down to its layers, so two forwards never share outliers, whatever threads they run in. A model that drops the
argument on the way is served all the same, by the forward that runs in this thread (`current_forward`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnrb.hosts.stats import PatchStats
from attnrb.hosts.transformers.routine import Routine
from attnrb.ops import functional
from attnrb.ops.attention import attention_weights
from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.policies.rebalance import RebalanceConfig

if TYPE_CHECKING:
    from attnrb.hosts.transformers.masks import Geometry
    from attnrb.policies.learned import LearnedGains

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


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward, as an observer sees it."""

    layer: int
    query: torch.Tensor
    """``[B, H, M, D]``"""
    key: torch.Tensor
    """``[B, Hk, N, D]``"""
    value: torch.Tensor
    """``[B, Hk, N, Dv]``"""
    attention: Callable[[torch.Tensor], torch.Tensor]
    """The attention that this layer applies, re-balanced where it is, for any values ``[B, Hk, N, any]``: output
    ``[B, H, M, any]``. It runs the op anew."""
    scores: Mapping[str, Any]
    """``scale``, ``visibility``, ``softcap`` and ``sinks`` of this layer, as `attnrb.functional` takes them."""
    gain: torch.Tensor | None
    """float32 ``[H]``: the gain of each head; None in a layer that stays as it is."""
    outliers: Outliers | None
    """The source layer's outliers, which the gain strengthens; None where every entry is strengthened, or none yet."""
    normalize: bool
    """Whether the rows of a re-balanced layer are divided by their new sums."""


Observer = Callable[[AttentionCall], None]


class Plan:
    """What to do in each layer of one model: a configuration made definite."""

    def __init__(
        self,
        config: RebalanceConfig,
        heads: int,
        gains: Sequence[Sequence[float] | None],
        observer: Observer | None = None,
        shard: tuple[int, int] = (0, 1),
        learned: LearnedGains | None = None,
    ) -> None:
        """Prepare the plan.

        Args:
            config: the options, with the source layer that the model really has.
            heads: H, the number of query heads in the layers that take part.
            gains: for each of the L layers its H gains, or None where the layer stays as it is.
            observer: called after the attention of every layer.
            shard: rank and number of ranks among which tensor parallelism splits the heads of a layer, in order.
            learned: where the gains come from instead, anew in every forward; ``gains`` only says in which layers.
        """
        self.source_layer = config.source_layer
        self.threshold = config.threshold
        self.normalize = config.normalize
        self.boost_all = config.boost_all
        self.heads = heads
        rank, ranks = shard
        self.local_heads = heads // ranks if heads % ranks == 0 else heads
        self._first_head = rank * self.local_heads if self.local_heads < heads else 0
        self._learned = learned
        self.layers = len(gains)
        self.observer = observer
        touched = [layer for layer, gain in enumerate(gains) if gain is not None]
        self.touched = frozenset(touched)
        # A layer that takes part must call in every forward; any other may be left out.
        self.required = frozenset([self.source_layer, *touched])
        # float32 [H], by layer and number of heads: this rank's own, and all in a layer that is not split. A tensor
        # that moved to its layer's device stays there.
        self._gains: dict[tuple[int, int], torch.Tensor] = {}
        for layer in touched:
            gain = torch.tensor(gains[layer])
            self._gains[layer, self.local_heads] = self._own(gain).clone()
            self._gains[layer, heads] = gain
        self._no_gain = torch.zeros(1)
        self._no_outliers: Outliers | None = None

    def _own(self, gain: torch.Tensor) -> torch.Tensor:
        return gain[self._first_head : self._first_head + self.local_heads]

    def takes_part(self, layer: int) -> bool:
        """Whether a layer is the source or is re-balanced."""
        return layer == self.source_layer or layer in self.touched

    def gain(self, layer: int, heads: int, device: torch.device) -> torch.Tensor | None:
        """float32 ``[heads]`` on ``device``, or None for a layer that stays as it is."""
        if layer not in self.touched:
            return None
        if self._learned is not None:
            gain = self._learned.gain(layer)
            return (gain if heads == self.heads else self._own(gain)).to(device)
        gain = self._gains[layer, heads]
        if gain.device != device:
            gain = gain.to(device)
            if not torch.compiler.is_compiling():
                self._gains[layer, heads] = gain
        return gain

    def nothing(self, query: torch.Tensor) -> tuple[Outliers, torch.Tensor]:
        """An empty set of outliers for ``query [B, H, M, D]`` and a gain of 0, which make re-balancing plain attention.

        Kept for the next call, since every layer of every decoded token asks for the same.
        """
        rows = query.shape[:3]
        if torch.compiler.is_compiling():  # a graph keeps nothing between calls
            counts = torch.zeros(rows, dtype=torch.int32, device=query.device)
            return Outliers(counts.new_empty((*rows, 0)), counts), torch.zeros(1, device=query.device)
        none = self._no_outliers
        if none is None or none.counts.shape != rows or none.counts.device != query.device:
            counts = torch.zeros(rows, dtype=torch.int32, device=query.device)
            none = self._no_outliers = Outliers(counts.new_empty((*rows, 0)), counts)
            self._no_gain = self._no_gain.to(query.device)
        return none, self._no_gain


class Forward:
    """One forward of a patched model: what its layers tell each other."""

    __slots__ = (
        "__weakref__",
        "called",
        "first_slot",
        "masks",
        "outliers",
        "packed",
        "plan",
        "routines",
        "stats",
        "unpadded",
        "weights",
    )

    def __init__(
        self,
        plan: Plan,
        stats: PatchStats,
        first_slot: int | None,
        *,
        weights: bool = False,
        packed: bool = False,
        unpadded: bool = False,
    ) -> None:
        """Begin a forward.

        Args:
            plan: what to do.
            stats: where to count it.
            first_slot: slot of the first query, where a mask of the user's own makes it needed. The mask function notes
                it where transformers asks for a mask.
            weights: whether the layers are to return their weights.
            packed: whether positions may tell that several texts share a row.
            unpadded: whether there is no padding, whatever mask transformers is given.
        """
        self.plan = plan
        self.stats = stats
        self.first_slot = first_slot
        self.weights = weights
        self.packed = packed
        self.unpadded = unpadded
        self.outliers: Outliers | None = None
        self.called: set[int] = set()
        # By the id of the mask; None: every layer takes the long way.
        special = weights or plan.observer is not None or plan.boost_all or torch.compiler.is_compiling()
        self.routines: dict[int, Routine] | None = None if special else {}
        # Masks without a geometry of their own, read once for all layers: (mask, N, geometry).
        self.masks: list[tuple[torch.Tensor | None, int, Geometry]] = []

    def found(self, outliers: Outliers, tokens: torch.Tensor | None) -> None:
        """Note the outliers of the source layer; ``tokens`` bool ``[B, M]`` says which queries count, None: all."""
        self.outliers = outliers
        # A graph counts nothing, and gradient checkpointing runs a layer again.
        if self.plan.source_layer not in self.called and not torch.compiler.is_compiling():
            self.stats.add_counts(outliers.counts, tokens)

    def outliers_for(self, layer: int, device: torch.device) -> Outliers:
        """The outliers of the source layer, on the device of this one.

        Raises:
            RuntimeError: the source layer has not run.
        """
        outliers = self.outliers
        if outliers is None:
            raise RuntimeError(
                f"layer {layer} ran before the source layer {self.plan.source_layer}, which finds the outliers: attnrb "
                "needs the layers of a model to run in order, all through transformers' AttentionInterface"
            )
        if outliers.counts.device != device:
            outliers = self.outliers = Outliers(*(each.to(device) for each in outliers))
        return outliers


class _Traced:
    """The forward that torch.compile is tracing, which cannot see context variables."""

    def __init__(self) -> None:
        self.forward: Forward | None = None


_traced = _Traced()
# Weak: a forward that failed must not be found later by parts of the model that are called by themselves.
_running: ContextVar[weakref.ref[Forward] | None] = ContextVar("attnrb_forward", default=None)


def enter_forward(forward: Forward | None) -> None:
    """Make this the forward that runs in this thread; None when it is over."""
    if torch.compiler.is_compiling():
        _traced.forward = forward
    else:
        _running.set(None if forward is None else weakref.ref(forward))


def current_forward() -> Forward | None:
    """The forward of a patched model that runs in this thread, if any."""
    if torch.compiler.is_compiling():
        return _traced.forward
    running = _running.get()
    return None if running is None else running()


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
    """Re-balanced attention behind the `AttentionInterface` of transformers.

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
        ``[B, M, H, Dv]``, contiguous, and the weights ``[B, H, M, N]`` as applied, re-balanced where they are, in the
        dtype of ``query``; None where nobody asked for them, which keeps memory linear.
    """
    forward = current_forward() if attnrb_forward is None else attnrb_forward
    layer = getattr(module, "layer_idx", None)
    if (
        forward is None
        or layer is None
        or not 0 <= layer < forward.plan.layers
        or dropout
        or not _UNSUPPORTED_NAMES.isdisjoint(others)
    ):
        _check_call(module, forward, layer, dropout, others)
    assert forward is not None
    assert layer is not None
    geometry = getattr(attention_mask, GEOMETRY, None)
    if forward.routines is not None and geometry is not None and isinstance(scaling, float):
        assert attention_mask is not None
        routine = forward.routines.get(id(attention_mask))
        if routine is None or not routine.serves(query):
            routine = Routine.of(forward, attention_mask, geometry, query)
        if routine is not None:
            forward.routines[id(attention_mask)] = routine
            output = routine.attention(forward, layer, query, key, value, scaling, softcap, s_aux)
            return output.transpose(1, 2), None

    plan = forward.plan
    heads = query.size(1)
    if heads != plan.local_heads and heads != plan.heads and plan.takes_part(layer):
        raise NotImplementedError(
            f"layer {layer} ({type(module).__name__}) has {heads} query heads, others {plan.heads}. Outliers "
            "pair by head index, so attnrb re-balances layers with as many heads as the model's configuration names; "
            "leave this one out with RebalanceConfig(layers=...)"
        )
    gain = plan.gain(layer, heads, query.device)
    is_source = layer == plan.source_layer

    if geometry is None:
        geometry = _read_mask(forward, module, attention_mask, query, key, is_causal, sliding_window)
    geometry = geometry.on(query.device)
    if isinstance(scaling, torch.Tensor):
        scaling = float(scaling)
    scores: dict[str, Any] = {"scale": scaling, "visibility": geometry.visibility, "softcap": softcap, "sinks": s_aux}

    if is_source and not plan.boost_all:
        output, _, outliers = functional.source_attention(query, key, value, threshold=plan.threshold, **scores)
        forward.found(outliers, geometry.tokens)
    else:
        output = _layer_attention(forward, layer, gain, query, key, scores, value)
    forward.called.add(layer)
    if plan.observer is not None:
        again = partial(_layer_attention, forward, layer, gain, query, key, scores)
        plan.observer(AttentionCall(layer, query, key, value, again, scores, gain, forward.outliers, plan.normalize))
    weights = None
    if forward.weights:
        edit = None
        if gain is not None and not is_source and not plan.boost_all:
            edit = Edit(forward.outliers, gain, "row" if plan.normalize else "none")
        weights = attention_weights(query, key, edit=edit, **scores)
        if gain is not None and plan.boost_all and not plan.normalize:
            weights = (weights * (1 + gain)[:, None, None]).to(weights.dtype)
    return output.transpose(1, 2), weights


def _layer_attention(
    forward: Forward,
    layer: int,
    gain: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    scores: dict[str, Any],
    value: torch.Tensor,
) -> torch.Tensor:
    """The attention of one layer with these values, re-balanced where it has a gain."""
    plan = forward.plan
    if gain is not None and not plan.boost_all:
        outliers = forward.outliers_for(layer, query.device)
        return functional.rebalanced_attention(query, key, value, outliers, gain, normalize=plan.normalize, **scores)
    output = functional.rebalanced_attention(query, key, value, *plan.nothing(query), **scores)
    if gain is not None:
        if not plan.normalize:
            output = (output * (1 + gain)[:, None, None]).to(output.dtype)  # not in place: a backward may need it
        elif scores["sinks"] is not None:
            raise NotImplementedError("boost_all with normalize is not supported for models with attention sinks")
        # Otherwise normalising takes back at once what strengthening every entry did.
    return output


def _read_mask(
    forward: Forward,
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Geometry:
    """What a mask says that bears no geometry (any more): read once for all layers that share it."""
    keys = key.size(2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and (sliding_window or not causal):
        raise NotImplementedError(
            f"{type(module).__name__} gave its attention no mask where it needs one (a sliding window, or attention to "
            "later tokens): attnrb supports models whose masks come from transformers' AttentionMaskInterface"
        )
    for known, length, geometry in forward.masks:
        if known is mask and length == keys:
            return geometry
    from attnrb.hosts.transformers.masks import read_mask

    geometry = read_mask(mask, forward.first_slot, query.size(2), keys)
    forward.masks.append((mask, keys, geometry))
    return geometry


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
    if not 0 <= layer < forward.plan.layers:
        raise NotImplementedError(
            f"{name} has the layer_idx {layer}, which is none of the model's {forward.plan.layers} decoder layers"
        )
    if dropout:
        raise NotImplementedError(
            f"{name} asks for attention dropout of {dropout}, which attnrb does not support: call model.eval(), or set "
            "the model's attention dropout to 0"
        )
    for argument, meaning in _UNSUPPORTED.items():
        if others.get(argument) is not None:
            raise NotImplementedError(f"{name} uses {meaning} ({argument}), which attnrb does not support")
