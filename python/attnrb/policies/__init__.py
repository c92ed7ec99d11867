"""Policies: how a layer's attention weights are edited. They know no model and no library that runs one.

Each policy is a file of this package, made known by `register_policy`; `Policy` says what one has to do.
"""

from attnrb.policies.base import (
    LayerPlan,
    LayerView,
    ModelShape,
    Policy,
    Session,
    model_shape,
    policy_class,
    policy_names,
    register_policy,
)
from attnrb.policies.compose import Compose
from attnrb.policies.learned import LearnedGains
from attnrb.policies.plain import Plain
from attnrb.policies.rebalance import Rebalance

__all__ = [
    "Compose",
    "LayerPlan",
    "LayerView",
    "LearnedGains",
    "ModelShape",
    "Plain",
    "Policy",
    "Rebalance",
    "Session",
    "model_shape",
    "policy_class",
    "policy_names",
    "register_policy",
]
