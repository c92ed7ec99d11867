"""The policy that edits nothing: the model as it is, with everything that a patch can observe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attnrb.policies.base import LayerPlan, ModelShape, Policy, Session, register_policy

if TYPE_CHECKING:
    from attnrb.text.spans import Spans

__all__ = ["Plain"]


@register_policy
@dataclass(frozen=True)
class Plain(Policy):
    """Edit nothing."""

    name: ClassVar[str] = "plain"

    def resolve(self, shape: ModelShape) -> LayerPlan:
        """See `Policy.resolve`."""
        return _PlainPlan(shape)


class _PlainPlan(LayerPlan):
    def begin(self, spans: Spans | None = None) -> Session:
        return Session()
