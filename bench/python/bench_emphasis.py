"""Emphasis in a whole model: tokens per second and memory, against the same model plain and against two other ways.

    python bench/python/bench_emphasis.py [--quick] [--untimed] [--model MODEL] [--threads N] [--json FILE]

Greedy, 64 new tokens after prompts of 512 and of 4096 tokens, of which some in the middle are marked, in float32 and in
bfloat16. The models are SmolLM2-135M and one of 8 layers with random weights and the widths of large models (H 32/8,
D 128). The contenders:

attnrb            `Emphasis(strength=16)`, which is rows "after" in all heads
unpatched sdpa    the model as it is, without emphasis
sdpa with a mask  stock attention with the equivalent additive n x n matrix
eager hook        eager attention; a hook gives each layer a matrix for each head, as PASTA's code does

Tokens per second count the new tokens over the whole call, prompt included. First each contender runs once in a process
of its own: that gives its peak of memory above the loaded model, and what it computes. The three that emphasise must
agree: in float32 in the logits behind the prompt and in all tokens; in bfloat16 none may be further from the float32
logits than twice what stock attention with a mask is. Then they take turns on the clock in one process. Cases that
--json's file holds already, of the same machine, are not measured again. --untimed leaves the clock to a later run.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from figures import Figures, option_parser
from peak import peak_of

STRENGTH, NEW_TOKENS = 16.0, 64
ATTNRB, PLAIN, MASK, HOOK = CONTENDERS = ("attnrb", "unpatched sdpa", "sdpa with a mask", "eager hook")
WIDE = "8 layers, H 32/8, D 128"


def load_model(name: str, dtype: str) -> Any:
    """One of the two kinds of models; ``name`` is `WIDE`, or what `attnrb.models.load` takes, empty for its default."""
    import torch
    from attnrb.models import load

    if name != WIDE:
        return load(name or None, dtype)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        # Of a size at which logits tell one token from another.
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def prompt(model: Any, length: int) -> Any:
    """Tokens int64 ``[1, length]``."""
    import torch

    vocabulary = min(8192, model.config.get_text_config().vocab_size)
    return torch.randint(10, vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def span(length: int) -> tuple[int, int]:
    """The marked slots of a prompt: a sixteenth of it, before the middle."""
    return length // 2 - length // 16, length // 2


def greedy(model: Any, ids: Any, new_tokens: int, masked: bool) -> tuple[Any, list[int]]:
    """Logits behind the prompt and the new tokens; ``masked``: with the additive matrix of emphasis."""
    import torch
    from transformers import DynamicCache

    length = ids.shape[1]
    cache = DynamicCache(config=model.config)

    def step(tokens: Any, start: int) -> Any:
        mask = {"attention_mask": additive_mask(model, start, start + tokens.shape[1], length)} if masked else {}
        return model(tokens, past_key_values=cache, logits_to_keep=1, **mask).logits[0, -1]

    with torch.inference_mode():
        first = step(ids, 0)
        found = [int(first.argmax())]
        while len(found) < new_tokens:
            here = torch.tensor([found[-1:]])
            found.append(int(step(here, length + len(found) - 1).argmax()))
    return first, found


def additive_mask(model: Any, start: int, end: int, prompt_tokens: int) -> Any:
    """``[1, 1, end - start, end]``: causality, and ln(strength) on the marked keys for the rows behind them."""
    import torch

    first, behind = span(prompt_tokens)
    mask = torch.full((end - start, end), torch.finfo(model.dtype).min, dtype=model.dtype).triu_(start + 1)
    mask[max(behind - start, 0) :, first:behind] += math.log(STRENGTH)
    return mask[None, None]


@contextmanager
def hooked(model: Any, prompt_tokens: int) -> Iterator[None]:
    """PASTA's way: before each layer, its mask is expanded to all heads, copied and changed."""
    first, behind = span(prompt_tokens)
    heads = model.config.num_attention_heads

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        mask = mask.expand(mask.shape[0], heads, *mask.shape[2:]).clone()
        start = mask.shape[3] - mask.shape[2]
        mask[:, :, max(behind - start, 0) :, first:behind] += math.log(STRENGTH)
        return args, {**kwargs, "attention_mask": mask}

    handles = [each.self_attn.register_forward_pre_hook(change, with_kwargs=True) for each in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def emphasised(model: Any, prompt_tokens: int) -> Iterator[None]:
    import attnrb

    marked = attnrb.Spans(((attnrb.Span(*span(prompt_tokens)),),))
    with (
        attnrb.patch(model, attnrb.Emphasis(strength=STRENGTH)) as patched,
        patched.spans(marked, prompt=prompt_tokens),
    ):
        yield


def run(contender: str, model: Any, ids: Any, new_tokens: int) -> tuple[Any, list[int]]:
    """What a contender computes: see `greedy`."""
    ways = {ATTNRB: emphasised, HOOK: hooked}
    model.set_attn_implementation("eager" if contender == HOOK else "sdpa")
    with ways[contender](model, ids.shape[1]) if contender in ways else nullcontext():
        return greedy(model, ids, new_tokens, contender == MASK)


def alone(options: argparse.Namespace) -> None:
    """In a process of its own: one call of a contender, its peak printed and what it computed stored."""
    import torch

    contender, name, dtype, length, new_tokens, file = options.alone
    torch.set_num_threads(options.threads)
    model = load_model(name, dtype)
    # Threads, code and libraries come in with a first call, whatever the length.
    run(contender, model, prompt(model, 32), 2)
    ids = prompt(model, int(length))
    peak, (logits, tokens) = peak_of(lambda: run(contender, model, ids, int(new_tokens)))
    torch.save(logits, file)
    print(json.dumps({"peak": peak, "tokens": tokens}))


def verified(
    name: str, dtype: str, length: int, new_tokens: int, threads: int, exact: dict[tuple[str, int], Any]
) -> dict[str, int]:
    """The peak of each contender, in bytes, once the three that emphasise agree.

    ``exact`` keeps the logits of the float32 case, which comes first, by model and length.
    """
    import torch

    found, logits = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for contender in CONTENDERS:
            file = f"{folder}/logits.pt"
            command = [sys.executable, __file__, "--threads", str(threads), "--alone", contender, name, dtype]
            command += [str(length), str(new_tokens), file]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            found[contender] = json.loads(ran.stdout.splitlines()[-1])
            logits[contender] = torch.load(file).double()
    if dtype == "float32":
        check_exact(found, logits)
        exact[name, length] = logits[MASK]
    else:
        if (name, length) not in exact:  # the float32 case was finished by a run before this one
            exact[name, length] = stock_logits(name, length, new_tokens)
        check_rounded(logits, exact[name, length])
    return {contender: found[contender]["peak"] for contender in CONTENDERS}


def stock_logits(name: str, length: int, new_tokens: int) -> Any:
    """Of stock attention with a mask, in float32."""
    model = load_model(name, "float32")
    return run(MASK, model, prompt(model, length), new_tokens)[0].double()


def check_exact(found: dict[str, Any], logits: dict[str, Any]) -> None:
    """In float32 the three that emphasise give the same tokens, and the same logits up to rounding."""
    import torch

    truth, worst = logits[MASK], 0.0
    scale = float(truth.abs().max())
    # A model of some dozens of layers multiplies roundings; eps^(2/3) lies well between those and a wrong layer.
    allowed = torch.finfo(torch.float32).eps ** (2 / 3)
    for contender in (ATTNRB, HOOK):
        difference = float((logits[contender] - truth).abs().max()) / scale
        worst = max(worst, difference)
        same = found[contender]["tokens"] == found[MASK]["tokens"]
        if not (difference <= allowed and same):
            raise SystemExit(
                f"WRONG RESULT, not timed: {contender} and a mask differ by {difference:.1e} of the largest logit, "
                f"allowed {allowed:.1e}; tokens {'are' if same else 'are not'} the same"
            )
    if float((logits[PLAIN] - truth).abs().max()) / scale < 10 * worst:
        raise SystemExit("WRONG RESULT, not timed: emphasis changed nothing")


def check_rounded(logits: dict[str, Any], exact: Any) -> None:
    """In bfloat16 each errs at most twice as much as stock attention with a mask does, by the float32 model."""
    errors = {each: float((logits[each] - exact).square().mean().sqrt()) for each in (ATTNRB, MASK, HOOK)}
    for contender, error in errors.items():
        if not error <= 2 * errors[MASK]:
            raise SystemExit(
                f"WRONG RESULT, not timed: {contender} is {error:.1e} from float32, a mask {errors[MASK]:.1e}"
            )


def tokens_of(options: argparse.Namespace) -> int:
    return 8 if options.quick else NEW_TOKENS


def case_name(name: str, dtype: str, length: int, options: argparse.Namespace) -> str:
    return f"{name or 'SmolLM2-135M'} {dtype} prompt {length} + {tokens_of(options)}"


def verify(
    name: str, dtype: str, length: int, options: argparse.Namespace, exact: dict[tuple[str, int], Any]
) -> dict[str, Any]:
    """One case with its peaks, not timed yet."""
    return {
        "name": case_name(name, dtype, length, options),
        "model": name or "SmolLM2-135M",
        "dtype": dtype,
        "prompt": length,
        "peak": verified(name, dtype, length, tokens_of(options), options.threads, exact),
    }


def measure(name: str, dtype: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """The times of a case."""
    from timing import interleaved

    new_tokens, seconds = tokens_of(options), 1.0 if options.quick else options.seconds
    model = load_model(name, dtype)
    ids = prompt(model, length)

    def call(contender: str) -> Any:
        return lambda: run(contender, model, ids, new_tokens)

    times = interleaved({each: call(each) for each in CONTENDERS}, seconds=seconds, least=1 if options.quick else 3)
    return {
        "seconds": {each: asdict(taken) for each, taken in times.items()},
        "tokens_per_second": {each: new_tokens / taken.median for each, taken in times.items()},
    }


def line(case: dict[str, Any]) -> str:
    """Of the printed table."""
    cells = []
    for each in CONTENDERS:
        speed = f"{case['tokens_per_second'][each]:.1f} t/s " if "seconds" in case else ""
        cells.append(f"{speed}{case['peak'][each] / 1e6:,.0f} MB")
    return f"{case['name']:<48}" + "".join(f"{cell:>26}" for cell in cells)


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, quick="short prompts, few tokens", seconds=(20.0, "a case"), model=True)
    parser.add_argument("--untimed", action="store_true", help="verify and measure memory only, on a busy machine")
    parser.add_argument("--alone", nargs=6, help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args(arguments)
    if options.alone is not None:
        alone(options)
        return 0

    figures = Figures(options)
    cases = {case["name"]: case for case in figures.stored()}
    exact = dict[tuple[str, int], Any]()
    print(f"{'case':<48}" + "".join(f"{each:>26}" for each in CONTENDERS))
    for name in (options.model or "", WIDE):
        for dtype in ("float32", "bfloat16"):
            for length in (64, 256) if options.quick else (512, 4096):
                case = cases.setdefault(case_name(name, dtype, length, options), {})
                if not case:
                    case.update(verify(name, dtype, length, options, exact))
                    figures.store(cases=list(cases.values()))
                if "seconds" not in case and not options.untimed:
                    case.update(measure(name, dtype, length, options))
                    figures.store(cases=list(cases.values()))
                print(line(case), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
