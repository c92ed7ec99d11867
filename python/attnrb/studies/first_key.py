"""How much of a model's attention certain keys take, layer by layer: the first one, or those of spans.

In pretrained decoders attention collapses onto the first token, whatever it says. Re-balancing is meant to counter
that, and this measures what it does.

Note: [Share of some keys]
The share of the keys K in a layer is the mean of Σ_{j∈K} w_ij / Σ_j w_ij over all heads and over the queries that see
more than K: for the first key all but the first query, for spans those behind them. w is the attention that the layer
really applies: softmax weights, those of outliers times 1 + g. No n×n matrix is needed: attention is linear in the
values, so the same op with the values v_j = ([j ∈ K], 1) returns (Σ_{j∈K} w_ij, Σ_j w_ij).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from attnrb.hosts.session import AttentionCall
from attnrb.hosts.transformers.patch import patch
from attnrb.policies import Policy
from attnrb.protocols import Model
from attnrb.text.spans import Spans


def first_key_shares(
    model: Model, input_ids: torch.Tensor, policy: Policy, spans: Spans | None = None, prompt_tokens: int | None = None
) -> tuple[float, ...]:
    """Per layer, the mean share of attention on the first key (see Note: [Share of some keys]).

    Args:
        model: an unpatched ``transformers`` causal language model. It is left as it was.
        input_ids: int64 ``[1, n]`` with n ≥ 2: one text without padding.
        policy: what is edited. With `attnrb.policies.Plain` the shares are those of the plain model.
        spans: of the one row, for a policy that heeds them.
        prompt_tokens: how many of the tokens are the prompt, where there are spans.

    Raises:
        ValueError: when `input_ids` is not one text of at least two tokens.
        Exception: whatever `attnrb.patch` raises for a model it cannot serve.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [1, n] with n of at least 2, got {list(input_ids.shape)}")
    keys = torch.arange(input_ids.shape[1], device="cpu") == 0
    return _shares(model, input_ids, policy, keys, 1, spans, prompt_tokens)


def span_shares(
    model: Model, input_ids: torch.Tensor, policy: Policy, spans: Spans, prompt_tokens: int
) -> tuple[float, ...]:
    """Per layer, the mean share of attention on the spans among the tokens behind them.

    Args:
        model: an unpatched ``transformers`` causal language model. It is left as it was.
        input_ids: int64 ``[1, n]``: one text without padding, which goes on behind its last span.
        policy: what is edited. With `attnrb.policies.Plain` the shares are those of the plain model.
        spans: of the one row.
        prompt_tokens: how many of the tokens are the prompt.

    Raises:
        ValueError: there is no span, or no token behind the last one.
        Exception: whatever `attnrb.patch` raises for a model it cannot serve.
    """
    if not spans or spans.slots >= input_ids.shape[1]:
        raise ValueError("spans: expected at least one, and a token behind the last")
    return _shares(model, input_ids, policy, spans.union(input_ids.shape[1])[0], spans.slots, spans, prompt_tokens)


def _shares(
    model: Any,
    input_ids: torch.Tensor,
    policy: Policy,
    keys: torch.Tensor,
    first_query: int,
    spans: Spans | None,
    prompt: int | None,
) -> tuple[float, ...]:
    """The share of ``keys`` (bool ``[n]``) in each layer, over the queries from ``first_query`` on."""
    shares: dict[int, float] = {}

    def observe(call: AttentionCall) -> None:
        batch, key_heads, count, _ = call.key.shape
        value = call.key.new_ones(batch, key_heads, count, 2)
        value[..., 0] = keys.to(value.device, value.dtype)
        chosen, total = call.attention(value)[:, :, first_query:].float().unbind(-1)
        attends = total != 0  # a head that a policy takes out attends to nothing, and has no share
        shares[call.layer] = float((chosen[attends] / total[attends]).mean()) if bool(attends.any()) else 0.0

    with torch.inference_mode(), patch(model, policy, observer=observe) as patched, ExitStack() as stack:
        if spans is not None:
            stack.enter_context(patched.spans(spans, prompt=prompt))
        model(input_ids.to(model.device), use_cache=False)
    return tuple(shares[layer] for layer in sorted(shares))
