"""Small random models of many architectures: the real classes of transformers, a few thousand parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
LAYERS = 5
WINDOW = 6

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large weights, so that attention differs from key to key as in a trained model and not by chance alone.
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # Text goes on to the limit, so that greedy texts of one length are compared.
    "eos_token_id": None,
}

_ALTERNATING = ["sliding_attention", "full_attention"] * LAYERS

_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]

# What each architecture needs besides, and what it is here for.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},  # every layer windowed
    "qwen2": {},  # biases
    "qwen3": {"head_dim": 16},  # normalised queries and keys, H·D other than the hidden size
    "gemma2": {  # softcap, windows in every other layer, its own scale
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "layer_types": _ALTERNATING[:LAYERS],
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING[:LAYERS]},
    "gpt2": {"n_positions": 256},  # no grouped heads, learnt positions, masks handed on by position
    "gpt_neox": {},
    "gpt_oss": {  # sinks; here the source layer is the full one
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": _ALTERNATING[1 : LAYERS + 1],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "phi": {},
    "phi3": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "olmo2": {},
    "cohere2": {"sliding_window": WINDOW, "layer_types": _ALTERNATING[:LAYERS]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {  # values of another width than keys
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 4,
    },
    "ministral": {"sliding_window": WINDOW, "layer_types": _ALTERNATING[:LAYERS], "head_dim": 8},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma": {"head_dim": 16},
    "stablelm": {},  # its layers drop keyword arguments
    "olmo": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _ALTERNATING[:LAYERS]},
    "granite": {},
    "cohere": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "exaone4": {"sliding_window": WINDOW, "layer_types": _ALTERNATING[:LAYERS]},
    "nemotron": {},
    "qwen3_next": {  # attention in some layers only, as below
        "layer_types": _MIXED,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "granitemoehybrid": {
        "layer_types": _MIXED,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "llama4_text": {  # attention in chunks
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
    },
}
if transformers.__version__ < "5":
    del ARCHITECTURES["granitemoehybrid"]  # it makes masks of its own there, which the oracle cannot read

HYBRIDS = ("qwen3_next", "granitemoehybrid")


def source_layer(name: str) -> int:
    """The first layer with attention."""
    return _MIXED.index("full_attention") if name in HYBRIDS else 0


@cache
def _weights(name: str, changes: tuple[tuple[str, Any], ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(name, **{**_COMMON, **ARCHITECTURES[name], **dict(changes)})
    except (KeyError, ValueError):
        pytest.skip(f"this version of transformers has no {name}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if any(type(module).__name__.endswith("SdpaAttention") for module in model.modules()):
        pytest.skip(f"in this version of transformers {name} computes attention by itself")
    # What starts as zeros or as an empty tensor (biases, sinks) would test nothing, and some are never initialised.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.isfinite().all() or bool((parameter == 0).all()):
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return config, model.state_dict()


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A new model of this architecture, with changes of its configuration, always with the same weights."""
    import copy

    from transformers import AutoModelForCausalLM

    config, weights = _weights(name, tuple(changes.items()))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 ``[batch, length]``, without the padding token."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
