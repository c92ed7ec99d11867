"""Which heads heed a span to good effect: a ranking of all heads by one backward pass.

Note: [Ranking heads by one gradient]
Emphasis adds c_j γ_h to the scores of head h (c_j: how many spans cover key j, γ_h the head's log-gain). At γ = 0 the
model is the plain one, and a head's derivative -∂loss/∂γ_h says by how much the loss of the right answers falls for a
small gain in that head alone. One backward pass gives it for all heads together, where trying them one by one, as
PASTA does, takes a run for each. It is a first-order estimate: it ranks heads, and promises nothing about strong gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from attnrb.hosts.transformers.patch import patch
from attnrb.policies.base import model_shape
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.learned_emphasis import LearnedEmphasis
from attnrb.policies.profile import HeadProfile
from attnrb.protocols import Model, Tokenizer
from attnrb.studies.answers import AnswerRow, answer_row, batches, log_likelihoods
from attnrb.text.marked import Marked

__all__ = ["profile_heads"]

_BATCH_TOKENS = 512


def profile_heads(
    model: Model,
    tokenizer: Tokenizer,
    policy: Emphasis | None,
    examples: Sequence[tuple[Marked, str]],
    keep: int = 32,
    progress: Callable[[str], None] | None = None,
) -> HeadProfile:
    """Rank all heads of a model by how much heeding the marked spans helps it to give the answers.

        examples = [(attnrb.mark(tokenizer, "((The door is blue.)) The door is"), " blue"), ...]
        profile = attnrb.profile_heads(model, tokenizer, None, examples)
        attnrb.patch(model, attnrb.Emphasis(strength=16, heads=profile))

    The score of a head is the negative gradient of the loss at its log-gain, taken in the plain model: see
    Note: [Ranking heads by one gradient] of this module. The loss is the mean over all examples of each one's mean loss
    of the answer's tokens, in nats. Ten examples are enough for a task with one template; use others to report on.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode. It is left as it was, and its
            parameters get no gradient.
        tokenizer: its tokenizer.
        policy: whose ``rows`` heed the spans. Default, None: ``Emphasis()``. Its strength has no part in the gradient.
        examples: pairs of a marked prompt of one row and the answer's text, with the space before it where one belongs.
        keep: how many heads the profile chooses. Default: 32, or all of a model that has fewer.
        progress: called with a short line before each batch.

    Returns:
        The profile. Its ``about`` says what made it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no examples, one has no span that takes the policy's strength, or another number of rows;
            the model is in training mode; the policy has options that a ranking of all heads cannot heed; the gradient
            is not finite.
        Exception: whatever `attnrb.patch` raises for a model it cannot serve.
    """
    policy = _checked_policy(policy)
    rows = _rows(model, tokenizer, examples)
    if model.training:
        raise ValueError("model: expected it in evaluation mode, got training mode: call model.eval() first")
    say = progress or (lambda _: None)
    shape = model_shape(model)
    # Strengths of 1 are gains of 0: the plain model, whose derivatives are asked for.
    probe = LearnedEmphasis(shape, Emphasis(strength=1.0, rows=policy.rows))
    total = torch.zeros(shape.layers, shape.heads, dtype=torch.float32, device="cpu")
    done = 0
    with torch.enable_grad(), patch(model, probe) as patched:
        for batch in batches(rows, _BATCH_TOKENS):
            say(f"Profiling examples {done + 1} to {done + len(batch)} of {len(rows)}")
            done += len(batch)
            losses = [-found.mean() for found in log_likelihoods(model, batch, patched)]
            [gradient] = torch.autograd.grad(torch.stack(losses).sum() / len(rows), probe.gains)
            total[list(probe.layers)] += gradient
    if not bool(total.isfinite().all()):
        raise ValueError("model: its gradient is not finite on these examples; try float32")
    scores = [[round(-each, 9) for each in row] for row in total.tolist()]
    about = {"policy": policy.to_dict(), "examples": len(rows), "model": _name(model)}
    return HeadProfile(scores, min(keep, total.numel()) if keep == 32 else keep, about)


def _checked_policy(policy: Any) -> Emphasis:
    if policy is None:
        return Emphasis()
    if not isinstance(policy, Emphasis):
        raise TypeError(f"policy: expected an attnrb.Emphasis or None, got {type(policy).__name__}")
    for each in fields(policy):
        if each.name not in ("strength", "rows") and getattr(policy, each.name) is not None:
            raise ValueError(f"policy: expected one without {each.name}, which has no part in a ranking")
    return policy


def _rows(model: Any, tokenizer: Any, examples: Any) -> list[AnswerRow]:
    if not isinstance(examples, Sequence) or isinstance(examples, str):
        raise TypeError(f"examples: expected a list of pairs, got {type(examples).__name__}")
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    rows = []
    for index, example in enumerate(examples):
        name = f"examples[{index}]"
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TypeError(f"{name}: expected a pair of an attnrb.Marked and the answer's text, got {example!r:.80}")
        marked, answer = example
        row = answer_row(model, tokenizer, marked, answer, name)
        if all(span.strength is not None for span in row.spans):
            raise ValueError(f"{name}: expected a span without a strength of its own, whose gain can be measured")
        rows.append(row)
    return rows


def _name(model: Any) -> str:
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() else name  # folders of this machine are nobody else's matter
