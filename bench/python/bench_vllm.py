"""attnrb inside vLLM against vLLM's own attention: tokens a second, and the time to a first and to a next token.

    OMP_NUM_THREADS=2 python bench/python/bench_vllm.py [--quick] [--model NAME]... [--dtype NAME]... [--seconds N]
        [--json FILE]

It needs the environment of ``make test-vllm``. For each model and dtype two engines run, vLLM's own and one with
attnrb, each in a process of its own; contenders take turns, round after round, so that whatever slows the machine slows
all. What they say is verified before anything is timed: in float32 plain attnrb must say what vLLM says, and a mixed
batch what its requests say one by one; and re-balancing must change what is said, or else nothing was edited. Exit
status 1 means that something was wrong.

"x vLLM" is the rate of tokens over vLLM's own; the aim of re-balancing is 0.95. Beside it stands what a user waits for:
for the first token of a prefill, for each token while decoding. The whole takes nine minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 4096
BLOCK = 128  # rows of a block of cached keys: vLLM's usual size on the CPU


class Case(NamedTuple):
    """One load: so many prompts of so many tokens, each going on for so many new ones.

    Attributes:
        cached: whether the prompts were read before, so that what is timed is the decoding. Whole blocks are cached,
            and never a prompt's last token.
        texts: how many different beginnings the prompts have, a block each; 0: all are different.
        first: how many prompts come at once. One more comes with each step, so that prompts are read while others are
            answered. 0: all come at once.
    """

    prompts: int
    tokens: int
    new: int
    cached: bool
    texts: int = 0
    first: int = 0

    def computed(self) -> int:
        """How many tokens a run computes."""
        return self.prompts * ((0 if self.cached else self.tokens) + self.new)

    def reused(self) -> int:
        """How many tokens of the prompts were read before."""
        return self.prompts * ((self.tokens - 1) // BLOCK * BLOCK) if self.cached else 0


CASES = {
    "prefill 2048": Case(1, 2048, 1, False),
    "decode 8": Case(8, 257, 12, True),
    "decode 32": Case(32, 129, 8, True, 8),
    "mixed": Case(6, 128, 8, False, first=2),
}
REBALANCE = {"policy": "rebalance", "alpha": 0.2}
# What the requests of a run ask for, in turn; None: of vLLM's own engine.
CONTENDERS: dict[str, list[Any] | None] = {
    "vLLM": None,
    "attnrb, off": ["off"],
    "re-balanced": [REBALANCE],
    "five policies": [
        "off",
        REBALANCE,
        {**REBALANCE, "alpha": 1.0, "heads": [0, 2]},
        {"policy": "emphasis", "strength": 4, "spans": [[2, 6]]},
        {"policy": "emphasis", "strength": 2, "rows": "all", "spans": [[4, 9]]},
    ],
}


def save_model(name: str, folder: Path, dtype: str) -> None:
    """``smollm2``, or ``wide``: random layers whose attention has the widths of a model of 7 billion weights.

    There are four of them: of two, re-balancing would strengthen none, since the last layer's gain is 0. Their queries
    and keys are twice as long as random ones, so that scores spread as in a trained model: among short ones no weight
    is above the threshold, and nothing would be strengthened either.
    """
    import torch

    if name == "smollm2":
        import attnrb.models

        model, _ = attnrb.models.load(dtype=dtype)
    else:
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=2048,
            intermediate_size=4096,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        factory: Any = AutoModelForCausalLM
        model = factory.from_config(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= 2
                layer.self_attn.k_proj.weight *= 2
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)


def contenders_of(case: Case) -> list[str]:
    """A single prompt is no mixed batch."""
    return [name for name, asked in CONTENDERS.items() if case.prompts > 1 or asked is None or len(asked) == 1]


def prompts_of(case: Case, turn: int) -> list[dict[str, list[int]]]:
    """Other ones in each turn, where they are to be read."""
    first = 0 if case.cached else 7 * turn + 1

    def text(prompt: int) -> list[int]:
        beginning = prompt % case.texts if case.texts else prompt
        tokens = [3 + (beginning * 131 + at * 17 + first) % (VOCABULARY - 3) for at in range(case.tokens)]
        return [*tokens[:-1], 3 + prompt]

    return [{"prompt_token_ids": text(each)} for each in range(case.prompts)]


def generate(llm: Any, prompts: list[Any], params: list[Any], first: int) -> list[Any]:
    """What ``llm.generate`` returns, where ``first`` prompts come at once and one more with each step."""
    engine, waiting, finished = llm.llm_engine, list(enumerate(zip(prompts, params, strict=True))), {}
    while waiting or engine.has_unfinished_requests():
        now = waiting[: 1 if engine.has_unfinished_requests() else first]
        del waiting[: len(now)]
        for number, (prompt, own) in now:
            engine.add_request(str(number), prompt, own)
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
    return [finished[number] for number in range(len(prompts))]


def serve(folder: str, additional: dict[str, Any], dtype: str, waiting: Any) -> None:
    """One engine, in a process of its own: takes cases, and answers with seconds and tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=2304,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        additional_config=additional,
    )
    waiting.send("ready")
    while (job := waiting.recv()) is not None:
        case, turn, asked, together, scored = job
        prompts = prompts_of(case, turn)
        options = [None if asked is None else {"attnrb": asked[each % len(asked)]} for each in range(case.prompts)]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=case.new,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
                logprobs=0 if scored else None,
            )
            for extra in options
        ]
        start = time.perf_counter()
        if together and case.first:
            said = generate(llm, prompts, params, case.first)
        elif together:
            said = llm.generate(prompts, params, use_tqdm=False)
        else:
            said = [llm.generate(*one, use_tqdm=False)[0] for one in zip(prompts, params, strict=True)]
        seconds = time.perf_counter() - start
        cached = sum(each.num_cached_tokens or 0 for each in said)
        answers = [each.outputs[0] for each in said]
        scores = [each.cumulative_logprob for each in answers] if scored else []
        waiting.send((seconds, [list(each.token_ids) for each in answers], cached, scores))


