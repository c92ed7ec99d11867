"""Write docs/models.md: every decoder that transformers offers, tried one by one.

.venv/bin/python docs/models.py [--check] [ARCHITECTURE ...]

Each is built tiny, with random weights, and patched. Logits and greedy text must be those of dense oracles that share
no code with attnrb, with re-balancing and with emphasis, and with alpha = 0 those of the unpatched model. With names,
only these are tried and nothing is written. With --check the exit code is 1 if any result is wrong.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests" / "python"))

import attnrb  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from dense_oracle import DenseOracle, linear_gains  # noqa: E402
from edit_oracle import attached, biased  # noqa: E402
from every_model import tiny_model, tokens  # noqa: E402
from rich.progress import Progress  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

ALPHA, THRESHOLD = 0.5, 0.05
CONFIG = attnrb.RebalanceConfig(alpha=ALPHA, threshold=THRESHOLD)

STRENGTH = 8.0

# Shares of the largest logit: float32 rounding through a few layers of large random weights, and what alpha = 0 may do.
ROUNDING, UNPATCHED = 1e-4, 1e-5
# Or so many times what rounding does to the unpatched model: if attnrb errs as much as PyTorch, each on its own side.
OWN_ROUNDING = 2.0
# A weight nearer the threshold than this may fall on either side in float32.
DECIDABLE = 2e-6

HEAD = """# Models

This page lists which decoders `attnrb.patch` serves: everything that `AutoModelForCausalLM` of transformers {version}
offers, {count} architectures.

| | architectures |
| --- | --- |
| [served](#served) | {works} |
| [refused](#refused), with the reason | {refused} |
| [not tried](#not-tried) | {untried} |

A program tries them one by one and writes the page. You can run it too, also with another version of transformers:

    .venv/bin/python docs/models.py

It builds each architecture with random weights and a handful of layers. A model is served if it passes three tests:

- **With re-balancing**, its logits in float32 differ from those of a dense oracle by at most {rounding:g} of the
  largest. Its greedy text equals the oracle's, through the model's own cache, in a batch with padding. The oracle
  builds every matrix in float64 and shares no code with attnrb.
- **With emphasis** of strength {strength:g} on spans, the same holds against an oracle that adds ln {strength:g} to the
  scores.
- **With `alpha=0`**, its logits differ from those of the unpatched model by at most {unpatched:g} of the largest, or by
  at most {own:g} times what rounding does to the unpatched model: how far its logits are from those of the same model
  in float64. Some architectures round activations to few bits or choose experts, and there a last bit grows.

A refused model is left as it was. It never runs silently without re-balancing. Two kinds of attention raise when the
model is patched or at its first forward: attention that does not go through transformers' interface, and attention
modules that do not know their layer. A mask of a pattern that is none of transformers' own is used as it is, as a
boolean matrix. `general_masks` of the patch's `stats` counts such masks, and a warning says why.

A patch tells the layers which forward they belong to, by a keyword argument of the model's call. Some layers, such as
those of `stablelm`, drop arguments that they do not know. They use the forward that runs in their thread. Such a layer
raises if there is none, because it runs in a thread of its own or once more under gradient checkpointing.

Some models have several parts, such as one for images and one for text (`gemma3`, `llava`, `qwen2_5_vl` and others).
There the text decoder is patched. In a hybrid, layers without softmax attention stay as they are, and the source layer
is by default the first layer that has it. Layer numbers count all decoder layers.
"""


class Result(NamedTuple):
    """What came of one architecture: ``verdict`` is works, refused, untried or WRONG."""

    name: str
    verdict: str
    remark: str
    error: float = 0.0
    emphasised: float = 0.0
    unpatched: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    """Try the architectures and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="try only these, and write nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 if any result is wrong")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    names = options.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = []
    with Progress(transient=True) as progress:
        for name in progress.track(names, description="Architectures"):
            results.append(attempt(name))
            if options.names or results[-1].verdict == "WRONG":
                progress.console.print(results[-1])
    if not options.names:
        (DOCS / "models.md").write_text(page(results), encoding="utf-8")
    return int(options.check and any(result.verdict == "WRONG" for result in results))


def attempt(name: str) -> Result:
    """Build, patch and compare one architecture."""
    try:
        model = tiny_model(name)
        if hasattr(model, "set_default_language"):
            model.set_default_language("en_XX")
        with torch.no_grad():
            model(tokens(2, 20))
    except Exception as error:
        return Result(name, "untried", f"a small one could not be made: {sentence(error)}")
    try:
        with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
            model(tokens(2, 20))
    except NotImplementedError as error:
        return Result(name, "refused", sentence(error))
    except Exception as error:
        return Result(name, "WRONG", f"{type(error).__name__}: {sentence(error)}")
    try:
        return compare(name, model, patched)
    except Exception as error:
        return Result(name, "WRONG", f"{type(error).__name__}: {sentence(error)}")


@torch.no_grad()
def compare(name: str, model: Any, patched: attnrb.Patch) -> Result:
    """Logits and text against the oracle, and the model with alpha = 0 against itself."""

    def oracle() -> DenseOracle:
        return DenseOracle(linear_gains(patched.layers, ALPHA), threshold=THRESHOLD, source_layer=patched.source_layer)

    for seed in range(20):
        ids = tokens(2, 20, seed)
        truth = oracle()
        with truth.attached(model):
            expected = model(ids).logits
        if truth.closest > DECIDABLE:
            break
    plain = model(ids).logits
    with attnrb.patch(model, CONFIG):
        logits = model(ids).logits
    with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.0)):
        zero = model(ids).logits
    scale = float(expected.abs().max())
    error = float((logits - expected).abs().max()) / scale
    unpatched = float((zero - plain).abs().max() / plain.abs().max())
    effect = float((expected - plain).abs().max()) / scale
    allowed = UNPATCHED if unpatched <= UNPATCHED else max(UNPATCHED, OWN_ROUNDING * own_rounding(model, ids, plain))
    emphasised, emphasis_faults = compare_emphasis(model, ids, plain)

    prompt, mask = ids[:, :10], torch.ones(2, 10, dtype=torch.int64)
    mask[1, :4] = 0
    with oracle().attached(model):
        text = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with attnrb.patch(model, CONFIG):
        same = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist() == text.tolist()

    faults = [
        fault
        for fault, found in (
            (f"logits differ by {error:.1e}", not error <= ROUNDING),
            (f"alpha = 0 differs by {unpatched:.1e}", not unpatched <= allowed),
            ("greedy text differs", not same),
            ("re-balancing changes nothing", not effect > 10 * ROUNDING),
        )
        if found
    ] + emphasis_faults
    touched = patched.stats.rebalanced_layers
    some = len(touched) < patched.layers - 2  # the source layer and the last, whose gain is 0, are not among them
    remark = f"layers {', '.join(map(str, touched))} of {patched.layers}; source {patched.source_layer}" if some else ""
    verdict = "WRONG" if faults else "works"
    return Result(name, verdict, "; ".join(faults) or remark, error, emphasised, unpatched)


