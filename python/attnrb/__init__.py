"""Re-balances the attention of a pretrained language model while it runs (arXiv 2403.14932).

    import attnrb
    with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.2, threshold=0.01)):
        model.generate(**inputs)

:func:`patch` serves Hugging Face models, :mod:`attnrb.functional` has the operations on plain tensors, and
:mod:`attnrb.reference` is their definition in NumPy.
"""

from attnrb import _native

_native.load()

from attnrb import functional  # noqa: E402  (needs the native library)
from attnrb._C import release_scratch as _release_scratch  # noqa: E402
from attnrb._C import version as __version__  # noqa: E402
from attnrb.outliers import Outliers  # noqa: E402
from attnrb.visibility import Visibility  # noqa: E402

try:  # replaced by plain imports once both modules stand
    from attnrb.config import RebalanceConfig  # noqa: E402
    from attnrb.patch import Patch, patch  # noqa: E402
except ImportError:
    pass

__all__ = ["Outliers", "Patch", "RebalanceConfig", "Visibility", "__version__", "clear_scratch", "functional", "patch"]


def clear_scratch() -> None:
    """Frees the working memory that the native ops keep between calls; the next call takes what it needs anew."""
    _release_scratch()
