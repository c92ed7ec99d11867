"""How commands load a model: threads first, transformers kept quiet, each step told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnrb.cli.console import quiet_transformers


def set_threads(threads: int | None) -> None:
    """Compute with so many threads; None leaves the default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def load_model(
    model: str | None, dtype: str, threads: int | None, step: Callable[[str], None], *, allow_missing: bool
) -> tuple[Any, Any]:
    """The model and tokenizer that ``--model`` and ``--dtype`` name."""
    step("Starting")
    from attnrb.models import load

    set_threads(threads)
    quiet_transformers()
    return load(model, dtype, allow_missing=allow_missing, progress=step)
