"""Rewrites the attention of a pretrained language model while it runs, at the speed of plain attention.

    import attnrb
    with attnrb.patch(model, attnrb.Rebalance(alpha=0.2, threshold=0.01)):
        model.generate(**inputs)

`patch` serves Hugging Face models, `attnrb.functional` has the operations on plain tensors, and
`attnrb.reference` is their definition in NumPy. `attnrb.models` loads a model, `attnrb.analysis` shows where attention
goes, `attnrb.evaluation` asks whether an edit helps, and `attnrb.studies` compares and generates; these are imported
when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from attnrb.ops import _native  # noqa: F401 (registers the native ops, which what follows needs)

# isort: split
from attnrb import functional
from attnrb.hosts.session import AttentionCall
from attnrb.hosts.transformers.patch import Patch, patch, patched, unpatch
from attnrb.ops.edit import Attended, Edit
from attnrb.ops.library import release_scratch as _release_scratch
from attnrb.ops.library import version as _version
from attnrb.ops.outliers import Outliers
from attnrb.ops.paging import Paging
from attnrb.ops.visibility import Visibility
from attnrb.policies import (
    Compose,
    Custom,
    Emphasis,
    HeadProfile,
    LearnedEmphasis,
    LearnedGains,
    Policy,
    Rebalance,
    SinkDamping,
    register_policy,
)
from attnrb.policies.rebalance import RebalanceConfig
from attnrb.text import Marked, Span, Spans, find_spans, mark, spans

__all__ = [
    "Attended",
    "AttentionCall",
    "Compose",
    "Custom",
    "Edit",
    "Emphasis",
    "HeadProfile",
    "LearnedEmphasis",
    "LearnedGains",
    "Marked",
    "Outliers",
    "Paging",
    "Patch",
    "Policy",
    "Rebalance",
    "RebalanceConfig",
    "SinkDamping",
    "Span",
    "Spans",
    "Visibility",
    "__version__",
    "clear_scratch",
    "find_spans",
    "functional",
    "mark",
    "patch",
    "patched",
    "profile_heads",
    "register_policy",
    "spans",
    "unpatch",
]

__version__ = _version()

if TYPE_CHECKING:
    from attnrb import analysis, evaluation, models, studies  # noqa: F401
    from attnrb.studies.profile import profile_heads

# What stands on everything else, or takes seconds, is imported when somebody asks for it.
_LATE_MODULES = ("analysis", "evaluation", "models", "reference", "studies")
_MODULES = (*_LATE_MODULES, "functional", "policies", "protocols", "text")


def __getattr__(name: str) -> Any:
    if name == "profile_heads":
        from attnrb.studies.profile import profile_heads

        return profile_heads
    if name in _LATE_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # What users are meant to find, whether it is imported yet or not: also what `help` and completion show.
    return sorted({*__all__, *_MODULES, *(each for each in globals() if each.startswith("__"))})


def clear_scratch() -> None:
    """Frees the working memory that the native ops keep between calls; the next call takes it again."""
    _release_scratch()
