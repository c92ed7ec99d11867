"""What vLLM calls in each of its processes: entry point ``vllm.general_plugins``.

Note: [How vLLM is reached]
- The backend is registered in place of ``CPU_ATTN``, which vLLM looks up through its registry on the CPU, and as
  ``CUSTOM`` for GPUs. An engine whose ``additional_config`` has no ``attnrb`` runs vLLM's own code.
- ``EngineArgs.create_engine_config`` is wrapped: it is the one place that every engine's options pass before anything
  starts. The listener is named there among the logits processors, and what cannot be served is refused.
- ``InputProcessor.process_inputs`` is wrapped: each request passes it with its tokens, in the process that answers.
- Which request sits in which row is told to logits processors before each step (`attnrb.hosts.vllm.listener`). No class
  is named in the entry point ``vllm.logits_processors``: it would concern every engine of whoever has attnrb installed.

`INTERFACE` lists the names that are used, and a test says which of them moved.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

__all__ = ["INTERFACE", "TRIED", "missing_interface", "register"]

TRIED = ("0.31", "0.32")
"""The minor versions of vLLM that attnrb was tried with, oldest first."""

INTERFACE: dict[str, tuple[str, ...]] = {
    "vllm.config": ("VllmConfig", "get_current_vllm_config"),
    "vllm.distributed.parallel_state": (
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
    ),
    "vllm.engine.arg_utils": ("EngineArgs.create_engine_config",),
    "vllm.exceptions": ("VLLMValidationError",),
    "vllm.forward_context": ("get_forward_context", "ForwardContext.additional_kwargs"),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.model_executor.models.utils": ("extract_layer_index",),
    "vllm.platforms": ("current_platform",),
    "vllm.v1.attention.backend": (
        "AttentionType.DECODER",
        "CommonAttentionMetadata.block_table_tensor",
        "CommonAttentionMetadata.causal",
        "CommonAttentionMetadata.num_actual_tokens",
        "CommonAttentionMetadata.num_reqs",
        "CommonAttentionMetadata.query_start_loc",
        "CommonAttentionMetadata.seq_lens",
    ),
    "vllm.v1.attention.backends.cpu_attn": (
        "CPUAttentionBackend.get_builder_cls",
        "CPUAttentionBackend.get_impl_cls",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        "CPUAttentionBackendImpl.forward",
        "CPUAttentionMetadataBuilder.build",
    ),
    "vllm.v1.attention.backends.registry": (
        "AttentionBackendEnum.CPU_ATTN",
        "AttentionBackendEnum.CUSTOM",
        "register_backend",
    ),
    "vllm.v1.engine": ("EngineCoreRequest.cache_salt", "EngineCoreRequest.prompt_token_ids"),
    "vllm.v1.engine.input_processor": ("InputProcessor.process_inputs",),
    "vllm.v1.sample.logits_processor": (
        "BatchUpdate.added",
        "BatchUpdate.moved",
        "BatchUpdate.removed",
        "LogitsProcessor.update_state",
        "MoveDirectionality.SWAP",
    ),
}
"""What attnrb uses of vLLM: for each module its names, those of classes with a dot."""

_BACKEND = "attnrb.hosts.vllm.backend.Backend"
_CUDA_BACKEND = "attnrb.hosts.vllm.backend_cuda.Backend"
_LISTENER = "attnrb.hosts.vllm.listener:Listener"


def missing_interface() -> list[str]:
    """What this vLLM has not of `INTERFACE`."""
    missing = []
    for module, names in INTERFACE.items():
        try:
            loaded = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not _has(loaded, name)]
    return missing


def _has(found: Any, name: str) -> bool:
    for part in name.split("."):
        if part in getattr(found, "__annotations__", {}) or part in getattr(found, "__struct_fields__", ()):
            return True
        found = getattr(found, part, None)
        if found is None:
            return False
    return True


def register() -> None:
    """Make attnrb known to vLLM. A second call does nothing."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(EngineArgs.create_engine_config, "attnrb", False):
        return
    for backend, ours in ((AttentionBackendEnum.CPU_ATTN, _BACKEND), (AttentionBackendEnum.CUSTOM, _CUDA_BACKEND)):
        if not backend.is_overridden():  # else by another plugin: an engine that asks for attnrb finds that out
            register_backend(backend, ours)
    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(InputProcessor, "process_inputs", _process_inputs)


def _wrap(owner: type, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    wrapped.attnrb = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _create_engine_config(original: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    from attnrb.hosts.vllm.admission import Admission, options_of
    from attnrb.hosts.vllm.asked import engine_policy
    from attnrb.hosts.vllm.refusals import refuse

    options = options_of(args)
    if options is None:
        return original(args, *rest, **kwargs)
    _check_version()
    engine_policy(options)  # a mistake there should not wait for the model's configuration
    processors = list(args.logits_processors or ())
    args.logits_processors = processors if _LISTENER in processors else [*processors, _LISTENER]
    config = original(args, *rest, **kwargs)
    refuse(config)
    Admission(config)
    return config


def _process_inputs(original: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    from attnrb.hosts.vllm.admission import admit

    request = original(processor, *args, **kwargs)
    try:
        admit(processor.vllm_config, request)
    except ValueError as error:
        raise _refusal()(str(error)) from error
    return request


@functools.cache
def _refusal() -> type[ValueError]:
    """A ValueError of which vLLM's server makes HTTP 400; of any other it makes 500 and an empty message."""
    from vllm.exceptions import VLLMValidationError

    return type("RequestRefused", (VLLMValidationError, ValueError), {"__module__": __name__})


def _check_version() -> None:
    if missing := missing_interface():
        import vllm

        raise RuntimeError(
            f"attnrb was tried with vLLM {' and '.join(TRIED)}; this one, {vllm.__version__}, has no {missing[0]}"
        )
