"""What patching costs in Python: the patch itself, and a decoding step beyond its attention.

    python bench/python/bench_patch.py [--quick] [--model MODEL] [--threads N] [--json FILE]

A step decodes one token after 128 cached ones. Four models that share their weights take turns, step by step: an
unpatched one with `sdpa`, whole; a patched one whose native ops return at once, with every line of Python that a patch
adds; an unpatched one whose `scaled_dot_product_attention` returns at once, with what transformers does around it; and
one whose attention function returns at once. What the patched step takes more than the third is what a patch adds to
the Python that is there without it. What it takes more than the fourth, which includes what transformers' own attention
function and masks take, is printed beside it. Both are shares of the whole unpatched step.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

from figures import Figures, option_parser

PATCH_BAR = 5e-3  # seconds
STEP_BAR = 0.02
CACHED = 128


def patch_times(model: Any, rounds: int) -> Any:
    """Seconds of `attnrb.patch`; it is removed again outside the clock."""
    import time

    import attnrb
    from timing import Times

    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        patched = attnrb.patch(model)
        samples.append(time.perf_counter() - start)
        patched.remove()
    return Times.of(samples)


def stepper(model: Any) -> Callable[[], Any]:
    """A function that decodes one token after `CACHED` others, always the same."""
    import torch
    from transformers import DynamicCache

    ids = torch.arange(10, 10 + CACHED + 1)[None]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :CACHED], past_key_values=cache)

    def step() -> Any:
        with torch.inference_mode():
            if (extra := cache.get_seq_length() - CACHED) > 0:
                cache.crop(-extra)
            return model(ids[:, CACHED:], past_key_values=cache)

    return step


def returning_at_once(step: Callable[[], Any], holder: Any, *names: str) -> Callable[[], Any]:
    """The step with functions of ``holder`` that return what they returned last in a step of their own."""
    known: dict[str, Any] = {}

    def recorded(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            known[name] = real(*args, **kwargs)
            return known[name]

        return call

    def constant(result: Any) -> Any:
        return lambda *_, **__: result

    with mock.patch.multiple(holder, **{name: recorded(name, getattr(holder, name)) for name in names}):
        step()
    real = {name: getattr(holder, name) for name in names}
    empty = {name: constant(known[name]) for name in names}

    def call() -> Any:
        vars(holder).update(empty)
        try:
            return step()
        finally:
            vars(holder).update(real)

    return call


def step_times(model: Any, seconds: float) -> dict[str, Any]:
    """Seconds of a step: unpatched, and of the three models whose attention does nothing."""
    import attnrb
    import torch
    from attnrb.ops import attention as attention_ops
    from timing import interleaved
    from transformers import AttentionInterface, AttentionMaskInterface

    def twin(implementation: str) -> Any:
        """A model with the same weights."""
        copied = copy.deepcopy(model, {id(each): each for each in model.parameters()})
        copied.set_attn_implementation(implementation)
        return copied

    outputs: dict[int, Any] = {}

    def nothing(module: Any, query: Any, *_: Any, **__: Any) -> Any:
        queries = query.size(2)
        if queries not in outputs:
            outputs[queries] = query.transpose(1, 2).contiguous()
        return outputs[queries], None

    AttentionInterface.register("nothing", nothing)
    AttentionMaskInterface.register("nothing", lambda *_, **__: None)
    rebalanced = twin("sdpa")
    with attnrb.patch(rebalanced):
        native = stepper(rebalanced)
        contenders = {
            "unpatched sdpa": stepper(twin("sdpa")),
            "patched, ops empty": returning_at_once(native, attention_ops, "_attention", "_attention_output"),
            "unpatched, op empty": returning_at_once(
                stepper(twin("sdpa")), torch.nn.functional, "scaled_dot_product_attention"
            ),
            "attention empty": stepper(twin("nothing")),
        }
        return interleaved(contenders, seconds=seconds, least=20, most=10_000)


def measure(model: Any, quick: bool, seconds: float) -> dict[str, Any]:
    """Both costs for one model, printed and returned."""
    patching = patch_times(model, 5 if quick else 100)
    times = step_times(model, 5.0 if quick else seconds)
    whole, patched, stock, least = (each.median for each in times.values())
    dtype = str(model.dtype)[6:]
    bars = [
        {"name": "patching, seconds", "is": patching.median, "at_most": PATCH_BAR},
        {"name": "added to a step, share", "is": (patched - stock) / whole, "at_most": STEP_BAR},
    ]
    for bar in bars:
        bar["holds"] = bar["is"] <= bar["at_most"]
        print(f"{dtype:<9} {bar['name']:<34} {bar['is']:.5f} <= {bar['at_most']}  {'yes' if bar['holds'] else 'NO'}")
    print(f"{dtype:<9} {'beyond no attention at all, share':<34} {(patched - least) / whole:.5f}")
    for name, taken in times.items():
        print(f"{dtype:<9} {name:<34} {taken.median * 1e3:.3f} ms ({taken.low * 1e3:.3f} to {taken.high * 1e3:.3f})")
    steps = {name: asdict(each) for name, each in times.items()}
    return {"name": dtype, "bars": bars, "seconds": {"patch": asdict(patching), "step": steps}}


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, quick="few rounds", seconds=(30.0, "the steps"), model=True)
    options = parser.parse_args(arguments)

    import torch
    from attnrb.models import load

    figures = Figures(options)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = load(options.model, dtype)
        model.set_attn_implementation("sdpa")
        results.append(measure(model, options.quick, options.seconds / 2))
    figures.store(cases=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
