"""Whether a model knows the tokens that it is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["check_token_ids"]


def check_token_ids(model: Any, ids: Iterable[int]) -> None:
    """Refuse tokens that the model has no row of its embedding for, before they end in an index error.

    Args:
        model: a ``transformers`` model.
        ids: tokens.

    Raises:
        ValueError: a token is unknown to the model, as where a tokenizer was extended and the model was not.
    """
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        weight = getattr(embedding, "weight", None)
        if weight is None:
            return
        rows = weight.shape[0]
    highest = max(ids, default=0)
    if highest >= rows:
        raise ValueError(
            f"tokenizer: it gives the token {highest:,}, but the model's embedding has {rows:,} rows: it belongs to "
            "another model, or tokens were added without resizing the embedding"
        )
