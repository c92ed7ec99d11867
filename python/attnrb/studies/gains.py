"""Gains learnt on development items, against a control with as many parameters: the study of gains.

Note: [A control for learnt gains]
Numbers that are trained on the items of a task may raise its accuracy whatever they multiply. So gains on outliers
stand beside gains on every key, which with rows as they are is one scale for each head's whole output: as many
parameters, the same layers, the same start, the same steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from attnrb.evaluation.runfile import Key
from attnrb.hosts.transformers.patch import patch
from attnrb.policies.base import Policy, model_shape
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.learnable import LearnedPerHead
from attnrb.policies.learned import LearnedGains
from attnrb.policies.learned_emphasis import LearnedEmphasis
from attnrb.policies.rebalance import Rebalance
from attnrb.studies.answers import AnswerRow, answer_row, log_likelihoods
from attnrb.studies.arms import PLAIN, Arm
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import StudyItem
from attnrb.studies.study import Study

__all__ = ["LEARNERS", "learn", "learnt_arms"]

LEARNERS = ("outliers", "every key (control)", "spans")
"""What gains are learnt for."""

_STEP_ITEMS = 8
_RATE = 0.03


def learnt_arms(study: Study) -> tuple[tuple[Arm, ...], frozenset[str]]:
    """An arm for each kind of gains and each seed, learnt here or read from the run's file.

    Returns:
        The arms, and the fingerprints of the items that the gains were learnt on.
    """
    plan = study.plan
    items = [item for task in plan.tasks for item in study.items(task, SPLITS[0])]
    found = [Arm(PLAIN, family="none", tasks=plan.tasks)]
    for seed in range(plan.seed, plan.seed + plan.seeds):
        for kind in LEARNERS:
            name = f"gains on {kind}, seed {seed}"
            key = Key("all", -1, name, SPLITS[0], None)
            if key not in study.file.records:
                study.say(f"Learning {name}")
                start = time.process_time()
                learned = learn(study.model, study.tokenizer, items, kind, steps=plan.steps, seed=seed)
                cpu = round(time.process_time() - start, 6)
                study.file.append([{**key._asdict(), "policy": learned.to_dict(), "cpu": cpu}])
            policy = Policy.from_dict(study.file.records[key]["policy"])
            span = "marked" if kind == "spans" else "none"
            found.append(Arm(name, span=span, policy=policy, family="gains", tasks=plan.tasks))
    return tuple(found), frozenset(item.fingerprint for item in items)


def learn(
    model: Any, tokenizer: Any, items: Sequence[StudyItem], kind: str, *, steps: int, seed: int
) -> LearnedPerHead:
    """Learn gains that make the right candidates of items likelier than the others.

    The loss is the cross-entropy of the candidates' log-likelihoods. AdamW makes the steps, each on a few items, drawn
    by the seed.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode. Its parameters stay as they are.
        tokenizer: its tokenizer.
        items: what to learn from.
        kind: one of `LEARNERS`.
        steps: how many, at least 1.
        seed: of the order of items.

    Raises:
        ValueError: ``kind`` is none of `LEARNERS`.
    """
    if kind not in LEARNERS:
        raise ValueError(f"kind: expected one of {', '.join(LEARNERS)}, got {kind!r}")
    shape = model_shape(model)
    learned: LearnedPerHead
    if kind == "spans":
        learned = LearnedEmphasis(shape, Emphasis(strength=1.0))
    else:
        learned = LearnedGains(shape, Rebalance(alpha=0.0, boost_all=kind != LEARNERS[0]))
    optimizer = torch.optim.AdamW([learned.gains], lr=_RATE, weight_decay=0.0)
    draw = random.Random(seed)
    rows = [_rows(model, tokenizer, item) for item in items]
    with torch.enable_grad(), patch(model, learned) as patched:
        for _ in range(steps):
            batch = [rows[index] for index in draw.sample(range(len(rows)), min(_STEP_ITEMS, len(rows)))]
            found = iter(log_likelihoods(model, [row for mine in batch for row in mine], patched))
            scores = [torch.stack([next(found).sum() for _ in mine]) for mine in batch]
            loss = torch.stack([-each.log_softmax(0)[0] for each in scores]).mean()
            [learned.gains.grad] = torch.autograd.grad(loss, [learned.gains])
            optimizer.step()
    learned.gains.grad = None
    return learned


def _rows(model: Any, tokenizer: Any, item: StudyItem) -> list[AnswerRow]:
    prompt = item.prompt(tokenizer, span="marked")
    return [answer_row(model, tokenizer, prompt, " " + word, "item") for word in item.candidates]
