"""Re-balancing: an early layer's outliers, strengthened in the layers above it (arXiv 2403.14932)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, cast

import torch

from attnrb.ops.edit import RULES, Edit, EditArguments
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
    short_text,
)
from attnrb.policies.checks import (
    HeadChoice,
    Indices,
    beyond_the_model,
    choose_heads,
    head_choice,
    index,
    indices,
    iterable,
    number,
)

__all__ = ["Rebalance", "RebalanceConfig", "RebalancePlan"]


@register_policy
@dataclass(frozen=True)
class Rebalance(Policy):
    """The options of re-balancing (arXiv 2403.14932, section 3). Layers and heads are numbered from 0.

    Layer ℓ above the source layer strengthens the outliers of its heads by the gain ``g_ℓ = alpha · (1 - ℓ / depth)``;
    the source layer and those before it stay as they are. Sequences may be any iterable and are kept as tuples.

    Attributes:
        alpha: strength of the gains, any finite number. 0 leaves the model's output as it is.
        threshold: attention above which a key is an outlier, between 0 and 1, both excluded.
        source_layer: the layer whose attention decides what the outliers are. In a model that mixes attention with
            other layers, the default 0 means its first attention layer.
        depth: where the gain reaches 0, a positive number. The default, None, means L - 1 for a model of L layers. The
            published code uses 31 for every model. A depth below L - 1 makes the gains of the last layers negative.
        normalize: divide each row of attention by its new sum. The published method does not.
        boost_all: strengthen every entry and not only the outliers (the published code's ``boosting_self``).
        layers: the layers to re-balance, as a list, a range or text such as ``"1-12,15"``; at least one of them above
            the source layer. Those that are not named stay as they are. The default, None, means all.
        heads: the heads to re-balance, written like ``layers``, the same for all layers or as ``{layer: heads}``, where
            a layer that is not named stays as it is. The default, None, means all.
        gains: one gain for each of the model's L layers, in place of ``alpha`` and ``depth``. Those of the source layer
            and of layers before it are not used.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "rebalance"
    file: ClassVar[str] = "rebalance_config.json"

    alpha: float = option(0.2, "Strength: the gain at layer 0.")
    threshold: float = option(0.01, "Attention above which an entry is an outlier.")
    source_layer: int = option(0, "Layer whose outliers are taken.")
    depth: float | None = option(None, "Layer at which the gain reaches 0.", "the last layer")
    normalize: bool = option(False, "Divide each row by its new sum.")
    boost_all: bool = option(False, "Strengthen every entry, not only outliers.")
    layers: Indices | None = option(None, "Layers to re-balance, like 1-12,15.", "all after the source layer")
    heads: HeadChoice | None = option(None, 'Heads to re-balance, like 0-3,8, or {"5": [0, 3]} by layer.', "all")
    gains: Sequence[float] | None = option(None, "One gain for each layer, like 0+0.2+0.1, in place of alpha.", "none")

    def __post_init__(self) -> None:
        # A frozen dataclass is set through object: only here, before anyone else sees it.
        put = object.__setattr__
        put(self, "alpha", number("alpha", self.alpha))
        put(self, "threshold", number("threshold", self.threshold))
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold: expected a number between 0 and 1, both excluded, got {self.threshold}")
        put(self, "source_layer", index("source_layer", self.source_layer))
        if self.depth is not None:
            put(self, "depth", number("depth", self.depth))
            if self.depth <= 0:
                raise ValueError(f"depth: expected a positive number, got {self.depth}")
        for name in ("normalize", "boost_all"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.layers is not None:
            layers = indices("layers", self.layers)
            put(self, "layers", layers)
            if all(layer <= self.source_layer for layer in layers):
                raise ValueError(
                    f"layers: expected at least one above the source layer {self.source_layer}, got {list(layers)}"
                )
        if self.heads is not None:
            put(self, "heads", head_choice("heads", self.heads))
        if isinstance(self.heads, Mapping) and all(layer <= self.source_layer for layer in self.heads):
            raise ValueError(
                f"heads: expected a layer above the source layer {self.source_layer}, got {sorted(self.heads)}"
            )
        if self.gains is not None:
            put(self, "gains", tuple(number("gains", gain) for gain in iterable("gains", self.gains)))

    def __hash__(self) -> int:
        heads = tuple(sorted(self.heads.items())) if isinstance(self.heads, Mapping) else self.heads
        return hash(tuple(heads if field.name == "heads" else getattr(self, field.name) for field in fields(self)))

    def layer_gains(self, layers: int, heads: int) -> tuple[tuple[float, ...] | None, ...]:
        """The gain of every head of every layer.

        Args:
            layers: L, the number of the model's decoder layers.
            heads: H, the number of query heads in each.

        Returns:
            For each of the L layers its H gains, or None where they are all 0 and the layer stays as it is.

        Raises:
            ValueError: an option names a layer or head that the model has not, or ``gains`` has not L entries.
        """
        self._check_range(layers, heads)
        depth = (layers - 1) if self.depth is None else self.depth
        named = cast("tuple[int, ...] | None", self.layers)
        result: list[tuple[float, ...] | None] = []
        for layer in range(layers):
            if layer <= self.source_layer or (named is not None and layer not in named):
                result.append(None)
                continue
            gain = self.alpha * (1 - layer / depth) if self.gains is None else self.gains[layer]
            gains = [0.0] * heads
            for head in choose_heads(self.heads, layer, heads):
                gains[head] = gain
            result.append(tuple(gains) if any(gains) else None)
        return tuple(result)

    def _check_range(self, layers: int, heads: int) -> None:
        if self.source_layer >= layers:
            raise ValueError(f"source_layer: the model's layers are 0 to {layers - 1}, got {self.source_layer}")
        if self.gains is not None and len(self.gains) != layers:
            raise ValueError(f"gains: expected one for each of the model's {layers} layers, got {len(self.gains)}")
        beyond_the_model(self.layers, self.heads, layers, heads)

    def source(self, shape: ModelShape) -> int:
        """The source layer in a model: in one that mixes attention with other layers, 0 means the first with attention.

        Raises:
            ValueError: the model has no such layer, or it has no attention.
        """
        if True not in shape.has_attention:
            raise ValueError("policy: this model has no layer of softmax attention")
        if self.source_layer >= shape.layers or shape.has_attention[self.source_layer]:
            return self.source_layer  # layer_gains refuses one beyond the model
        if self.source_layer > 0:
            raise ValueError(
                f"source_layer: expected a layer with attention, which this model's layer {self.source_layer} has not"
            )
        return shape.has_attention.index(True)

    def resolve(self, shape: ModelShape) -> RebalancePlan:
        """See `Policy.resolve`."""
        gains = self.gain_rows(shape)
        rows = {
            layer: torch.tensor(gain, dtype=torch.float32, device="cpu")
            for layer, gain in enumerate(gains)
            if gain is not None
        }
        return RebalancePlan(self, shape, {layer: PerHead(gain, shape, layer) for layer, gain in rows.items()})

    def gain_rows(self, shape: ModelShape) -> tuple[tuple[float, ...] | None, ...]:
        """The gains of `layer_gains` for this model, with layers left out that have no attention."""
        source = self.source(shape)
        definite = self if source == self.source_layer else replace(self, source_layer=source)
        gains = definite.layer_gains(shape.layers, shape.heads)
        if True not in shape.has_attention[source + 1 :]:
            raise ValueError(
                f"source_layer: this model has no attention above layer {source}, so nothing to re-balance"
            )
        if self.layers is not None or isinstance(self.heads, Mapping):
            return gains  # chosen by name: a layer that turns out to have no attention is an error
        return tuple(gain if has else None for gain, has in zip(gains, shape.has_attention, strict=True))

    def label(self) -> str:
        """The options that are not at their defaults, and always ``alpha``: ``alpha=0.2,normalize=true``."""
        shown = {"alpha": self.alpha, **self._shown_options()}
        if "gains" in shown:
            del shown["alpha"]
        return ",".join(f"{name}={short_text(value)}" for name, value in shown.items())

    def summary(self) -> str:
        """Strength, threshold and what else is not at its default, in words."""
        words = [f"alpha {self.alpha:g}", f"threshold {self.threshold:g}"]
        words += [f"depth {self.depth:g}"] if self.depth is not None else []
        words += [name for name, on in (("normalised", self.normalize), ("every entry", self.boost_all)) if on]
        return ", ".join(words)


RebalanceConfig = Rebalance
"""The name that attnrb 0.1 gave to `Rebalance`."""


class RebalancePlan(LayerPlan):
    """Re-balancing fitted to one model: also for gains that are not the schedule's."""

    def __init__(self, policy: Rebalance, shape: ModelShape, gains: Mapping[int, PerHead]) -> None:
        """``gains``: of the layers that are re-balanced."""
        self.gains = dict(gains)
        self.rule = "row" if policy.normalize else "none"
        source = policy.source(shape)
        # Where every entry is strengthened, nobody needs to know which ones are outliers.
        self.finds = not policy.boost_all
        super().__init__(
            shape,
            emits={source: policy.threshold} if self.finds else {},
            edited=frozenset(self.gains),
            source_layer=source,
            reads_keys=False,
        )
        # float32 [H] by layer, where all layers are on one device and no layer's heads are split.
        whole = shape.local_heads == shape.heads and len(set(shape.devices or ())) <= 1
        self.whole_gains = {layer: gain.whole for layer, gain in self.gains.items()} if whole else {}

    def gain(self, view: LayerView) -> torch.Tensor | None:
        """float32 ``[H]``: the gains of this layer's heads; None for a layer that stays as it is."""
        gains = self.gains.get(view.layer)
        return None if gains is None else gains.of(view)

    def begin(self, request: Request | None = None) -> RebalanceSession:
        """See `LayerPlan.begin`; the request does not matter here."""
        return RebalanceSession(self)


class RebalanceSession(Session):
    """One forward: the source layer's outliers, handed to the layers above it."""

    __slots__ = ("device", "outliers", "plan", "ready")

    def __init__(self, plan: RebalancePlan) -> None:
        self.ready = {}
        self.plan = plan
        self.outliers: Outliers | None = None
        self.device: torch.device | None = None

    def emitted(self, layer: int, outliers: Outliers) -> None:
        """See `Session.emitted`."""
        self.outliers, self.device = outliers, outliers.counts.device
        rule = RULES.index(self.plan.rule)
        self.ready = {
            layer: EditArguments(*outliers, gain, rule)
            for layer, gain in self.plan.whole_gains.items()
            if gain.device == self.device  # else the model was moved since the plan was made
        }

    def edit(self, view: LayerView) -> Edit | None:
        """See `Session.edit`.

        Raises:
            RuntimeError: the source layer has not run.
        """
        gain = self.plan.gain(view)
        if gain is None:
            return None
        if not self.plan.finds:
            return Edit(gain=gain, rule=self.plan.rule)
        outliers = self.outliers
        if outliers is None:
            raise RuntimeError(
                f"layer {view.layer} ran before the source layer {self.plan.source_layer}, which finds the outliers: "
                "attnrb needs the layers of a model to run in order, all through transformers' AttentionInterface. If "
                "that layer was taken out of the model, name another with source_layer"
            )
        if self.device != view.device:
            self.device = view.device
            outliers = self.outliers = Outliers(*(each.to(view.device) for each in outliers))
        return Edit(outliers, gain, self.plan.rule)
