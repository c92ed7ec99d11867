"""Whether a model knows the tokens that it is given, and what tells tokenizers apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["check_token_ids", "describe"]

_OF_THE_LAST_CALL = ("truncation", "padding")  # what a fast tokenizer notes of how it was called


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


def describe(tokenizer: Any) -> str:
    """All that decides which tokens a text becomes, as text: rules, vocabulary, special tokens and chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    else:
        rules = {name: rule for name, rule in json.loads(backend.to_str()).items() if name not in _OF_THE_LAST_CALL}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    return json.dumps([rules, special, template], sort_keys=True, default=str)
