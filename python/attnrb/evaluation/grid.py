"""Evaluate a model plain and re-balanced, from names of tasks to a report."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrb.config import RebalanceConfig
from attnrb.evaluation import prompts
from attnrb.evaluation.environment import environment, peak_memory
from attnrb.evaluation.report import Report, make_report
from attnrb.evaluation.runfile import RunFile
from attnrb.evaluation.runner import PLAIN, Progress, arm_label, prepare, run
from attnrb.evaluation.selection import cells_of, select

__all__ = ["Plan", "default_run_file", "evaluate"]

_QUIET = ("lm_eval", "datasets", "transformers", "accelerate")


@dataclass(frozen=True)
class Plan:
    """What to evaluate, and how.

    Attributes:
        tasks: names; see `attnrb.evaluation.selection.select`.
        data: folder of the items' files; None downloads them, through lm-evaluation-harness.
        configs: the re-balancings to compare with the plain model.
        prompting: ``direct``, ``cot`` (chain of thought) or ``both``.
        budgets: numbers of computed tokens of the chain of thought, each asked for by itself.
        min_computed: computed tokens at least, without `budgets`.
        max_computed: computed tokens at most, without `budgets`.
        limit: items of each task, each subject of MMLU.
        shuffle: take the items in an order drawn with `seed`, rather than the file's.
        seed: of that order and of the bootstrap.
        shots: examples before each question of direct prompting.
        generated: generate the answers of direct prompting, rather than score the choices.
        chat: put prompts into the model's chat template.
    """

    tasks: tuple[str, ...]
    data: Path | None = None
    configs: tuple[RebalanceConfig, ...] = (RebalanceConfig(),)
    prompting: str = "direct"
    budgets: tuple[int, ...] | None = None
    min_computed: int = 0
    max_computed: int = 256
    limit: int | None = None
    shuffle: bool = False
    seed: int = 0
    shots: int = 0
    generated: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("shots", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected {least} or above, got {value}")
        cells_of(self.prompting, self.budgets, self.min_computed, self.max_computed)

    def to_dict(self) -> dict[str, Any]:
        """Every option, JSON-ready."""
        return {
            **vars(self),
            "tasks": list(self.tasks),
            "data": None if self.data is None else str(self.data),
            "configs": [config.to_dict() for config in self.configs],
            "budgets": None if self.budgets is None else list(self.budgets),
        }


def default_run_file(plan: Plan, model: str) -> Path:
    """Where a run goes that nobody named a file for: the same plan and model name the same file again."""
    settings = {name: value for name, value in plan.to_dict().items() if name not in ("tasks", "limit", "configs")}
    digest = hashlib.sha256(json.dumps([model, settings], sort_keys=True).encode()).hexdigest()[:8]
    return Path(f"attnrb-eval-{digest}.jsonl")


def evaluate(
    lm: Any,
    plan: Plan,
    run_file: Path,
    *,
    model: str,
    progress: Callable[[Progress], None] | None = None,
    step: Callable[[str], None] | None = None,
) -> Report | None:
    """Run a plan, or go on with it, and report.

    Args:
        lm: an `attnrb.evaluation.model.AttnrbLM`, made with ``plain=True``.
        plan: what to do.
        run_file: the file of finished items. One that exists is gone on with.
        model: the model's name, for the report.
        progress: called as items are finished.
        step: called with a short line before each step that may take seconds.

    Returns:
        The report; None in all processes but the first of a run in several.

    Raises:
        DataError: a task does not exist, or its file is missing or malformed.
        RunFileError: the run's file cannot be used or written.
        TypeError, ValueError: an option is out of range, or a configuration does not fit the model.
    """
    say = step or (lambda _: None)
    quiet()
    say("Reading the items")
    selected = select(plan.tasks, plan.data, shots=plan.shots, generated=plan.generated, chat=plan.chat)
    if plan.chat and not getattr(lm.tokenizer, "chat_template", None):
        raise ValueError("chat: this tokenizer has no chat template")
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
        about = {
            "model": model,
            "model_digest": lm.digest(),
            "dtype": str(lm.model.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "batch_size": lm.batch_size,
            "seed": plan.seed,
            "settings": plan.to_dict(),
            "prompts": prompts.VERSION,
            "answers": len(questions) * len(arms),
            "seconds": round(time.perf_counter() - start, 1),
            "seconds_of_all_answers": round(file.seconds, 1),
            "peak_memory": peak_memory(),
            "run": str(run_file),
            "environment": environment(),
        }
        configs = {label: None if config is None else config.to_dict() for label, config in arms.items()}
        return make_report(file.records, questions, selected, configs, about, seed=plan.seed)


def open_run(lm: Any, path: Path, plan: Plan) -> RunFile:
    """The run's file, opened by the first process before the others."""
    identity = {
        "model": lm.digest(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "prompts": prompts.VERSION,
        "shots": plan.shots,
        "generated": plan.generated,
        "chat": plan.chat,
    }
    if lm.rank:
        lm.barrier()
        return RunFile(path, identity, lock=False)
    file = RunFile(path, identity)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    file.start({"started": now, "settings": plan.to_dict(), "environment": environment()})
    lm.barrier()
    return file


def quiet() -> None:
    """Silence the libraries that log what is no concern of the user's."""
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def plan_names(text: str | Sequence[str]) -> tuple[str, ...]:
    """Task names of a list with commas."""
    parts = [text] if isinstance(text, str) else text
    return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())
