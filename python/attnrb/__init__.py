"""Rewrites the attention of a pretrained language model while it runs, at the speed of plain attention.

    import attnrb
    with attnrb.patch(model, attnrb.Rebalance(alpha=0.2, threshold=0.01)):
        model.generate(**inputs)

:func:`patch` serves Hugging Face models, :mod:`attnrb.functional` has the operations on plain tensors, and
:mod:`attnrb.reference` is their definition in NumPy.
"""

from attnrb.ops import _native  # noqa: F401 (registers the native ops, which what follows needs)

# isort: split
from attnrb import functional
from attnrb._C import release_scratch as _release_scratch
from attnrb._C import version as __version__
from attnrb.hosts.session import AttentionCall
from attnrb.hosts.transformers.patch import Patch, patch, patched, unpatch
from attnrb.ops.edit import Attended, Edit
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import Visibility
from attnrb.policies import Compose, LearnedGains, Policy, Rebalance, register_policy
from attnrb.policies.rebalance import RebalanceConfig

__all__ = [
    "Attended",
    "AttentionCall",
    "Compose",
    "Edit",
    "LearnedGains",
    "Outliers",
    "Patch",
    "Policy",
    "Rebalance",
    "RebalanceConfig",
    "Visibility",
    "__version__",
    "clear_scratch",
    "functional",
    "patch",
    "patched",
    "register_policy",
    "unpatch",
]


def clear_scratch() -> None:
    """Frees the working memory that the native ops keep between calls; the next call takes what it needs anew."""
    _release_scratch()
