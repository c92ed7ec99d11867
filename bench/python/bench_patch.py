"""What patching costs in Python: the patch itself, and a decoding step beyond its attention.

    python bench/python/bench_patch.py [--quick] [--model MODEL] [--threads N] [--json FILE]

A step decodes one token after 128 cached ones. Its overhead is taken between two models whose attention does nothing:
one patched, with every line of Python that a patch adds and native ops that return at once, the other unpatched, with
an attention function that returns at once. The difference is a share of a whole unpatched step with `sdpa`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

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


@contextmanager
def empty_ops() -> Iterator[None]:
    """Native attention that returns at once what it returned the first time."""
    from attnrb import functional

    names = ("_source_attention", "_rebalanced_attention")

    def remembering(real: Any) -> Any:
        known: dict[Any, Any] = {}

        def op(query: Any, *rest: Any) -> Any:
            shape = tuple(query.shape)
            if shape not in known:
                known[shape] = real(query, *rest)
            return known[shape]

        return op

    with mock.patch.multiple(functional, **{name: remembering(getattr(functional, name)) for name in names}):
        yield


@contextmanager
def empty_attention(model: Any) -> Iterator[None]:
    """Attention of transformers that returns at once what it returned the first time, without a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    known: dict[Any, Any] = {}

    def attention(module: Any, query: Any, *_: Any, **__: Any) -> Any:
        shape = tuple(query.shape)
        if shape not in known:
            known[shape] = query.transpose(1, 2).contiguous()
        return known[shape], None

    AttentionInterface.register("empty", attention)
    AttentionMaskInterface.register("empty", lambda *_, **__: None)
    model.set_attn_implementation("empty")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def step_times(model: Any, seconds: float) -> dict[str, Any]:
    """Seconds of a step: unpatched, and of the two models whose attention does nothing."""
    import attnrb
    from timing import interleaved

    plain = stepper(model)

    def entering(context: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with context():
                for _ in range(10):  # so that entering is not what is timed
                    plain()

        return call

    @contextmanager
    def patched() -> Iterator[None]:
        with empty_ops(), attnrb.patch(model):
            yield

    contenders = {
        "unpatched sdpa": lambda: [plain() for _ in range(10)],
        "empty, unpatched": entering(lambda: empty_attention(model)),
        "empty, patched": entering(patched),
    }
    return interleaved(contenders, seconds=seconds, least=5)


def measure(model: Any, quick: bool, seconds: float) -> dict[str, Any]:
    """Both costs for one model, printed and returned."""
    patching = patch_times(model, 5 if quick else 100)
    # Entering and leaving is part of what is timed: it is taken off, a tenth for each of ten steps.
    times = step_times(model, 5.0 if quick else seconds)
    whole, empty, patched = (
        times[name].median / 10 for name in ("unpatched sdpa", "empty, unpatched", "empty, patched")
    )
    overhead = patched - empty - patching.median / 10
    bars = [
        {"name": "patch, seconds", "is": patching.median, "at_most": PATCH_BAR},
        {"name": "step, share of an unpatched one", "is": overhead / whole, "at_most": STEP_BAR},
    ]
    dtype = str(model.dtype)[6:]
    for bar in bars:
        bar["holds"] = bar["is"] <= bar["at_most"]
        print(f"{dtype:<9} {bar['name']:<34} {bar['is']:.5f} <= {bar['at_most']}  {'yes' if bar['holds'] else 'NO'}")
    print(f"{dtype:<9} a step: {whole * 1e3:.2f} ms unpatched, {overhead * 1e6:.0f} us of Python more when patched")
    steps = {name: asdict(each) for name, each in times.items()}
    return {"name": dtype, "bars": bars, "seconds": {"patch": asdict(patching), "ten steps": steps}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, not a figure")
    parser.add_argument("--model", default=None, help="hub id, folder or .gguf file (default: the embedded model)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing the steps (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures here")
    options = parser.parse_args(arguments)

    import torch
    from attnrb.models import load
    from machine import describe, headline

    torch.set_num_threads(options.threads)
    description = describe()
    print(headline(description))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = load(options.model, dtype)
        model.set_attn_implementation("sdpa")
        results.append(measure(model, options.quick, options.seconds / 2))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(description | {"quick": options.quick, "cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
