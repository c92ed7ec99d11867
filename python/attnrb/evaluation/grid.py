"""Evaluate a model plain and re-balanced, from names of tasks to a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attnrb.evaluation import prompts
from attnrb.evaluation.environment import environment, peak_memory
from attnrb.evaluation.plan import Plan, TaskPlan
from attnrb.evaluation.report import Report, make_report
from attnrb.evaluation.runfile import RunFile, check_usable, open_together
from attnrb.evaluation.runner import PLAIN, Progress, arm_label, prepare, run
from attnrb.evaluation.selection import Selected, cells_of

__all__ = ["evaluate"]

_QUIET = ("lm_eval", "datasets", "huggingface_hub", "transformers", "accelerate")


def evaluate(
    lm: Any,
    plan: Plan,
    run_file: Path,
    *,
    model: str,
    selected: Sequence[Selected] | None = None,
    progress: Callable[[Progress], None] | bool | None = None,
    step: Callable[[str], None] | None = None,
) -> Report | None:
    """Run a plan, or continue it, and report.

    Args:
        lm: an `attnrb.hosts.lm_eval.model.AttnrbLM`, made with ``plain=True``.
        plan: what to do.
        run_file: the file of finished items. Where it exists, the run continues.
        model: the model's name, for the report.
        selected: the plan's tasks, where they are read already.
        progress: called as items are finished; True shows a bar.
        step: called with a short line before each step that may take seconds.

    Returns:
        The report; None in all processes but the first of a run in several.

    Raises:
        DataError: a task does not exist, or its file is missing or malformed.
        RunFileError: the run's file cannot be used or written.
        TypeError, ValueError: an option is out of range, or a configuration does not fit the model.
    """
    say = step or (lambda _: None)
    selected = begin(lm, plan, selected, say)
    arms = {PLAIN: None, **{arm_label(config): config for config in plan.configs}}
    for config in plan.configs:  # one that does not fit the model fails before hours of work
        with lm.rebalanced(config):
            pass
    cells = cells_of(plan.prompting, plan.budgets, plan.min_computed, plan.max_computed)
    say("Building the prompts")
    shuffle_seed = plan.seed if plan.shuffle else None
    questions = prepare(lm, selected, cells, limit=plan.limit, shuffle_seed=shuffle_seed, chat=plan.chat)

    start = time.perf_counter()
    with open_run(lm, run_file, plan) as file:
        run(lm, questions, arms, file, progress=progress)
        lm.barrier()
        if lm.rank:
            return None
        file.reread()
        configs = {label: None if config is None else config.to_dict() for label, config in arms.items()}
        about = about_run(lm, plan, file, model=model, answers=len(questions) * len(arms), start=start)
        return make_report(file.records, questions, selected, configs, about, seed=plan.seed)


def begin(
    lm: Any, plan: TaskPlan, selected: Sequence[Selected] | None, say: Callable[[str], None]
) -> Sequence[Selected]:
    """The tasks of a plan, read where they are not yet, once it is known that they can be asked.

    Raises:
        DataError: a task does not exist, or its items cannot be had.
        ValueError: the plan wants a chat template, and there is none.
    """
    quiet()
    if plan.chat and not getattr(lm.tokenizer, "chat_template", None):
        raise ValueError("chat: this tokenizer has no chat template")
    if selected is None:
        say("Reading the items")
        selected = plan.select()
    return selected


def about_run(lm: Any, plan: TaskPlan, file: RunFile, *, model: str, answers: int, start: float) -> dict[str, Any]:
    """What a report says of its run; `start` is of this one, by ``time.perf_counter``."""
    return {
        "model": model,
        "model_digest": lm.digest(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "batch_size": lm.batch_size,
        "seed": plan.seed,
        "settings": plan.to_dict(),
        "prompts": prompts.VERSION,
        "answers": answers,
        "seconds": round(time.perf_counter() - start, 1),
        "seconds_of_all_answers": round(file.seconds, 1),
        "peak_memory": peak_memory(),
        "run": str(file.path),
        "environment": environment(),
    }


def open_run(lm: Any, path: Path, plan: TaskPlan) -> RunFile:
    """The run's file, opened by the first process before the others.

    Raises:
        RunFileError: it cannot be used.
    """
    of_model = {"model": lm.digest(), "dtype": str(lm.model.dtype).removeprefix("torch.")}
    identity = {**of_model, **_known_identity(plan)}
    return open_together(path, identity, plan.to_dict(), rank=lm.rank, wait=lm.barrier)


def check_run(path: Path, plan: TaskPlan) -> None:
    """Raise RunFileError where the run's file cannot be used, as far as that is known before the model is."""
    check_usable(path, _known_identity(plan))


def _known_identity(plan: TaskPlan) -> dict[str, Any]:
    """What answers depend on beside the model."""
    return {"prompts": prompts.VERSION, "shots": plan.shots, "generated": plan.generated, "chat": plan.chat}


def quiet() -> None:
    """Silence the libraries that log, or draw bars of, what is no concern of the user's; downloads keep their bars."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
