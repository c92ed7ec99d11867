"""Re-balances the attention of a pretrained language model while it runs (arXiv 2403.14932).

    import attnrb
    with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.2, threshold=0.01)):
        model.generate(**inputs)

:func:`patch` serves Hugging Face models, :mod:`attnrb.functional` has the operations on plain tensors, and
:mod:`attnrb.reference` is their definition in NumPy.
"""

from attnrb.ops import _native  # noqa: F401 (registers the native ops, which what follows needs)

# isort: split
from attnrb import functional
from attnrb._C import release_scratch as _release_scratch
from attnrb._C import version as __version__
from attnrb.hosts.transformers.patch import Patch, patch
from attnrb.ops.edit import Attended, Edit
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import Visibility
from attnrb.policies.learned import LearnedGains
from attnrb.policies.rebalance import RebalanceConfig

__all__ = [
    "Attended",
    "Edit",
    "LearnedGains",
    "Outliers",
    "Patch",
    "RebalanceConfig",
    "Visibility",
    "__version__",
    "clear_scratch",
    "functional",
    "patch",
]


def clear_scratch() -> None:
    """Frees the working memory that the native ops keep between calls; the next call takes what it needs anew."""
    _release_scratch()
