"""Time of scoring questions with the embedded model: attnrb's, plain and re-balanced, beside the harness' own ``hf``.

    python bench/python/bench_evaluation.py --data DIR [--items N] [--repeats N] [--threads N] [--json FILE]

The same requests go to each, in float32, after their likelihoods have been compared; the time is the best of the
repeats. DIR is what ``attnrb eval --data`` takes. Loading and the building of prompts are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from figures import Figures, option_parser

ROUNDING = 2e-3
"""Of a log-likelihood: sums of log-probabilities of logits of the order of 20, float32 over 30 layers."""

SETS = {
    "MMLU": ("mmlu_anatomy", "mmlu_college_physics", "mmlu_sociology", "mmlu_virology"),
    "PIQA": ("piqa",),
    "SIQA": ("siqa",),
}


def requests_of(lm: Any, tasks: tuple[str, ...], data: Path, items: int) -> list[Any]:
    """The harness' requests for so many items of these tasks together."""
    from attnrb.evaluation.runner import prepare
    from attnrb.evaluation.selection import Cell, select

    questions = prepare(lm, select(tasks, data), [Cell("direct")], limit=items // len(tasks))
    return [request for question in questions for request in question.requests]


def best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of so many runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the questions")
    parser.add_argument("--items", type=int, default=16, help="questions of each set (default: 16)")
    parser.add_argument("--repeats", type=int, default=2, help="the best of so many runs (default: 2)")
    options = parser.parse_args(arguments)

    from attnrb.evaluation.grid import quiet
    from attnrb.hosts.lm_eval.model import AttnrbLM
    from attnrb.policies.rebalance import RebalanceConfig
    from lm_eval.models.huggingface import HFLM

    figures = Figures(options)
    quiet()
    lm = AttnrbLM(plain=True)
    peers = {size: HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=size) for size in (8, 1)}
    cases: list[dict[str, Any]] = []
    for name, tasks in SETS.items():
        requests = requests_of(lm, tasks, options.data, options.items)

        def score(model: Any, requests: list[Any] = requests) -> Any:
            return model.loglikelihood(requests, disable_tqdm=True)

        ours, theirs = score(lm), score(peers[8])
        worst = max(abs(one[0] - other[0]) for one, other in zip(ours, theirs, strict=True))
        if worst > ROUNDING:
            raise SystemExit(f"{name}: likelihoods differ by {worst:g}")
        plain = best(partial(score, lm), options.repeats)
        with lm.rebalanced(RebalanceConfig()):
            rebalanced = best(partial(score, lm), options.repeats)
        harness = {size: best(partial(score, peer), options.repeats) for size, peer in peers.items()}
        cases.append({"set": name, "requests": len(requests), "plain": plain, "rebalanced": rebalanced, "hf": harness})
        beside = ", ".join(
            f"hf in batches of {size} {each:.2f} s (ratio {plain / each:.2f})" for size, each in harness.items()
        )
        print(f"{name}: plain {plain:.2f} s, re-balanced {rebalanced:.2f} s; {beside}", flush=True)
    figures.store(cases=cases)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
