"""A policy that is a function, for ideas that are not yet a class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.policies.base import LayerPlan, LayerView, Mixture, ModelShape, Policy, Request, Session
from attnrb.policies.checks import beyond_the_model, index, indices, number

__all__ = ["Custom"]


@dataclass(frozen=True, init=False)
class Custom(Policy):
    """Edit by a function, called once for each layer in each forward.

        def first_token_twice(view):
            bias = torch.zeros(1, 1, 1, device=view.device)
            return attnrb.Edit(key_bias=bias + math.log(2))

        with attnrb.patch(model, attnrb.Custom(first_token_twice)): ...

    It lives as long as the program: a function cannot be written to a file. A policy that can is a class of its own,
    made known by `attnrb.register_policy`.

    Attributes:
        function: takes a `attnrb.policies.LayerView` and returns an `attnrb.Edit`, an `attnrb.policies.Mixture`, or
            None for a layer that stays as it is. With ``emits`` it takes a second argument: the outliers that layers of
            this forward reported so far, ``{layer: attnrb.Outliers}``.
        called: how it is shown.
        emits: layers that report their outliers, with the threshold of each.
        layers: the layers it is called for. None: all with attention.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of range.
    """

    name: ClassVar[str] = "custom"

    function: Callable[..., Edit | Mixture | None]
    called: str
    emits: tuple[tuple[int, float], ...]
    layers: tuple[int, ...] | None

    def __init__(
        self,
        function: Callable[..., Edit | Mixture | None],
        *,
        name: str | None = None,
        emits: Mapping[int, float] | None = None,
        layers: Iterable[int] | str | None = None,
    ) -> None:
        """``name``: how it is shown; default: the function's own name."""
        if not callable(function):
            raise TypeError(f"function: expected a function of a layer's view, got {type(function).__name__}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name: expected text, got {name!r}")
        if emits is not None and not isinstance(emits, Mapping):
            raise TypeError(f"emits: expected a mapping from layers to thresholds, got {type(emits).__name__}")
        put = object.__setattr__
        put(self, "function", function)
        put(self, "called", name if name is not None else getattr(function, "__name__", "custom"))
        thresholds = {index("emits", layer): number("emits", each) for layer, each in (emits or {}).items()}
        if outside := [each for each in thresholds.values() if not 0.0 < each < 1.0]:
            raise ValueError(f"emits: expected thresholds between 0 and 1, both excluded, got {outside}")
        put(self, "emits", tuple(sorted(thresholds.items())))
        put(self, "layers", None if layers is None else indices("layers", layers))

    def resolve(self, shape: ModelShape) -> LayerPlan:
        """See `Policy.resolve`."""
        beyond_the_model(self.layers, None, shape.layers, shape.heads)
        if beyond := [layer for layer, _ in self.emits if layer >= shape.layers]:
            raise ValueError(f"emits: the model's layers are 0 to {shape.layers - 1}, got {beyond}")
        with_attention = (layer for layer, has in enumerate(shape.has_attention) if has)
        return _CustomPlan(self, shape, frozenset(with_attention if self.layers is None else self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Refused.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"policy: {self.called!r} is a function, which cannot be written to a file; make it a class derived from "
            "attnrb.Policy, with the decorator attnrb.register_policy"
        )

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> Custom:
        raise TypeError("options: a Custom policy is a function, which cannot be read from a file")

    def label(self) -> str:
        """Its name."""
        return self.called


class _CustomPlan(LayerPlan):
    def __init__(self, policy: Custom, shape: ModelShape, edited: frozenset[int]) -> None:
        super().__init__(shape, emits=dict(policy.emits), edited=edited)
        self.policy = policy

    def begin(self, request: Request | None = None) -> Session:
        return _CustomSession(self.policy)


class _CustomSession(Session):
    def __init__(self, policy: Custom) -> None:
        self.policy = policy
        self.found: dict[int, Outliers] = {}

    def emitted(self, layer: int, outliers: Outliers) -> None:
        self.found[layer] = outliers

    def edit(self, view: LayerView) -> Edit | Mixture | None:
        policy = self.policy
        edit = policy.function(view, self.found) if policy.emits else policy.function(view)
        if edit is not None and not isinstance(edit, (Edit, Mixture)):
            raise TypeError(
                f"function: expected {policy.called!r} to return an attnrb.Edit, an attnrb.policies.Mixture or None, "
                f"got {type(edit).__name__}"
            )
        return edit
