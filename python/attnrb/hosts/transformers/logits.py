"""Logits that are no numbers stop a generation: the likeliest of NaN is the first token, and nobody would notice."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor

from attnrb.hosts.transformers.finite import refuse

__all__ = ["FOREIGN", "GREEDY", "ONE_TEXT", "RefuseNaN"]

FOREIGN = ("constraints", "dola_layers", "force_words_ids")
"""Settings of ``generate`` that transformers serves by code from the hub alone, which is never run."""

ONE_TEXT: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    **dict.fromkeys(FOREIGN),
}
"""Settings of ``generate`` under which it returns one row of tokens for each prompt, whatever a model's own say."""

GREEDY: dict[str, Any] = {
    **ONE_TEXT,
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "stop_strings": None,
    "prompt_lookup_num_tokens": None,
    "min_new_tokens": None,
    "min_length": None,
}
"""`ONE_TEXT`, and the likeliest token each time."""


class RefuseNaN(LogitsProcessor):
    """Raises ValueError as soon as a model's logits hold NaN, or no finite number at all."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` as they are, float ``[B, vocabulary]``."""
        # The largest of a row is NaN where one of it is, and −inf where nothing is possible.
        if not bool(torch.isfinite(scores.amax(-1)).all()):
            refuse(f" after {input_ids.shape[-1]:,} tokens")
        return scores
