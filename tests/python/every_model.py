"""A tiny random model of any decoder that transformers offers, made by shrinking the defaults of its configuration."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

VOCABULARY = 97
LAYERS = 5

# By attribute name, wherever a configuration has it. What a model calls otherwise usually has an alias among these.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "multi_query_group_num": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "max_position_embeddings": 256,
    "max_seq_len": 256,
    "initializer_range": 0.4,
    "init_std": 0.4,
    "sliding_window": 6,
    "attention_chunk_size": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "zero_expert_num": 2,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # hybrids
    "full_attention_interval": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1, 3],
    "full_attn_idxs": [1, 3],
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "n_mamba_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "lru_width": 32,
    "attention_window_size": 6,
    # encoders with decoders
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    # others
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "query_pre_attn_scalar": 8,
    "dim_model_base": 32,
    "rotary_dim": 4,
    "n_positions": 256,
    "embedding_size": 32,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
}

_TOKENS = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
_SMALL.update(_TOKENS)

_LATENT_ATTENTION = (
    "axk1",
    "axk2",
    "bailing_hybrid",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "minicpm3",
    "youtu",
)
_ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
_ROTATION = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = {"rope_parameters": {**_ROTATION, "mrope_section": [1, 1, 2]}}
_LATENT = {"num_key_value_heads": 4}  # keys and values of latent attention are made for every head
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]}
_DECODER = {"is_decoder": True}  # encoders that also come as decoders

# Where shrinking by name makes a configuration that contradicts itself, or leaves out what is of interest here.
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LATENT_ATTENTION, _LATENT),
    **dict.fromkeys(_ENCODERS, _DECODER),
    **dict.fromkeys(("granitemoehybrid", "nemotron_h"), _MIXED),
    **{name: {"head_dim": 8} for name in ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 256,
        "clip_qkv": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2 + ["conv"], "num_dense_layers": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "longcat_flash": {**_LATENT, "num_layers": 3, "num_hidden_layers": 6, "initializer_range": 0.2},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8, 4]},
    "dots1": {"num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROTATION)},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "reformer": {**_DECODER, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16]},
    "xlnet": {"n_layer": LAYERS, "n_head": 4, "d_head": 8, "d_inner": 48},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _SECTIONS),
    "gemma3": {"mm_tokens_per_image": 4, "image_token_id": 90, "boi_token_id": 91, "eoi_token_id": 92},
    "siglip_vision_model": {"image_size": 32, "patch_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "xlstm": {"num_heads": 4},
    # Experts and gates that amplify rounding would drown what is to be seen.
    "gemma4_text": {"initializer_range": 0.2},
    "minimax": {"initializer_range": 0.1},
    "kimi_linear": {**_LATENT, "initializer_range": 0.2},
}


def tiny_config(name: str) -> Any:
    """The configuration of ``name``, shrunk to thousands of parameters and `LAYERS` layers.

    Raises:
        Exception: whatever the configuration class raises when the sizes do not suit it.
    """
    from transformers import AutoConfig

    small = _shrunk(AutoConfig.for_model(name))
    small.update(_SPECIAL.get(name, {}))
    return AutoConfig.for_model(name, **{key: value for key, value in small.items() if key != "model_type"})


def _shrunk(default: Any) -> dict[str, Any]:
    """Arguments that make a configuration like ``default``, but small; those of its parts as dictionaries."""
    layers = getattr(default, "num_hidden_layers", None)
    small: dict[str, Any] = {}
    for name, value in list(vars(default).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            small[name] = {**_shrunk(value), **_SPECIAL.get(value.model_type, {}), "model_type": value.model_type}
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            small[name] = _fewer(list(value))
    for name, value in _SMALL.items():
        known = _known(default, name)
        if name in _TOKENS and hasattr(default, name):
            small[name] = value
        elif isinstance(known, (list, tuple)) and not isinstance(value, (list, tuple)):
            small[name] = [value] * (LAYERS if len(known) == layers else len(known))
        elif known is not None and not isinstance(getattr(type(default), name, None), property):
            small[name] = value
    return small


def _known(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except AttributeError:
        raise
    except Exception:  # attributes that differ from layer to layer
        return None


def _fewer(values: list[Any]) -> list[Any]:
    """`LAYERS` entries of one value a layer, in which every kind that there is comes by."""
    kinds = list(dict.fromkeys(values)) if all(isinstance(value, str) for value in values) else values
    return [kinds[index % len(kinds)] for index in range(LAYERS)]


def tiny_model(name: str, auto: Any = None) -> Any:
    """A float32 model of this architecture for inference, always with the same weights.

    Args:
        name: the ``model_type``.
        auto: a class like ``AutoModelForCausalLM``, which is the default.

    Raises:
        Exception: whatever transformers raises; ValueError: the model came out large.
    """
    from transformers import AutoModelForCausalLM

    auto = auto or AutoModelForCausalLM
    config = tiny_config(name)
    with torch.device("meta"), contextlib.suppress(RuntimeError, NotImplementedError):
        count = sum(each.numel() for each in auto.from_config(config).parameters())
        if count > 20_000_000:
            raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    # What starts as zeros or as an empty tensor (biases, sinks) would test nothing, and some are never initialised.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.isfinite().all() or bool((parameter == 0).all()):
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 ``[batch, length]``, without the padding token."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
