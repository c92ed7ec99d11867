"""attnrb inside vLLM against vLLM's own attention: tokens a second, and the time to a first and to a next token.

    OMP_NUM_THREADS=2 python bench/python/bench_vllm.py --dtype bfloat16 --json vllm.json

It needs the environment of ``make test-vllm``. Each engine is a process of its own; the two take turns, round after
round, so that whatever slows the machine slows both. Before anything is timed, plain attnrb must say what vLLM says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 4096
# name: prompts, tokens of each, new tokens of each
CASES: dict[str, tuple[int, int, int]] = {
    "prefill 2048": (1, 2048, 1),
    "decode 8": (8, 64, 64),
    "decode 32": (32, 64, 64),
    "mixed": (12, 384, 32),
}
CONTENDERS: dict[str, Any] = {
    "vLLM": None,
    "attnrb off": "off",
    "re-balanced": {"policy": "rebalance", "alpha": 0.2},
}


def save_model(name: str, folder: Path, dtype: str) -> None:
    """``smollm2``, or ``wide``: two layers with the widths of a model of 7 billion weights, random."""
    import torch

    if name == "smollm2":
        import attnrb.models

        model, _ = attnrb.models.load(dtype=dtype)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=4096,
            intermediate_size=4096,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        factory: Any = AutoModelForCausalLM
        model = factory.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)


def serve(folder: str, options: Any, dtype: str, waiting: Any) -> None:
    """One engine, in a process of its own: takes the name of a case, and answers with seconds and tokens."""
    from vllm import LLM, SamplingParams

    additional = {} if options is None else {"attnrb": options}
    llm = LLM(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=2304,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
        additional_config=additional,
    )
    waiting.send("ready")
    while (case := waiting.recv()) is not None:
        count, length, new = CASES[case]
        prompts = [
            {"prompt_token_ids": [3 + (each * 131 + at * 17) % (VOCABULARY - 3) for at in range(length)]}
            for each in range(count)
        ]
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        said = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        waiting.send((seconds, [list(each.outputs[0].token_ids) for each in said]))


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of tokens that are equal up to where two answers part."""
    same = total = 0
    for a, b in zip(one, other, strict=True):
        total += len(a)
        same += next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / total


def measure(folder: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """All contenders in turn, for each case."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, options in CONTENDERS.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(folder, options, dtype, theirs))
        process.start()
        processes.append(process)
        pipes[name].recv()
    found = []
    for case, (count, length, new) in CASES.items():
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        said: dict[str, list[list[int]]] = {}
        for turn in range(rounds + 1):
            names = list(CONTENDERS)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                pipes[name].send(case)
                taken, said[name] = pipes[name].recv()
                if turn:  # the first warms up
                    seconds[name].append(taken)
        same = agreement(said["vLLM"], said["attnrb off"])
        if dtype == "float32" and same < 0.99:
            sys.exit(f"{case}: attnrb says something else than vLLM: {same:.0%} of the tokens are equal")
        tokens = count * (length + new)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        for name, median in medians.items():
            found.append(
                {
                    "case": case,
                    "contender": name,
                    "seconds": median,
                    "all": seconds[name],
                    "tokens_per_second": tokens / median,
                    "of_vllm": medians["vLLM"] / median,
                    "equal_to_vllm": agreement(said["vLLM"], said[name]),
                }
            )
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    from machine import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "wide"], default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(asked.model, Path(folder), asked.dtype)
        found = measure(folder, asked.dtype, asked.rounds)
    print(f"{'case':<14} {'contender':<12} {'seconds':>8} {'tokens/s':>9} {'of vLLM':>8} {'equal':>6}")
    for each in found:
        print(
            f"{each['case']:<14} {each['contender']:<12} {each['seconds']:>8.3f} {each['tokens_per_second']:>9.0f} "
            f"{each['of_vllm']:>8.2f} {each['equal_to_vllm']:>6.0%}"
        )
    if asked.json is not None:
        about = {"machine": describe(), "model": asked.model, "dtype": asked.dtype, "rounds": asked.rounds}
        asked.json.write_text(json.dumps({**about, "results": found}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
