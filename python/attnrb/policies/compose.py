"""Several policies at once, as far as one layer's edits can be joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.policies.base import LayerPlan, LayerView, Mixture, ModelShape, Policy, Request, Session, register_policy

__all__ = ["Compose"]


@register_policy
@dataclass(frozen=True, init=False)
class Compose(Policy):
    """Several policies in one model: ``Compose(Emphasis(strength=8), Rebalance())``.

    Each sees the model as if it were alone. In a layer that several edit, key biases are added up. Where two give gains
    to entries, or biases to different queries, their edits cannot be joined: that raises and names the layer.

    Attributes:
        policies: two or more; a composed policy among them stands for its parts.

    Raises:
        TypeError: one is no policy.
        ValueError: there are fewer than two.
    """

    name: ClassVar[str] = "compose"

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy) -> None:
        parts: list[Policy] = []
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"policies: expected attnrb policies, got {type(policy).__name__}")
            parts += policy.policies if isinstance(policy, Compose) else [policy]
        if len(parts) < 2:
            raise ValueError(f"policies: expected two or more, got {len(parts)}")
        object.__setattr__(self, "policies", tuple(parts))

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> Compose:
        if set(options) != {"policies"} or not isinstance(options["policies"], (list, tuple)):
            raise ValueError(f"options: expected a list of policies under 'policies', got {sorted(options)}")
        return cls(*(Policy.from_dict(each) if isinstance(each, Mapping) else each for each in options["policies"]))

    def label(self) -> str:
        """The labels of its parts, joined by ``+``."""
        return " + ".join(policy.label() for policy in self.policies)

    def resolve(self, shape: ModelShape) -> LayerPlan:
        """See `Policy.resolve`.

        Raises:
            ValueError: two policies look for outliers in one layer, above different thresholds.
        """
        return _ComposedPlan(shape, [policy.resolve(shape) for policy in self.policies])


class _ComposedPlan(LayerPlan):
    def __init__(self, shape: ModelShape, plans: list[LayerPlan]) -> None:
        self.plans = plans
        emits: dict[int, float] = {}
        for plan in plans:
            for layer, threshold in plan.emits.items():
                if emits.setdefault(layer, threshold) != threshold:
                    raise ValueError(
                        f"threshold: two of the composed policies look for outliers of layer {layer}, above "
                        f"{emits[layer]:g} and {threshold:g}; give both the same"
                    )
        sources = [plan.source_layer for plan in plans if plan.source_layer is not None]
        super().__init__(
            shape,
            emits=emits,
            edited=frozenset().union(*(plan.edited for plan in plans)),
            source_layer=sources[0] if sources else None,
            wants_spans=any(plan.wants_spans for plan in plans),
            keeps=any(plan.keeps for plan in plans),
            reads_keys=any(plan.reads_keys for plan in plans),
        )
        self.required |= frozenset().union(*(plan.required for plan in plans))

    def begin(self, request: Request | None = None) -> Session:
        return _ComposedSession([(plan, plan.begin(request)) for plan in self.plans])


class _ComposedSession(Session):
    def __init__(self, parts: list[tuple[LayerPlan, Session]]) -> None:
        self.parts = parts

    def edit(self, view: LayerView) -> Edit | Mixture | None:
        joined: Edit | Mixture | None = None
        for plan, session in self.parts:
            if view.layer in plan.edited:
                edit = session.edit(view)
                joined = edit if joined is None else joined if edit is None else _join(view.layer, joined, edit)
        return joined

    def emitted(self, layer: int, outliers: Outliers) -> None:
        for plan, session in self.parts:
            if layer in plan.emits:
                session.emitted(layer, outliers)


def _join(layer: int, one: Edit | Mixture, other: Edit | Mixture) -> Edit:
    """Both edits of one layer in one.

    Raises:
        ValueError: they cannot be joined.
    """
    if isinstance(one, Mixture) or isinstance(other, Mixture):
        raise ValueError(
            f"policies: a share of attention in layer {layer} cannot be joined with another edit; let the composed "
            "policies edit different layers"
        )
    if one.gain is not None and other.gain is not None:
        raise ValueError(
            f"policies: two of the composed policies strengthen entries of layer {layer} by gains of their own, which "
            "cannot be joined; let them edit different layers"
        )
    gains = one if one.gain is not None else other
    bias, first = one.key_bias, one.first_query
    if bias is None:
        bias, first = other.key_bias, other.first_query
    elif other.key_bias is not None:
        if not _same_rows(one.first_query, other.first_query):
            raise ValueError(
                f"policies: two of the composed policies bias keys of layer {layer} for different queries, which "
                "cannot be joined; give both the same rows"
            )
        bias = _sum(bias, other.key_bias)
    return Edit(outliers=gains.outliers, gain=gains.gain, rule=gains.rule, key_bias=bias, first_query=first)


def _same_rows(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or bool(torch.equal(one, other))
    return one is other or (not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor) and one == other)


def _sum(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Two key biases ``[B|1, H|1, N']``; beyond the shorter one's slots it is 0."""
    slots = max(one.shape[2], other.shape[2])
    padded = [torch.nn.functional.pad(each, (0, slots - each.shape[2])) for each in (one, other)]
    return padded[0] + padded[1]
