"""Gains learnt on development items, against controls of equal size and LoRA: the study of gains.

Note: [A control for learnt gains]
Numbers that are trained on the items of a task may raise its accuracy whatever they multiply. So gains on outliers
stand beside gains on every key, which with rows as they are is one scale for each head's whole output: as many
parameters, the same layers, the same start, the same steps. Gains on the first key and on spans are biases, one for
each head too. LoRA of rank 1 has more parameters, and says what the same items and steps are worth to a usual method.

Note: [Attribution and chance]
The gradient of the loss at gains of 0 says which heads would lower it most. The gains of the ``keep`` heads with the
largest gradients are set to one step against it, and all others stay 0. The control takes as many heads by chance, each
with the sign of its own gradient, so that only the choice differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from attnrb.evaluation.runfile import Key
from attnrb.hosts.transformers.patch import patch
from attnrb.policies.base import Policy, model_shape
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.learnable import LearnedPerHead
from attnrb.policies.learned import LearnedGains
from attnrb.policies.learned_emphasis import LearnedEmphasis
from attnrb.policies.profile import HeadProfile
from attnrb.policies.rebalance import Rebalance
from attnrb.studies.adapters import Adapter, adapted
from attnrb.studies.answers import AnswerRow, answer_row, log_likelihoods
from attnrb.studies.arms import PLAIN, Arm
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import StudyItem
from attnrb.studies.study import FIRST_KEY, Study, first_key_marked

__all__ = ["ATTRIBUTED", "LEARNERS", "LORA", "attributed", "learn", "learnt_arms"]

LEARNERS = ("outliers", "every key (control)", "first key", "spans")
"""What gains are learnt for."""
LORA = "LoRA, rank 1"
ATTRIBUTED = ("largest gradients", "chance (control)")
"""How heads are chosen whose gains are set by one gradient."""
SOME_HEADS = (
    (LEARNERS[0], "ranked best", "all"),
    (LORA, "ranked best", "all"),
    (LORA, "drawn by chance (control)", "random 0"),
)
"""What is learnt for some heads alone, how they are chosen, and what a study calls their profile."""

_STEP_ITEMS = 8
_RATE = 0.03
_LORA_RATE = 0.003
_ATTRIBUTED_GAIN = 0.3


class _Job(NamedTuple):
    """Something to learn, and the arm that comes of it."""

    name: str
    learn: Callable[[], Mapping[str, Any]]
    span: str
    family: str

    @property
    def key(self) -> Key:
        return Key("all", -1, self.name, SPLITS[0], None)


def learnt_arms(study: Study) -> tuple[tuple[Arm, ...], frozenset[str]]:
    """An arm for each kind of gains and each seed, learnt here or read from the run's file.

    Returns:
        The arms, and the fingerprints of the items that the gains were learnt on.
    """
    study.make_profiles()
    tasks = study.asked.ranked
    items = [item for task in tasks for item in study.asked.items(task, SPLITS[0])]
    jobs = list(_jobs(study, items))
    study.share_out([(job.key, job.learn) for job in jobs])
    found = [Arm(PLAIN, family="none", tasks=tasks)]
    for job in jobs:
        record = study.file.records[job.key]
        if "adapter" in record:
            study.adapters[job.name] = Adapter.from_dict(record["adapter"])
            found.append(Arm(job.name, family=job.family, tasks=tasks, adapter=job.name))
        else:
            policy = Policy.from_dict(record["policy"])
            found.append(Arm(job.name, span=job.span, policy=policy, family=job.family, tasks=tasks))
    return tuple(found), frozenset(item.fingerprint for item in items)


def _jobs(study: Study, items: Sequence[StudyItem]) -> Iterator[_Job]:
    plan, model, tokenizer = study.plan, study.model, study.tokenizer
    spans = {"spans": "marked", "first key": FIRST_KEY}

    def learning(name: str, kind: str, seed: int, heads: HeadProfile | None = None) -> Callable[[], Mapping[str, Any]]:
        def job() -> Mapping[str, Any]:
            study.say(f"Learning {name}")
            learned = learn(model, tokenizer, items, kind, steps=plan.steps, seed=seed, heads=heads)
            return {"adapter" if kind == LORA else "policy": learned.to_dict()}

        return job

    def attributing(how: str, seed: int) -> Callable[[], Mapping[str, Any]]:
        def job() -> Mapping[str, Any]:
            study.say(f"Gains by {how}, seed {seed}")
            return {"policy": attributed(model, tokenizer, items, how, keep=plan.keep, seed=seed).to_dict()}

        return job

    for seed in range(plan.seed, plan.seed + plan.seeds):
        for kind in LEARNERS:
            name = f"gains on {kind}, seed {seed}"
            yield _Job(name, learning(name, kind, seed), spans.get(kind, "none"), "gains")
        name = f"{LORA}, seed {seed}"
        yield _Job(name, learning(name, LORA, seed), "none", "gains")
    for kind, how, profile in SOME_HEADS:
        heads = study.profiles[profile]
        what = kind if kind == LORA else f"gains on {kind}"
        name = f"{what}, {heads.keep} heads {how}, seed {plan.seed}"
        yield _Job(name, learning(name, kind, plan.seed, heads), "none", "some heads")
    chosen, chance = ATTRIBUTED
    yield _Job(f"outliers, heads by {chosen}", attributing(chosen, plan.seed), "none", "attribution")
    for seed in range(plan.seed, plan.seed + plan.seeds):
        yield _Job(f"outliers, heads by {chance}, seed {seed}", attributing(chance, seed), "none", "attribution")


def learn(
    model: Any,
    tokenizer: Any,
    items: Sequence[StudyItem],
    kind: str,
    *,
    steps: int,
    seed: int,
    heads: HeadProfile | None = None,
) -> LearnedPerHead | Adapter:
    """Learn gains that make the right candidates of items likelier than the others.

    The loss is the cross-entropy of the candidates' log-likelihoods. AdamW makes the steps, each on a few items, drawn
    by the seed.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode. Its parameters stay as they are.
        tokenizer: its tokenizer.
        items: what to learn from.
        kind: one of `LEARNERS`, or `LORA`.
        steps: how many, at least 1.
        seed: of the order of items.
        heads: which are trained; None: all.

    Raises:
        ValueError: ``kind`` is none of these.
    """
    if kind not in (*LEARNERS, LORA):
        raise ValueError(f"kind: expected one of {', '.join((*LEARNERS, LORA))}, got {kind!r}")
    learned = Adapter(model, rank=1, heads=heads, seed=seed) if kind == LORA else _gains(model, kind, heads)
    parameters = list(learned.parameters())
    rate = _LORA_RATE if kind == LORA else _RATE
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    draw = random.Random(seed)
    rows = [_rows(model, tokenizer, item, first_key=kind == "first key") for item in items]
    with torch.enable_grad(), ExitStack() as stack:
        patched = None
        if isinstance(learned, Adapter):
            stack.enter_context(adapted(model, learned))
        else:
            patched = stack.enter_context(patch(model, learned))
        for _ in range(steps):
            places = draw.sample(range(len(rows)), min(_STEP_ITEMS, len(rows)))
            loss = _loss(model, [items[at] for at in places], [rows[at] for at in places], patched)
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return learned


def attributed(
    model: Any, tokenizer: Any, items: Sequence[StudyItem], how: str, *, keep: int, seed: int
) -> LearnedGains:
    """Gains on outliers, set by one gradient in some heads: see Note: [Attribution and chance].

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode. Its parameters stay as they are.
        tokenizer: its tokenizer.
        items: what the gradient is taken on.
        how: one of `ATTRIBUTED`.
        keep: how many heads, or all if there are fewer.
        seed: of the heads that are drawn.

    Raises:
        ValueError: ``how`` is none of these.
    """
    if how not in ATTRIBUTED:
        raise ValueError(f"how: expected one of {', '.join(ATTRIBUTED)}, got {how!r}")
    learned = LearnedGains(model_shape(model), Rebalance(alpha=0.0))
    rows = [_rows(model, tokenizer, item) for item in items]
    total = torch.zeros_like(learned.gains)
    with torch.enable_grad(), patch(model, learned) as patched:
        for start in range(0, len(items), _STEP_ITEMS):
            mine = slice(start, start + _STEP_ITEMS)
            total += torch.autograd.grad(_loss(model, items[mine], rows[mine], patched), learned.gains)[0]
    size = total.abs() if how == ATTRIBUTED[0] else _drawn(total, seed)
    kept = size.flatten().topk(min(keep, total.numel())).indices
    gains = torch.zeros(total.numel(), dtype=torch.float32, device="cpu")
    gains[kept] = -_ATTRIBUTED_GAIN * total.flatten()[kept].sign()
    with torch.no_grad():
        learned.gains.copy_(gains.view_as(total))
    return learned


def _drawn(like: torch.Tensor, seed: int) -> torch.Tensor:
    drawn = torch.rand(like.shape, generator=_generator(seed), dtype=torch.float32, device="cpu")
    return drawn.to(like.device)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gains(model: Any, kind: str, heads: HeadProfile | None) -> LearnedPerHead:
    shape = model_shape(model)
    if kind in ("spans", "first key"):
        return LearnedEmphasis(shape, Emphasis(strength=1.0, heads=heads))
    return LearnedGains(shape, Rebalance(alpha=0.0, boost_all=kind != LEARNERS[0]), heads=heads)


def _loss(model: Any, items: Sequence[StudyItem], rows: Sequence[Sequence[AnswerRow]], patched: Any) -> torch.Tensor:
    """The mean cross-entropy of the right candidates among all, in nats."""
    found = iter(log_likelihoods(model, [row for mine in rows for row in mine], patched))
    losses = []
    for item, mine in zip(items, rows, strict=True):
        scores = torch.stack([next(found).sum() for _ in mine])
        if item.per_character:
            scores = scores / torch.tensor(
                [len(word) for word in item.candidates], dtype=scores.dtype, device=scores.device
            )
        losses.append(-scores.log_softmax(0)[0])
    return torch.stack(losses).mean()


def _rows(model: Any, tokenizer: Any, item: StudyItem, *, first_key: bool = False) -> list[AnswerRow]:
    prompt = item.prompt(tokenizer, span="none" if first_key else "marked")
    rows = [answer_row(model, tokenizer, prompt, " " + word, "item") for word in item.candidates]
    return [first_key_marked(row) for row in rows] if first_key else rows