class Ran(NamedTuple):
    """What a run came to.

    Attributes:
        seconds: it took.
        said: the tokens of each answer.
        cached: how many tokens of its prompts had been read before.
        scores: the log-probability of each answer, where it was asked for.
    """

    seconds: float
    said: list[list[int]]
    cached: int
    scores: list[float]


class Engines:
    """VLLM's own engine and attnrb's, for one model."""

    def __init__(self, folder: str, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for name, additional in {"vLLM": {}, "attnrb": {"attnrb": "off"}}.items():
            self.pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(folder, additional, dtype, theirs))
            process.start()
            self.processes.append(process)
            theirs.close()  # so that an engine which ends is noticed
        for pipe in self.pipes.values():
            pipe.recv()

    def run(self, contender: str, case: Case, turn: int, *, together: bool = True, scored: bool = False) -> Ran:
        """One load: all requests in one batch or one by one, with log-probabilities or without."""
        pipe = self.pipes["vLLM" if contender == "vLLM" else "attnrb"]
        pipe.send((case, turn, CONTENDERS[contender], together, scored))
        return Ran(*pipe.recv())

    def stop(self) -> None:
        """End both."""
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):  # it ended by itself
                pipe.send(None)
        for process in self.processes:
            process.join(60)
            process.kill()


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of tokens that are equal up to where two answers part."""
    same = total = 0
    for a, b in zip(one, other, strict=True):
        total += len(a)
        same += next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / total


def verify(engines: Engines, dtype: str, cases: dict[str, Case]) -> dict[str, float]:
    """Run everything once, which warms caches up too: for each case how much plain attnrb agrees with vLLM.

    In bfloat16 two engines part at close calls, so that agreement is shown and not judged.
    """
    found = {}
    for name, case in cases.items():
        ran = {contender: engines.run(contender, case, 0, scored=True) for contender in contenders_of(case)}
        found[name] = agreement(ran["vLLM"].said, ran["attnrb, off"].said)
        if dtype == "float32" and found[name] < 0.99:
            sys.exit(f"WRONG, not timed: {name}: attnrb says something else than vLLM: {found[name]:.0%} agree")
        if ran["re-balanced"].scores == ran["attnrb, off"].scores:
            sys.exit(f"WRONG, not timed: {name}: re-balancing changed nothing")
    mixed = Case(10, 48, 8, True)
    together, alone = (engines.run("five policies", mixed, 0, together=both).said for both in (True, False))
    if dtype == "float32" and (same := agreement(together, alone)) < 0.99:
        sys.exit(f"WRONG, not timed: a mixed batch says something else than its requests: {same:.0%} agree")
    return found


def measure(engines: Engines, cases: dict[str, Case], rounds: int, seconds: float) -> dict[tuple[str, str], float]:
    """Medians of the seconds of each case and contender, over three rounds and those that begin within ``seconds``."""
    taken: dict[tuple[str, str], list[float]] = {}
    end = time.monotonic() + seconds
    for turn in range(1, rounds + 1):
        for name, case in cases.items():
            order = contenders_of(case)
            for contender in order[turn % len(order) :] + order[: turn % len(order)]:
                # Contenders of one engine may share cached keys, so each reads texts of its own.
                texts = turn * len(CONTENDERS) + order.index(contender)
                ran = engines.run(contender, case, texts)
                if ran.cached != case.reused():
                    sys.exit(
                        f"WRONG: {name}: {contender} had read {ran.cached} tokens of its prompts before, "
                        f"not {case.reused()}"
                    )
                taken.setdefault((name, contender), []).append(ran.seconds)
        if turn >= 3 and time.monotonic() > end:
            break
    return {key: statistics.median(each) for key, each in taken.items()}


def bench(model: str, dtype: str, cases: dict[str, Case], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One model and dtype: a table, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder), dtype)
        engines = Engines(folder, dtype)
        try:
            agreed = verify(engines, dtype, cases)
            medians = measure(engines, cases, rounds, seconds)
        finally:
            engines.stop()
    found = []
    for (name, contender), median in medians.items():
        case, own = cases[name], medians[name, "vLLM"]
        figures = {
            "model": model,
            "dtype": dtype,
            "case": name,
            "contender": contender,
            "seconds": median,
            "tokens_per_second": (rate := case.computed() / median),
            "of_vllm": own / median,
            "plain_agrees": agreed[name],
        }
        wait = ""
        if case.cached:
            figures["seconds_a_token"] = median / case.new
            wait = f"{1000 * median / case.new:.1f} ms a token"
        elif case.new == 1:
            figures["seconds_to_first_token"] = median
            wait = f"{1000 * median:.0f} ms to the first token"
        found.append(figures)
        print(
            f"{model:<8} {dtype:<9} {name:<13} {contender:<14} {rate:>8.0f} tokens/s "
            f"{own / median:>6.2f} x vLLM   {wait}".rstrip(),
            flush=True,
        )
    return found


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    from machine import describe, headline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="SmolLM2 on an eighth of the tokens: a look, not a figure")
    parser.add_argument("--model", action="append", choices=["smollm2", "wide"], help="default: both")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--rounds", type=int, default=9, help="at most (default: 9)")
    parser.add_argument("--seconds", type=float, default=25, help="of timing for each model and dtype (default: 25)")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    cases, rounds = CASES, asked.rounds
    models, dtypes = asked.model or ["smollm2", "wide"], asked.dtype or ["float32", "bfloat16"]
    if asked.quick:
        cases = {
            name: case._replace(tokens=max(16, case.tokens // 8), new=min(case.new, 4)) for name, case in cases.items()
        }
        rounds, models, dtypes = 1, asked.model or ["smollm2"], asked.dtype or ["float32"]
    description = describe()
    print(headline(description))
    found = [each for model in models for dtype in dtypes for each in bench(model, dtype, cases, rounds, asked.seconds)]
    if asked.json is not None:
        about = {"machine": description, "quick": asked.quick, "rounds": rounds, "seconds": asked.seconds}
        asked.json.write_text(json.dumps({**about, "results": found}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
