"""The weights of attention as a layer applies them, whatever edits it."""

from __future__ import annotations

import torch

from attnrb.ops import functional
from attnrb.ops.edit import Edit
from attnrb.policies.base import LayerView, Mixture

__all__ = ["applied_weights"]


def applied_weights(view: LayerView, edit: Edit | Mixture | None) -> torch.Tensor:
    """The weights ``[B, H, M, N]`` as a layer applies them, in the dtype of its query."""
    if not isinstance(edit, Mixture):
        return functional.attention_weights(view.query, view.key, edit=edit, **view.scores)
    split = edit.parts(view)
    lse = [functional.attention(view.query, view.key, view.key, edit=each, **scores).lse for each, scores in split]
    shares = edit.weigh(lse, view)
    parts = [functional.attention_weights(view.query, view.key, edit=each, **scores) for each, scores in split]
    mixed = sum(share[..., None] * part for share, part in zip(shares, parts, strict=True))
    assert isinstance(mixed, torch.Tensor)
    return mixed.to(view.query.dtype)
