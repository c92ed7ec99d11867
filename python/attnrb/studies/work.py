"""How much a study is, before it starts: answers, tokens that are read and written, and about how long that takes."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from attnrb.hosts.transformers.caches import cache_of, with_cache
from attnrb.policies.base import model_shape
from attnrb.policies.emphasis import Emphasis
from attnrb.studies.arms import PLAIN, Arm, emphasis_arms, rebalancing_arms, settings_of_rebalancing
from attnrb.studies.asked import Asked
from attnrb.studies.conflict import SPLITS
from attnrb.studies.plan import StudyPlan
from attnrb.studies.study import context_of

__all__ = ["StudyWork", "seconds_of", "study_work"]

_TRAINING = 3  # a forward and a backward, in forwards
_LEARNERS = 6  # that are trained for each seed, about
_SELECTED_ARMS = 5
_ROUNDS = 3  # that every setting of one strength costs, in development items of each task: ten, a third of them each
_STEP_ROWS = 24  # of a training step
_ROWS, _TOKENS, _STEPS = 16, 128, 8


class StudyWork(NamedTuple):
    """What a study asks of a model."""

    answers: int
    read: int
    """Tokens, about; those of a backward count three times."""
    written: int
    """Tokens at most."""


def study_work(plan: StudyPlan, model: Any) -> StudyWork:
    """What a plan asks of a model. Tasks that the plan may leave out, for a model that guesses, are counted.

    Raises:
        DataError: a file of the plan's data is missing or malformed.
    """
    asked = Asked(plan, context_of(model))
    questions = []
    extra = 0
    if plan.study == "emphasis":
        arms = emphasis_arms(plan.strengths[:1] if plan.quick else plan.strengths, asked.tasks, quick=plan.quick)
        for strength in plan.strengths:
            for _ in range(2):
                arm = Arm("", "as it is", "marked", Emphasis(strength=strength))
                questions += asked.questions(arm, SPLITS[0], asked.ranked)
        for task in asked.ranked:
            examples = asked.items(task, SPLITS[0])[: plan.examples]
            extra += _TRAINING * sum(len(item.text()[0]) // 4 for item in examples)
    elif plan.study == "rebalancing":
        layers = model_shape(model).layers
        arms = rebalancing_arms(asked.compared, layers, quick=plan.quick)
        arms += (Arm("chosen", tasks=asked.compared),)
        for _ in settings_of_rebalancing(layers):
            questions += asked.questions(Arm(""), SPLITS[0], asked.compared)
        thought = tuple(name for name in asked.tasks if name not in asked.compared)
        arms += tuple(Arm("", tasks=thought) for _ in range(4))
        questions += asked.questions(Arm(""), SPLITS[0], thought)
    elif plan.study == "selection":
        arms = tuple(Arm("") for _ in range(_SELECTED_ARMS))
        for _ in plan.strengths:
            questions += _ROUNDS * asked.questions(Arm(""), SPLITS[0], asked.ranked)
    else:
        arms = (Arm(PLAIN), *(Arm("") for _ in range(plan.seeds * _LEARNERS + 1)))
        tokens = [len(item.text()[0]) // 4 for task in asked.ranked for item in asked.items(task, SPLITS[0])]
        mean = sum(tokens) / len(tokens)
        extra = round(_TRAINING * plan.seeds * (_LEARNERS - 1) * plan.steps * _STEP_ROWS * mean)
    questions += [each for arm in arms for each in asked.questions(arm, SPLITS[1])]
    read, written = (sum(getattr(each, name) for each in questions) for name in ("read", "written"))
    return StudyWork(len(questions), read + extra, written)


def seconds_of(work: StudyWork, model: Any) -> float:
    """About how long that takes this model here, from some forwards that are timed. The time is of one process."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    draw = torch.Generator(device="cpu").manual_seed(0)
    ids = torch.randint(vocabulary, (_ROWS, _TOKENS), generator=draw, dtype=torch.int64, device="cpu").to(model.device)
    with torch.inference_mode():
        model(ids[:1], use_cache=False, logits_to_keep=1)  # the first forward pays for what is made once
        start = time.perf_counter()
        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))
        _wait(model)
        reading = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(_STEPS):
            cache = cache_of(model(ids[:, step : step + 1], use_cache=True, **with_cache(model, cache)))
        _wait(model)
        writing = time.perf_counter() - start
    return work.read * reading / (_ROWS * _TOKENS) + work.written * writing / (_ROWS * _STEPS)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
