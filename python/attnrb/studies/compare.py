"""Compare a model with itself: one prompt generated without and with an edit of its attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnrb.policies import LearnedGains, Plain, Policy, Rebalance
from attnrb.protocols import LanguageModel, LoadedTokenizer
from attnrb.studies.first_key import first_key_shares, span_shares
from attnrb.studies.generation import Generation, generate
from attnrb.studies.prompts import Prompt, read_prompt
from attnrb.text.spans import Spans

DEFAULT_PROMPT = "Why is the sky blue?"

_REPEATED_BELOW = 5.0  # seconds of a generation that is short enough to be timed again


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Layers are numbered from 0."""

    prompt: str
    prompt_tokens: int
    """Tokens the model read, those of a chat template included."""
    config: Policy
    plain: Generation
    rebalanced: Generation
    first_difference: int | None
    """Index of the first new token that differs, the length of the shorter text where the other merely goes on; None
    where both are the same."""
    outliers_per_row: float
    """Mean number of outliers that a query has in one head of the source layer, over the re-balanced generation."""
    rows: int
    """How many such rows (query and head) that is."""
    rebalanced_layers: int
    """How many layers were re-balanced."""
    first_key_plain: tuple[float, ...]
    """Per layer, the share of attention that the first key takes in the plain model: see `attnrb.studies.first_key`."""
    first_key_rebalanced: tuple[float, ...]
    """The same, over the same text, in the re-balanced model."""
    spans: Spans | None = None
    """The marked spans of the prompt; None without any."""
    span_plain: tuple[float, ...] = ()
    """Per layer, the share of attention that the spans get from the tokens behind them in the plain model."""
    span_edited: tuple[float, ...] = ()
    """The same, over the same text, with the edit."""

    @property
    def use(self) -> str:
        """What the edit is called: re-balancing, emphasis, or the name of another policy."""
        return _use(self.config, self.spans)

    def __repr__(self) -> str:
        same = "no token differs" if self.first_difference is None else f"texts part at token {self.first_difference}"
        return f"Comparison({self.prompt_tokens} tokens of prompt, {self.config!r}: {same})"

    def _repr_html_(self) -> str:
        from attnrb.reports.fragment import fragment, rows_table

        same = self.first_difference is None
        lead = "No token differs." if same else f"The texts part at new token {self.first_difference}."
        first_key = [100 * sum(each) / len(each) for each in (self.first_key_plain, self.first_key_rebalanced)]
        rows = [
            ["text", self.plain.text, self.rebalanced.text],
            ["first token's share, mean of all layers", *(f"{share:.1f} %" for share in first_key)],
        ]
        return fragment("Plain and edited", lead, rows_table(["", "plain", self.config.label()], rows))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of every field."""
        return {
            "prompt": self.prompt,
            "prompt_tokens": self.prompt_tokens,
            "config": self.config.to_dict(),
            "plain": self.plain.to_dict(),
            "rebalanced": self.rebalanced.to_dict(),
            "first_difference": self.first_difference,
            "outliers_per_row": self.outliers_per_row,
            "rows": self.rows,
            "rebalanced_layers": self.rebalanced_layers,
            "first_key": {"plain": list(self.first_key_plain), "rebalanced": list(self.first_key_rebalanced)},
            "spans": None if self.spans is None else self.spans.to_dict()["rows"][0],
            "span_share": {"plain": list(self.span_plain), "edited": list(self.span_edited)},
        }


def compare(
    model: LanguageModel,
    tokenizer: LoadedTokenizer,
    prompt: str = DEFAULT_PROMPT,
    config: Policy | None = None,
    *,
    chat: bool | None = None,
    markup: bool = True,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Generate from one prompt twice, plain and edited, and measure what changed.

    Both generations start from the same seed. Each is timed after a short warm-up of its own, and short ones twice, in
    turns, of which the faster counts: what else runs on the machine then weighs less. The first key's shares
    are taken over one text, the prompt and what the plain model made of it, so that they differ by the method alone.

    Args:
        model: an unpatched ``transformers`` causal language model. It is left as it was.
        tokenizer: its tokenizer.
        prompt: the text that the model continues, perhaps with markup.
        config: what is edited. Default: ``Emphasis()`` for a prompt with markup, else ``Rebalance()``.
        chat: use the tokenizer's chat template. Default: if it has one.
        markup: read ``((…))`` where a policy can heed it: see `attnrb.studies.prompts.read_prompt`.
        max_new_tokens: how many new tokens each has at most. Default: 64.
        temperature: 0 (default) is greedy; above 0 samples.
        seed: of the sampling.
        progress: called with a short line before each step.

    Raises:
        ValueError: as `attnrb.studies.prompts.read_prompt` and `attnrb.studies.generation.generate` do.
        Exception: whatever `attnrb.patch` raises for a model it cannot serve.
    """
    say = progress or (lambda _: None)
    read = read_prompt(model, tokenizer, prompt, config, chat=chat, markup=markup)
    config, input_ids = read.policy, read.input_ids

    def run(tokens: int) -> Generation:
        return generate(model, tokenizer, input_ids, max_new_tokens=tokens, temperature=temperature, seed=seed)

    warm_up = min(2, max_new_tokens)
    what = _use(config, read.spans)
    say(f"Generating without {what}")
    run(warm_up)
    start = time.perf_counter()
    plain = run(max_new_tokens)
    repeat = time.perf_counter() - start < _REPEATED_BELOW
    say(f"Generating with {what}")
    with read.patch(model):
        run(warm_up)
    with read.patch(model) as patched:
        rebalanced = run(max_new_tokens)
    if repeat:
        say("Timing both once more")
        plain = _faster(plain, run(max_new_tokens))
        with read.patch(model):
            rebalanced = _faster(rebalanced, run(max_new_tokens))

    say("Measuring attention, layer by layer")
    text_ids = torch.cat([input_ids, torch.tensor([plain.token_ids], dtype=torch.int64, device="cpu")], dim=1)
    return Comparison(
        prompt=prompt,
        prompt_tokens=input_ids.shape[1],
        config=config,
        plain=plain,
        rebalanced=rebalanced,
        first_difference=first_difference(plain, rebalanced),
        outliers_per_row=patched.stats.outliers_per_row,
        rows=patched.stats.rows,
        rebalanced_layers=patched.stats.layers,
        first_key_plain=first_key_shares(model, text_ids, Plain()),
        first_key_rebalanced=first_key_shares(model, text_ids, config, read.spans, input_ids.shape[1]),
        spans=read.spans,
        span_plain=_span_shares(model, text_ids, read, Plain()),
        span_edited=_span_shares(model, text_ids, read, config),
    )


def _span_shares(model: Any, text_ids: torch.Tensor, read: Prompt, policy: Policy) -> tuple[float, ...]:
    if read.spans is None or read.spans.slots >= text_ids.shape[1]:
        return ()
    return span_shares(model, text_ids, policy, read.spans, read.input_ids.shape[1])


def _use(policy: Policy, spans: Spans | None) -> str:
    """What a reader calls an edit: its use where it is one of the two, else the policy's name."""
    if spans is not None:
        return "emphasis"
    return "re-balancing" if isinstance(policy, (Rebalance, LearnedGains)) else policy.name


def _faster(one: Generation, other: Generation) -> Generation:
    return max(one, other, key=lambda each: each.tokens_per_second or 0.0)


def first_difference(one: Generation, other: Generation) -> int | None:
    """Index of the first new token in which two generations differ; None when they are the same to the end.

    Where one text is the beginning of the other, that is the length of the shorter one: there one ended and the other
    did not.
    """
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    common = next((index for index, (mine, yours) in enumerate(pairs) if mine != yours), None)
    if common is not None:
        return common
    lengths = {len(one.token_ids), len(other.token_ids)}
    return None if len(lengths) == 1 and one.ended == other.ended else min(lengths)
