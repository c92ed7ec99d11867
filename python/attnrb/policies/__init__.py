"""Policies: how a layer's attention weights are edited. They know no model and no library that runs one.

Each policy is a file of this package, made known by `register_policy`; `Policy` says what one has to do.
"""

from attnrb.policies.base import (
    LayerPlan,
    LayerView,
    Mixture,
    ModelShape,
    Policy,
    Request,
    Session,
    model_shape,
    policy_class,
    policy_names,
    register_policy,
)
from attnrb.policies.compose import Compose
from attnrb.policies.custom import Custom
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.learned import LearnedGains
from attnrb.policies.learned_emphasis import LearnedEmphasis
from attnrb.policies.plain import Plain
from attnrb.policies.profile import HeadProfile
from attnrb.policies.rebalance import Rebalance
from attnrb.policies.sinks import SinkDamping

__all__ = [
    "Compose",
    "Custom",
    "Emphasis",
    "HeadProfile",
    "LayerPlan",
    "LayerView",
    "LearnedEmphasis",
    "LearnedGains",
    "Mixture",
    "ModelShape",
    "Plain",
    "Policy",
    "Rebalance",
    "Request",
    "Session",
    "SinkDamping",
    "model_shape",
    "policy_class",
    "policy_names",
    "register_policy",
]