def own_rounding(model: Any, ids: torch.Tensor, plain: torch.Tensor) -> float:
    """How far an unpatched model's logits are from those of the same model in float64, as a share of the largest."""
    truth = copy.deepcopy(model).double()(ids).logits
    return float((plain - truth).abs().max() / truth.abs().max())


def compare_emphasis(model: Any, ids: torch.Tensor, plain: torch.Tensor) -> tuple[float, list[str]]:
    """The difference from an oracle that adds biases to the scores, as a share of the largest logit, and faults."""
    policy = attnrb.Emphasis(strength=STRENGTH)

    def rewrite(spans: attnrb.Spans, slots: int) -> Any:
        bias = torch.zeros(len(spans), 1, slots)
        for row, mine in enumerate(spans):
            for each in mine:
                bias[row, 0, each.start : each.end] = math.log(STRENGTH if each.strength is None else each.strength)
        return biased(bias, torch.tensor([max(each.end for each in mine) for mine in spans]))

    spans = attnrb.Spans(((attnrb.Span(3, 8), attnrb.Span(12, 14, 3.0)), (attnrb.Span(5, 9),)))
    with attached(model, rewrite(spans, ids.shape[1])):
        expected = model(ids).logits
    with attnrb.patch(model, policy) as patched, patched.spans(spans):
        logits = model(ids).logits
    scale = float(expected.abs().max())
    error = float((logits - expected).abs().max()) / scale
    effect = float((expected - plain).abs().max()) / scale

    prompt, mask = ids[:, :10], torch.ones(2, 10, dtype=torch.int64)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    spans = attnrb.Spans(((attnrb.Span(2, 5),), (attnrb.Span(5, 8, 3.0),)))
    with attached(model, rewrite(spans, 10)):
        text = model.generate(prompt, **options)
    with attnrb.patch(model, policy) as patched, patched.spans(spans, prompt=10):
        same = model.generate(prompt, **options).tolist() == text.tolist()
    # Small as the effect may be, an oracle within a hundredth of it sees whether emphasis was there.
    faults = (
        (f"logits with emphasis differ by {error:.1e}", not error <= ROUNDING),
        ("greedy text with emphasis differs", not same),
        ("emphasis changes nothing", not effect > 100 * error),
    )
    return error, [fault for fault, found in faults if found]


def sentence(error: Exception) -> str:
    """The first line of an error, so that it fits a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 240 else text[:237] + "...").replace("|", "\\|")


def page(results: list[Result]) -> str:
    """The whole page in Markdown."""
    by = {verdict: [result for result in results if result.verdict == verdict] for verdict in VERDICTS}
    parts = [
        HEAD.format(
            version=transformers.__version__,
            count=len(results),
            rounding=ROUNDING,
            unpatched=UNPATCHED,
            strength=STRENGTH,
            own=OWN_ROUNDING,
            works=len(by["works"]),
            refused=len(by["refused"]),
            untried=len(by["untried"]),
        )
    ]
    for verdict, title in VERDICTS.items():
        if by[verdict]:
            parts.append(f"## {title}\n")
            parts.append(served(by[verdict]) if verdict == "works" else reasons(by[verdict]))
    return "\n".join(parts)


VERDICTS = {"works": "Served", "refused": "Refused", "untried": "Not tried", "WRONG": "Wrong"}


def served(results: list[Result]) -> str:
    """A table of what differs from the oracles and from the unpatched model."""
    rows = [
        f"| {each.name} | {each.error:.0e} | {each.emphasised:.0e} | {each.unpatched:.0e} | {each.remark} |"
        for each in results
    ]
    return "\n".join(
        [
            "Differences are shares of the largest logit. The last column names the layers that are re-balanced, where",
            "that is not all of them.",
            "",
            "| architecture | re-balancing, from the oracle | emphasis, from the oracle | alpha = 0, from the "
            "unpatched model | layers |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def reasons(results: list[Result]) -> str:
    """A table of reasons."""
    rows = [f"| {each.name} | {each.remark} |" for each in results]
    return "\n".join(["| architecture | reason |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
