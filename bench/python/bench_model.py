"""A whole model: tokens per second of `generate` on the unpatched model with `sdpa`, and on the same model re-balanced.

    python bench/python/bench_model.py [--quick] [--model MODEL] [--threads N] [--json FILE]

Greedy, 64 new tokens after prompts of 4096 and of 128 tokens, bfloat16 and float32. Tokens per second count the new
tokens over the whole call, prompt included. Runs alternate; the figure is the median. Before timing, a patch whose
gains are zero must give the logits of the unpatched model.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from figures import Figures, option_parser

BAR = 1.0
NEW_TOKENS = 64

# Any text does: attention does not care, and nothing has to be downloaded.
_TEXT = (
    "The river rises in the hills, gathers the streams of three valleys, and is broad and slow when it reaches "
    "the town. There the old mill still turns on market days; the miller's daughter keeps its books, counts the "
    "sacks, and knows which farmer pays late. "
)


def prompt(tokenizer: Any, length: int) -> Any:
    import torch

    ids = tokenizer(_TEXT, return_tensors="pt").input_ids[0]
    return ids.repeat(length // len(ids) + 1)[:length].unsqueeze(0).to(torch.int64)


def verify(model: Any, ids: Any) -> None:
    """With gains of zero the patched model is the plain one: same logits, up to the rounding of another attention."""
    import torch
    from attnrb import RebalanceConfig, patch

    with torch.inference_mode():
        plain = model(ids).logits[0, -1].double()
        with patch(model, RebalanceConfig(alpha=0.0)) as patched:
            same = model(ids).logits[0, -1].double()
            if patched.stats.rows == 0:
                raise SystemExit("WRONG RESULT, not timed: the patch saw no row")
    difference = (same - plain).abs().max().item() / plain.abs().max().item()
    # A model of some dozens of layers multiplies roundings; eps^(2/3) lies well between those and a wrong layer.
    allowed = float(torch.finfo(model.dtype).eps) ** (2 / 3)
    if not difference <= allowed:
        raise SystemExit(
            f"WRONG RESULT, not timed: logits differ by {difference:.1e} of the largest, allowed {allowed:.1e}"
        )


def measure(model: Any, ids: Any, new_tokens: int, seconds: float) -> dict[str, Any]:
    import torch
    from attnrb import RebalanceConfig, patch
    from timing import interleaved

    def generate() -> None:
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    def rebalanced() -> None:
        with patch(model, RebalanceConfig()):
            generate()

    times = interleaved({"attnrb": rebalanced, "unpatched sdpa": generate}, seconds=seconds, least=3)
    own, other = times["attnrb"].median, times["unpatched sdpa"].median
    return {
        "name": f"{str(model.dtype)[6:]} prompt {ids.shape[1]} + {new_tokens}",
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "tokens_per_second": {"attnrb": new_tokens / own, "unpatched sdpa": new_tokens / other},
        "bars": [{"against": "unpatched sdpa", "at_most": BAR, "is": own / other, "holds": own / other <= BAR}],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, quick="shorter prompts, fewer tokens", seconds=(30.0, "a case"), model=True)
    options = parser.parse_args(arguments)

    import torch
    from attnrb.models import load

    figures = Figures(options)
    print(f"{'case':<28} {'re-balanced':>14} {'sdpa':>14} {'time ratio':>11} {'bar':>8}  holds")
    results = []
    lengths, new_tokens = ((512, 64), 16) if options.quick else ((4096, 128), NEW_TOKENS)
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer = load(options.model, dtype)
        model.set_attn_implementation("sdpa")
        verify(model, prompt(tokenizer, 200))
        for length in lengths:
            result = measure(model, prompt(tokenizer, length), new_tokens, 2.0 if options.quick else options.seconds)
            results.append(result)
            speed, bar = result["tokens_per_second"], result["bars"][0]
            print(
                f"{result['name']:<28} {speed['attnrb']:>10.1f} t/s {speed['unpatched sdpa']:>10.1f} t/s "
                f"{bar['is']:>11.2f} {'<=':>4} {bar['at_most']:.2f}  {'yes' if bar['holds'] else 'NO'}",
                flush=True,
            )
    figures.store(cases=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
