"""How much of a model's attention its first key takes, layer by layer.

In pretrained decoders attention collapses onto the first token, whatever it says. Re-balancing is meant to counter
that, and this measures what it does.

Note: [First-key share]
The share of key 0 in a layer is the mean of w_i0 / Σ_j w_ij over all heads and all queries but the first, which sees
no other key. w is the attention that the layer really applies: softmax weights, those of outliers times 1 + g. No n×n
matrix is needed: attention is linear in the values, so the same op with the values v_j = ([j = 0], 1) returns
(w_i0, Σ_j w_ij).
"""

from __future__ import annotations

from typing import Any

import torch

from attnrb.hosts.session import AttentionCall
from attnrb.hosts.transformers.patch import patch
from attnrb.policies import Policy


def first_key_shares(model: Any, input_ids: torch.Tensor, policy: Policy) -> tuple[float, ...]:
    """Per layer, the mean share of attention on the first key (see Note: [First-key share]).

    Args:
        model: an unpatched ``transformers`` causal language model. It is left as it was.
        input_ids: int64 ``[1, n]`` with n ≥ 2: one text without padding.
        policy: what is edited. With `attnrb.policies.Plain` the shares are those of the plain model.

    Raises:
        ValueError: when `input_ids` is not one text of at least two tokens.
        Whatever `attnrb.patch` raises for a model it cannot serve.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [1, n] with n of at least 2, got {list(input_ids.shape)}")
    shares: dict[int, float] = {}

    def observe(call: AttentionCall) -> None:
        shares[call.layer] = _share(call)

    with torch.inference_mode(), patch(model, policy, observer=observe):
        model(input_ids.to(model.device), use_cache=False)
    return tuple(shares[layer] for layer in sorted(shares))


def _share(call: AttentionCall) -> float:
    batch, key_heads, keys, _ = call.key.shape
    value = call.key.new_zeros(batch, key_heads, keys, 2)
    value[:, :, 0, 0] = 1
    value[..., 1] = 1
    first, total = call.attention(value).float().unbind(-1)
    return float((first / total)[..., 1:].mean())
