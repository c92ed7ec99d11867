"""Engines of vLLM and the transformers models that they must equal."""

from __future__ import annotations

import os

# Read when vLLM is imported. One process, so that a failure shows where it happened.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attnrb
import torch
from attnrb import Spans
from attnrb.text.spans import Span

VOCABULARY = 512


@dataclass
class Answer:
    """What a model goes on with: tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def tiny_config(kind: str) -> Any:
    """A tiny random model's configuration. Wide initial values, so that its attention has outliers."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.15,
    }
    if kind == "llama":
        return transformers.LlamaConfig(**common)
    if kind == "qwen3":
        return transformers.Qwen3Config(**common)
    if kind == "mistral":
        return transformers.MistralConfig(**common, sliding_window=48)
    if kind == "gemma3":
        common["num_hidden_layers"] = 6
        kinds = ["sliding_attention", "full_attention"] * 3
        return transformers.Gemma3TextConfig(**common, sliding_window=48, query_pre_attn_scalar=32, layer_types=kinds)
    if kind == "gpt_oss":
        kinds = ["sliding_attention", "full_attention"] * 2
        return transformers.GptOssConfig(
            **common, sliding_window=48, layer_types=kinds, num_local_experts=4, num_experts_per_tok=2
        )
    raise ValueError(kind)


def tiny_model(kind: str, folder: Path) -> Any:
    """The model, float32; it is saved to the folder too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).float().eval()
    if kind == "gpt_oss":  # its sinks start at zero or at random memory
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model


def tiny_prompts() -> list[list[int]]:
    """Prompts of 1 to 230 tokens, three of which begin alike."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    shared = draw(200)
    return [draw(7), shared + draw(9), draw(150), shared + draw(30), draw(4), shared[:100] + draw(40)]


def spans_of(prompts: Sequence[Sequence[int]]) -> list[list[list[Any]]]:
    """One or two spans in each prompt, the second of a strength of its own."""
    found: list[list[list[Any]]] = []
    for prompt in prompts:
        count = len(prompt)
        found.append([[count // 4, count // 4 + 1 + count // 8]])
        if count > 100:
            found[-1].append([count // 2, count // 2 + 5, 3.0])
    return found


def reference(
    model: Any,
    policy: attnrb.Policy | Mapping[str, Any] | None,
    prompts: Sequence[Sequence[int]],
    spans: Sequence[Sequence[Sequence[Any]]] | None = None,
    new: int = 16,
) -> list[Answer]:
    """What transformers with `attnrb.patch` says, one prompt at a time."""
    patch = None if policy is None else attnrb.patch(model, policy)
    found = []
    for index, prompt in enumerate(prompts):
        own = () if spans is None else tuple(Span(*each) for each in spans[index])
        inputs = torch.tensor([list(prompt)])
        options = {"max_new_tokens": new, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        with torch.no_grad():
            if patch is not None and own:
                with patch.spans(Spans((own,)), prompt=len(prompt)):
                    said = model.generate(inputs, **options)
            else:
                said = model.generate(inputs, **options)
        logprobs = [float(scores.float().log_softmax(-1).max()) for scores in said.scores]
        found.append(Answer(said.sequences[0, len(prompt) :].tolist(), logprobs))
    if patch is not None:
        patch.remove()
    return found


@contextmanager
def engine(folder: Path | str, attnrb_options: Any = None, **options: Any) -> Iterator[Any]:
    """An engine of vLLM that is shut down at the end."""
    from vllm import LLM

    usual: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if attnrb_options is not None:
        usual["additional_config"] = {"attnrb": attnrb_options}
    llm = LLM(model=str(folder), **{**usual, **options})
    try:
        yield llm
    finally:
        shutdown(llm)


def shutdown(llm: Any) -> None:
    """End an engine, so that another can start in this process."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def asked(
    llm: Any, prompts: Sequence[Sequence[int]], options: Sequence[Any] | Any = None, new: int = 16
) -> list[Answer]:
    """What an engine says: all prompts in one batch, ``options`` being those of attnrb, for all or for each."""
    from vllm import SamplingParams, TokensPrompt

    each = options if isinstance(options, list) else [options] * len(prompts)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            logprobs=1,
            detokenize=False,
            extra_args=None if one is None else {"attnrb": one},
        )
        for one in each
    ]
    said = llm.generate([TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], params, use_tqdm=False)
    found = []
    for one in said:
        tokens = list(one.outputs[0].token_ids)
        found.append(
            Answer(tokens, [at[token].logprob for at, token in zip(one.outputs[0].logprobs, tokens, strict=True)])
        )
    return found


def differences(found: Sequence[Answer], wanted: Sequence[Answer]) -> tuple[int, float]:
    """How many answers have other tokens, and the largest difference of log-probabilities until they part."""
    others, most = 0, 0.0
    for one, other in zip(found, wanted, strict=True):
        same = next(
            (k for k, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), len(one.tokens)
        )
        others += same < len(one.tokens)
        pairs = zip(one.logprobs[:same], other.logprobs[:same], strict=True)
        most = max([most, *(abs(a - b) for a, b in pairs)])
    return others, most
