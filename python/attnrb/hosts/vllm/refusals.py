"""What of vLLM cannot be served, by name, and the shape of the model that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnrb.policies.base import ModelShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["refuse", "refuse_layer", "shape_of"]


def shape_of(config: VllmConfig, rank: int = 0, ranks: int = 1) -> ModelShape:
    """The shape of an engine's model, as policies see it.

    Args:
        config: of the engine.
        rank: of this process among those that share the heads of a layer.
        ranks: how many there are.
    """
    model = config.model_config
    heads = int(model.hf_text_config.num_attention_heads)
    return ModelShape(int(model.get_total_num_hidden_layers()), heads, shard=(rank, ranks))


def refuse(config: VllmConfig) -> None:
    """Raise for what attnrb does not serve.

    Raises:
        ValueError: with all of it.
    """
    found = list(_refused(config))
    if found:
        raise ValueError(f"attnrb does not serve {', nor '.join(found)}; take 'attnrb' out of additional_config")


def refuse_layer(*, alibi: bool, cache_dtype: str | None, other_type: str | None) -> None:
    """Raise for a layer that attnrb does not serve, which shows only where the model is made.

    Args:
        alibi: it has position biases.
        cache_dtype: of a quantised cache.
        other_type: of attention, where it is not a decoder's.

    Raises:
        ValueError: naming what it has.
    """
    for refused, name in (
        (alibi, "position biases (alibi)"),
        (cache_dtype is not None, f"quantised caches ({cache_dtype})"),
        (other_type is not None, f"attention of the type {other_type}"),
    ):
        if refused:
            raise ValueError(f"attnrb does not serve {name}; take 'attnrb' out of additional_config")


def _refused(config: VllmConfig) -> Iterator[str]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    text = model.hf_text_config
    yield from _platform(config)
    for refused, name in (
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism (pipeline_parallel_size)"),
        (_above_one(parallel, "decode_context_parallel_size"), "decode context parallelism"),
        (_above_one(parallel, "prefill_context_parallel_size"), "prefill context parallelism"),
        (bool(getattr(parallel, "enable_dbo", False)), "two batches at once (enable_dbo)"),
        (config.speculative_config is not None, "speculative decoding (speculative_config)"),
        (getattr(config, "kv_transfer_config", None) is not None, "KV connectors (kv_transfer_config)"),
        (str(cache.cache_dtype).startswith(("fp8", "int", "nvfp")), f"quantised caches ({cache.cache_dtype})"),
        (bool(getattr(cache, "kv_sharing_fast_prefill", False)), "kv_sharing_fast_prefill"),
        (bool(model.use_mla), "multi-head latent attention (MLA)"),
        (model.runner_type == "pooling", "pooling models"),
        (bool(model.is_encoder_decoder), "encoder-decoder models"),
        (bool(model.is_attention_free), "models without attention"),
        (bool(model.is_hybrid), "models that mix attention with other layers"),
        (bool(getattr(model, "is_mm_prefix_lm", False)), "models whose image tokens see each other"),
        (getattr(text, "attention_chunk_size", None) is not None, "attention in chunks (attention_chunk_size)"),
        (bool(getattr(text, "alibi", False)), "position biases (alibi)"),
    ):
        if refused:
            yield name


def _platform(config: VllmConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    if not current_platform.is_cuda():
        yield f"the platform {current_platform.device_type}"
    elif getattr(backend, "name", None) != "CUSTOM":
        chosen = getattr(backend, "name", "that vLLM chooses")
        yield f"the attention backend {chosen} (start with --attention-backend CUSTOM)"
    elif bool(getattr(config, "use_v2_model_runner", False)):
        yield "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)"


def _above_one(options: Any, name: str) -> bool:
    return int(getattr(options, name, 1) or 1) > 1
