"""Attention sinks: keys that many queries attend to whatever they say, and how to weaken them.

Note: [Sinks and their calibration]
ACT (arXiv 2406.15765) looks, in each head, for keys other than the first that receive much attention, and takes weight
from them. With A the weights of the prompt and Q_j the queries that see key j,

    S = {j ≠ 0 : 1/|Q_j| Σ_{i∈Q_j} A_ij > threshold},   m_i = Σ_{j∈S} A_ij,
    A'_ij = β A_ij for j ∈ S,   A'_ij = A_ij (1 + (1 - β) m_i / (1 - m_i)) for all others,

so that each row still sums to 1: the rule ``rest`` of `attnrb.Edit` with 1 + g = β. Threshold 0.1 and β = 0.4 are those
of its published code. That code differs from the method as it is written down, and from what is done here:

- It leaves out the first key *that it found*, which is the first one of the text only if that is above the threshold.
- It looks again at every decoded token, with that token's one row: each key with a weight above the threshold then
  counts as a sink, and the weight of the first key is overwritten by 1. Here the sinks are those that the prompt had.
- It edits the first text of a batch only, and its list of heads is for one model.

ZeroTuning (arXiv 2505.11739) multiplies the weight of the first key by γ and divides each row by its new sum, which is
a key bias of ln γ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.policies.base import (
    LayerPlan,
    LayerView,
    ModelShape,
    PerHead,
    Policy,
    Request,
    Session,
    option,
    register_policy,
)
from attnrb.policies.checks import HeadChoice, Indices, indices, number
from attnrb.policies.profile import HeadProfile, heads_by_layer, read_heads

__all__ = ["SinkDamping"]


@register_policy
@dataclass(frozen=True)
class SinkDamping(Policy):
    """Weaken attention sinks: see Note: [Sinks and their calibration].

    The sinks of a text are found where its first tokens are read, by one more pass over the keys of each layer, and
    serve for as long as these keys are cached: a text that is read in parts has the sinks of the first part, and a
    prompt that assisted decoding reads along with guesses has them from both. Without a cache each call is a text of
    its own. A key near the end of the prompt is seen by few queries, itself among them, and is easily a sink.

    Attributes:
        strength: what the weights of sinks are multiplied by, between 0 and 1: their share goes to the other keys.
        threshold: mean attention, over the queries that see a key, above which it is a sink; between 0 and 1.
        first_key: what the weight of each text's first token is multiplied by before its row is divided by its new
            sum, at least 0: ZeroTuning, and a bias that sinks are not looked for with. The default, None, leaves it.
        heads: the heads that heed it, as one list for all layers or as ``{layer: [heads]}``; or a
            `attnrb.HeadProfile`, or the path of one. The default, None, means all.
        layers: the layers that heed it. The default, None, means all with attention. ACT leaves out the first two and
            the last.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "sinks"

    strength: float = option(0.4, "What the weights of sinks are multiplied by; 1 leaves them.")
    threshold: float = option(0.1, "Mean attention above which a key is a sink.")
    first_key: float | None = option(None, "What the first key's weight is multiplied by.", "none")
    heads: HeadChoice | HeadProfile | str | None = option(None, "Heads that heed it, or a profile's file.", "all")
    layers: Indices | None = option(None, "Layers that heed it, like 2-12.", "all")

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "strength", number("strength", self.strength))
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength: expected a number from 0 to 1, got {self.strength}")
        put(self, "threshold", number("threshold", self.threshold))
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold: expected a number between 0 and 1, both excluded, got {self.threshold}")
        if self.first_key is not None:
            put(self, "first_key", number("first_key", self.first_key))
            if self.first_key < 0:
                raise ValueError(f"first_key: expected 0 or above, got {self.first_key}")
        put(self, "heads", read_heads(self.heads))
        if self.layers is not None:
            put(self, "layers", indices("layers", self.layers))

    def __hash__(self) -> int:
        return hash((type(self), self.label()))

    def resolve(self, shape: ModelShape) -> LayerPlan:
        """See `Policy.resolve`."""
        chosen = {}
        for layer, heads in heads_by_layer(self.heads, self.layers, shape).items():
            heed = torch.zeros(shape.heads, dtype=torch.float32, device="cpu")
            heed[list(heads)] = 1.0
            chosen[layer] = PerHead(heed, shape, layer)
        return _SinkPlan(self, shape, chosen)


class _SinkPlan(LayerPlan):
    """Fitted to one model; ``chosen``: of each layer 1 for the heads that heed it and 0 for others, float32 ``[H]``."""

    def __init__(self, policy: SinkDamping, shape: ModelShape, chosen: dict[int, PerHead]) -> None:
        super().__init__(shape, edited=frozenset(chosen), keeps=True)
        self.policy = policy
        self.chosen = chosen

    def begin(self, request: Request | None = None) -> Session:
        """See `LayerPlan.begin`."""
        return _SinkSession(self, {} if request is None else request.sequence)


