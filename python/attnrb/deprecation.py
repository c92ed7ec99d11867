"""How something public goes: docs/deprecation.md says when, and this is what it calls."""

from __future__ import annotations

import warnings

__all__ = ["deprecated"]


def deprecated(name: str, instead: str, *, removed_in: str) -> None:
    """Warn whoever called the caller that what they use will go.

    Args:
        name: what is used, as its user writes it.
        instead: what to write in its place, as part of a sentence.
        removed_in: the version without it, such as ``"0.4.0"``. A test fails once the package has this version.
    """
    # A FutureWarning is shown by default wherever it arises, once for each line of the user's.
    warnings.warn(
        f"{name} is deprecated and will be removed in attnrb {removed_in}: use {instead}", FutureWarning, stacklevel=3
    )
