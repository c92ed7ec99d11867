"""Emphasis: attention to the part of a prompt that somebody points at.

Note: [Emphasis as a key bias]
Multiplying the weight of a span's keys by γ and dividing the row by its new sum is adding ln γ to their scores:
γ e^s = e^(s + ln γ). So emphasis is one number for each key, added before the softmax, at the price of one addition a
score. PASTA's "include" and InstABoost are this on all rows. Here the rows behind the span have it by default, since
a prompt's own tokens, which later ones read, are better left as the model made them. PASTA's "exclude" is ln α on
every key of the prompt outside the union of the spans. Its published code adds ln α once for every span, which with
two spans weakens both.

Note: [Floor of a span's share]
A share is no bias that is the same for all rows. With m the span's share of a row, and y_S, y_R the outputs of
attention over the span and over the rest alone,

    y = σ y_S + (1 - σ) y_R,    m = 1 / (1 + exp(LSE_R - LSE_S)),    σ = max(m, t)

gives the span at least t of each row. Each key is visited once: half in the one call, half in the other. A sink of the
model's counts among the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnrb.ops.edit import Edit
from attnrb.policies.base import (
    LayerPlan,
    LayerView,
    Mixture,
    ModelShape,
    Policy,
    Request,
    Session,
    option,
    register_policy,
)
from attnrb.policies.checks import HeadChoice, Indices, indices, number
from attnrb.policies.profile import HeadProfile, heads_by_layer, read_heads
from attnrb.policies.request import SpanTables

__all__ = ["ROWS", "Emphasis", "first_queries"]

ROWS = ("after", "all", "last")


@register_policy
@dataclass(frozen=True)
class Emphasis(Policy):
    """Emphasise spans of the prompt: their keys get more of each row's attention (see the notes of this module).

    Spans come with each call: `attnrb.mark` makes them, and ``patched.spans(...)`` or ``patched.generate(marked)`` pass
    them on. A call without spans runs as the plain model does, and says so once.

    Attributes:
        strength: what the weights of a span are multiplied by before their row is divided by its new sum. 1 changes
            nothing, below 1 weakens, 0 removes the span. A span's own strength stands in place of this.
        rows: which queries heed it: ``"after"`` those behind the row's last span; ``"all"``; ``"last"`` the prompt's
            last token and all that follow.
        heads: the heads that heed it, as a list, a range or text such as ``"0-3,8"``, the same for all layers or as
            ``{layer: heads}``; or a `attnrb.HeadProfile`, or what `HeadProfile.load` takes. The default, None, means
            all.
        layers: the layers that heed it, written like ``heads``. The default, None, means all with attention.
        share: in place of ``strength``: the spans get at least this share of each row, between 0 and 1, both excluded.
        outside: what the weights of all other keys of the prompt are multiplied by as well, at least 0: PASTA's way,
            which with ``strength=1`` leaves the span's own alone. The default, None, leaves them.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or ``share`` stands beside ``outside``.
    """

    name: ClassVar[str] = "emphasis"

    strength: float = option(8.0, "What the weights of a span are multiplied by; 0 removes it.")
    rows: str = option("after", "Queries that heed it: after, all or last.")
    heads: HeadChoice | HeadProfile | str | None = option(None, "Heads that heed it, or a profile.", "all")
    layers: Indices | None = option(None, "Layers that heed it, like 1-12,15.", "all")
    share: float | None = option(None, "Least share of each row that spans get, in place of strength.", "none")
    outside: float | None = option(None, "What other keys of the prompt are multiplied by.", "none")

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "strength", number("strength", self.strength))
        if self.strength < 0:
            raise ValueError(f"strength: expected 0 or above, got {self.strength}")
        if self.rows not in ROWS:
            raise ValueError(f"rows: expected one of {', '.join(ROWS)}, got {self.rows!r}")
        put(self, "heads", read_heads(self.heads))
        if self.layers is not None:
            put(self, "layers", indices("layers", self.layers))
        if self.share is not None:
            put(self, "share", number("share", self.share))
            if not 0.0 < self.share < 1.0:
                raise ValueError(f"share: expected a number between 0 and 1, both excluded, got {self.share}")
        if self.outside is not None:
            put(self, "outside", number("outside", self.outside))
            if self.outside < 0:
                raise ValueError(f"outside: expected 0 or above, got {self.outside}")
            if self.share is not None:
                raise ValueError("outside: expected without share, which says already what is left for other keys")

    def __hash__(self) -> int:
        return hash((type(self), self.label()))

    def resolve(self, shape: ModelShape) -> LayerPlan:
        """See `Policy.resolve`."""
        found = heads_by_layer(self.heads, self.layers, shape)
        chosen = {layer: None if len(heads) == shape.heads else heads for layer, heads in found.items()}
        return EmphasisPlan(self, shape, chosen)


class EmphasisPlan(LayerPlan):
    """Emphasis fitted to one model."""

    def __init__(self, policy: Emphasis, shape: ModelShape, chosen: dict[int, tuple[int, ...] | None]) -> None:
        """``chosen``: the heads of each layer that heed it; None: all of them."""
        super().__init__(shape, edited=frozenset(chosen), wants_spans=True, reads_keys=False)
        self.policy = policy
        self.chosen = chosen

    def log_strength(self, view: LayerView) -> float | torch.Tensor:
        """ln(strength) of this layer: a number, or float32 ``[H]`` on the CPU for its heads on this rank."""
        strength = self.policy.strength
        return math.log(strength) if strength > 0 else -math.inf

    def state(self, view: LayerView) -> Any:
        """What tells this layer's strengths from others and from themselves later on; None: compute them each time."""
        return ()

    def begin(self, request: Request | None = None) -> Session:
        """See `LayerPlan.begin`."""
        if request is None or request.tables is None:
            return Session()
        if torch.compiler.is_compiling():
            return _EmphasisSession(_Prepared(self, request, request.tables))
        # What the spans come to is worked out once for all forwards of a request.
        prepared = request.kept.get(self)
        if prepared is None:
            prepared = request.kept[self] = _Prepared(self, request, request.tables)
        return _EmphasisSession(prepared)