class _SinkSession(Session):
    """One forward; ``kept``: what the forwards before it found in this text, by plan and layer."""

    __slots__ = ("kept", "plan")

    def __init__(self, plan: _SinkPlan, kept: dict[Any, Any]) -> None:
        self.plan = plan
        self.kept = kept

    def edit(self, view: LayerView) -> Edit | None:
        """See `Session.edit`.

        Raises:
            RuntimeError: the keys of the prompt were cached before the policy was in force.
            ValueError: the batch has another number of rows than the prompt had.
        """
        policy, heed = self.plan.policy, self.plan.chosen[view.layer].of(view)
        key = self.plan, view.layer
        if key not in self.kept:
            _check_first_call(view)
            self.kept[key] = (
                None if policy.strength == 1.0 else _find(view, policy.threshold, heed),
                None if policy.first_key is None else _first_key_bias(view, policy.first_key, heed),
            )
        sinks, bias = self.kept[key]
        if bias is not None and bias.shape[0] > 1:
            bias = _as_rows(bias, view)
        if sinks is None:
            return None if bias is None else Edit(key_bias=bias)
        outliers = Outliers(*(_as_rows(each, view) for each in sinks))
        return Edit(outliers, (policy.strength - 1.0) * heed, "rest", key_bias=bias)


def _check_first_call(view: LayerView) -> None:
    # A policy that cannot know the prompt's sinks must not take those of one decoded row for them.
    if not torch.compiler.is_compiling() and int(view.query_slots()[:, 0].max()) > 0:
        raise RuntimeError(
            "past_key_values: these keys were cached before the policy SinkDamping was in force, which finds sinks "
            "where a text begins: read the text again with the policy"
        )


def _as_rows(found: torch.Tensor, view: LayerView) -> torch.Tensor:
    """What the prompt's rows have, for the batch as it is now: rows that were multiplied take theirs as often."""
    rows, now = found.shape[0], view.rows
    if rows == now:
        return found
    if now % rows:
        raise ValueError(
            f"past_key_values: the prompt was read in {rows} rows, of which the {now} of this call are no multiple"
        )
    return found.repeat_interleave(now // rows, 0)


def _slots_seen(view: LayerView) -> torch.Tensor:
    """Bool ``[B or 1, N]``: the keys that are no padding."""
    visibility = view.scores["visibility"]
    slots = visibility.key_offset + torch.arange(view.key.shape[2], device=view.device)
    seen = torch.ones(1, len(slots), dtype=torch.bool, device=view.device)
    if visibility.mask is not None:
        mask = visibility.mask
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        seen = seen & mask.any(2).any(1)
    if visibility.key_start is not None:
        seen = seen & (slots >= visibility.key_start[:, None])
    return seen


def _first_keys(view: LayerView) -> torch.Tensor:
    """The place among the keys of each text's first token: int64 ``[B or 1]``."""
    return _slots_seen(view).int().argmax(1)


@torch.no_grad()
def _find(view: LayerView, threshold: float, heed: torch.Tensor) -> Outliers:
    """The sinks of a prompt: one list for all queries of a head, ``[B, H, 1, C]``."""
    received = view.received_attention()
    places = torch.arange(received.shape[2], device=view.device)
    sinks = (received > threshold) & (places != _first_keys(view)[:, None])[:, None] & (heed > 0)[:, None]
    counts = sinks.sum(2, dtype=torch.int32)[:, :, None]
    # A graph cannot know how many there are, and makes room for all keys.
    most = received.shape[2] if torch.compiler.is_compiling() else max(1, int(counts.max()))
    beyond = received.shape[2]
    ordered = torch.where(sinks, places, beyond).sort(2).values[..., :most]
    slots = torch.where(ordered < beyond, ordered + int(view.scores["visibility"].key_offset), -1)
    return Outliers(slots.to(torch.int32)[:, :, None].contiguous(), counts)


def _first_key_bias(view: LayerView, strength: float, heed: torch.Tensor) -> torch.Tensor:
    """float32 ``[B or 1, H, N']``: ln(strength) on the first token of each row, for the heads that heed it."""
    log = math.log(strength) if strength > 0 else -math.inf
    first = _first_keys(view) + int(view.scores["visibility"].key_offset)
    width = view.key_slots() if torch.compiler.is_compiling() else int(first.max()) + 1
    slots = torch.arange(width, device=view.device)
    here = (slots == first[:, None])[:, None] & (heed > 0)[:, None]
    return torch.where(here, log, 0.0)