class _Prepared:
    """The biases that one request's spans come to, by layer's heads, device and number of rows."""

    def __init__(self, plan: EmphasisPlan, request: Request, tables: SpanTables) -> None:
        self.plan = plan
        self.request = request
        self.tables = tables
        self._edits: dict[Any, Edit | Mixture] = {}

    def edit(self, view: LayerView) -> Edit | Mixture:
        heads = self.plan.chosen[view.layer]
        if torch.compiler.is_compiling() or (state := self.plan.state(view)) is None:
            return self._make(heads, view)
        key = (heads, view.heads, view.rows, view.device, state)
        if key not in self._edits:
            self._edits[key] = self._make(heads, view)
        return self._edits[key]

    def _make(self, heads: tuple[int, ...] | None, view: LayerView) -> Edit | Mixture:
        heed = self._own_heads(heads, view)
        bias, first = self._bias(view, heed)
        share = self.plan.policy.share
        return Edit(key_bias=bias, first_query=first) if share is None else _floor(bias, first, heed, share)

    def _own_heads(self, heads: tuple[int, ...] | None, view: LayerView) -> torch.Tensor | None:
        """Bool ``[H]``: which of this layer's heads, on this rank, heed it; None: all."""
        if heads is None:
            return None
        shape = self.plan.shape
        heed = torch.zeros(shape.heads, dtype=torch.bool, device="cpu")
        heed[list(heads)] = True
        return (heed if view.heads == shape.heads else shape.own(heed)).to(view.device)

    def _bias(self, view: LayerView, heed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 ``[B, 1 or H, N']`` and the first queries int64 ``[B]``, None: all."""
        policy, device, tables = self.plan.policy, view.device, self.tables
        if policy.share is not None:
            bias = torch.where(tables.union, 0.0, -math.inf)[:, None]
        else:
            bias = tables.log_strengths(self.plan.log_strength(view))
            if policy.outside is not None:
                bias = self._weaken_outside(bias, policy.outside, view)
        prompt = self.request.prompt_ends(view) if policy.rows == "last" else None
        first = first_queries(policy.rows, tables.ends, prompt)
        times = self._times(view)
        if times > 1:
            bias = bias.repeat_interleave(times, 0)
            first = None if first is None else first.repeat_interleave(times, 0)
        bias = bias.to(device)
        if heed is not None and policy.share is None:
            bias = torch.where(heed[:, None], bias, 0.0)
        return bias.contiguous(), None if first is None else first.to(device)

    def _weaken_outside(self, bias: torch.Tensor, outside: float, view: LayerView) -> torch.Tensor:
        """The biases ``[B, 1 or H, N']`` with those of the prompt's other keys, in rows that have spans."""
        prompt = self.request.prompt_ends(view).to(bias.device)
        union = self.tables.union
        if self.request.prompt is None:  # the tables need not reach the prompt's end
            more = max(0, view.key_slots() - union.shape[1])
            bias, union = (torch.nn.functional.pad(each, (0, more)) for each in (bias, union))
        weak = math.log(outside) if outside > 0 else -math.inf
        before = torch.arange(union.shape[1], device=bias.device) < prompt[:, None]
        return torch.where((~union & before & union.any(1, keepdim=True))[:, None], weak, bias)

    def _times(self, view: LayerView) -> int:
        """How many rows of the batch each row of spans stands for: beams and returned sequences multiply them."""
        rows = self.tables.rows
        if view.rows % rows != 0:
            raise ValueError(f"spans: expected those of {view.rows} rows, or of a divisor of it, got those of {rows}")
        return view.rows // rows


def _floor(inside: torch.Tensor, first: torch.Tensor | None, heed: torch.Tensor | None, share: float) -> Mixture:
    """See Note: [Floor of a span's share]; ``inside`` is 0 on the span and -inf outside, within its slots."""
    span = inside == 0

    def edits(view: LayerView) -> tuple[Edit, Edit]:
        # Keys behind the slots of a bias have none: the span's own call must remove them.
        slots = view.key_slots()
        whole = torch.zeros(*span.shape[:2], max(slots, span.shape[2]), dtype=torch.bool, device=span.device)
        whole[..., : span.shape[2]] = span
        only = torch.zeros_like(whole, dtype=torch.float32).masked_fill_(~whole, -math.inf)
        rest = torch.zeros_like(whole, dtype=torch.float32).masked_fill_(whole, -math.inf)
        return Edit(key_bias=only), Edit(key_bias=rest)

    def weigh(lse: Sequence[torch.Tensor], view: LayerView) -> tuple[torch.Tensor, ...]:
        # A row that sees no key of the span, or none outside it, has nothing to shift. Its difference is infinite or
        # NaN, and must not come near the sigmoid, whose gradient would be NaN too.
        shift = (lse[0] > -math.inf) & (lse[1] > -math.inf)
        own = torch.sigmoid(torch.where(shift, lse[0] - lse[1], 0.0))  # m
        own = torch.where(shift, own, (lse[0] > -math.inf).to(own.dtype))
        if first is not None:
            shift = shift & (view.query_slots() >= first[:, None])[:, None]
        if heed is not None:
            shift = shift & heed[:, None]
        sigma = torch.where(shift, own.clamp(min=share), own)
        return sigma, 1 - sigma

    return Mixture(edits, weigh, sinks=(False, True))


def first_queries(rows: str, ends: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor | None:
    """The slot of the first query in each row that heeds its spans: int64 ``[B]``; None: all queries do.

    Args:
        rows: one of `ROWS`.
        ends: the slot behind the last span of each row, int64 ``[B]``.
        prompt: one past the slot of each prompt's last token, int64 ``[B]``; needed for ``last`` alone.
    """
    if rows == "all":
        return None
    if rows == "after":
        return ends
    assert prompt is not None, "who asks for the last rows knows where prompts end"
    return prompt - 1


class _EmphasisSession(Session):
    """One forward with spans."""

    __slots__ = ("prepared",)

    def __init__(self, prepared: _Prepared) -> None:
        self.prepared = prepared

    def edit(self, view: LayerView) -> Edit | Mixture | None:
        """See `Session.edit`."""
        return self.prepared.edit(view)
