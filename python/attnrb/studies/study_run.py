"""A study from its plan to its report, resumable: the run's file keeps whatever was answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnrb.evaluation.environment import environment, peak_memory
from attnrb.evaluation.runfile import check_usable, open_together
from attnrb.evaluation.runner import Progress
from attnrb.hosts.processes import Processes
from attnrb.studies.arms import emphasis_arms
from attnrb.studies.engines import Engine
from attnrb.studies.gains import learnt_arms
from attnrb.studies.plan import StudyPlan, study_tasks
from attnrb.studies.rebalancing import run_rebalancing
from attnrb.studies.selection import run_selection
from attnrb.studies.study import Study
from attnrb.studies.study_report import make_study_report

__all__ = ["StudyPlan", "check_run", "default_run_file", "model_digest", "study_report"]

_MATERIAL = 1  # the version of the items' wording
# Options that may change between two starts of one run: they add tasks or items, and alter no answer.
_GROWING = ("items", "quick", "needles", "written", "budgets")


def default_run_file(plan: StudyPlan, model: str) -> Path:
    """Where a run goes that nobody named a file for: the same plan and model name the same file again."""
    # A larger number of items continues in the same file.
    settings = {name: value for name, value in plan.to_dict().items() if name != "items"}
    digest = hashlib.sha256(json.dumps([model, settings], sort_keys=True).encode()).hexdigest()[:8]
    return Path(f"attnrb-study-{plan.study}-{digest}.jsonl")


def study_report(
    model: Any,
    tokenizer: Any,
    plan: StudyPlan,
    run_file: Path,
    *,
    model_name: str,
    progress: Callable[[Progress], None] | None = None,
    processes: Processes | None = None,
    engine: Engine | None = None,
) -> dict[str, Any] | None:
    """Run a study, or continue it, and report.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode.
        tokenizer: its tokenizer.
        plan: what to ask.
        run_file: the file of finished answers. Where it exists, the run continues.
        model_name: for the report.
        progress: called as answers are finished.
        processes: those that share the work. Default: this one alone.
        engine: what answers. Default: the model itself.

    Returns:
        The report, JSON-ready; None in all processes but the first.

    Raises:
        DataError: a file of the plan's data is missing or malformed.
        LeakError: an arm's setting saw an item that it would be reported on.
        RunFileError: the run's file cannot be used or written.
    """
    processes = processes or Processes()
    dtype = str(model.dtype).removeprefix("torch.")
    identity = {"model": model_digest(model), "dtype": dtype, **_known_identity(plan)}
    rank, wait = processes.rank, processes.wait
    with open_together(run_file, identity, plan.to_dict(), rank=rank, wait=wait) as file:
        study = Study(model, tokenizer, plan, file, progress, processes, engine)
        chosen = _run(study)
        if processes.rank:
            return None
        found = make_study_report(file.records.values(), chosen, plan.seed, tuple(study_tasks(plan)))
        return {
            "study": plan.study,
            "model": model_name,
            "model_digest": identity["model"],
            "dtype": dtype,
            "settings": plan.to_dict(),
            "data": plan.sources(),
            "answers": sum(each["items"] for each in found["results"]),
            "run": str(run_file),
            **found,
            "peak_memory": peak_memory(),
            "environment": environment(),
        }


def check_run(run_file: Path, plan: StudyPlan) -> None:
    """Raise RunFileError where the run's file cannot be used, as far as that is known before the model is."""
    check_usable(run_file, _known_identity(plan))


def _known_identity(plan: StudyPlan) -> dict[str, Any]:
    """What answers depend on beside the model."""
    own = {name: value for name, value in plan.to_dict().items() if name not in (*_GROWING, "data")}
    return {"material": _MATERIAL, "data": plan.sources(), **own}


def _run(study: Study) -> dict[str, Any]:
    """All steps of a study: what it chose on development items. The answers are in its file."""
    chosen: dict[str, Any] = {"strength": None, "chosen_on": 0}
    if study.plan.study == "rebalancing":
        chosen |= run_rebalancing(study)
    elif study.plan.study == "gains":
        arms, learnt_on = learnt_arms(study)
        study.ask_arms(arms, learnt_on)
        chosen |= {"arms": arms, "chosen_on": len(learnt_on)}
    elif study.plan.study == "selection":
        chosen |= run_selection(study)
    else:
        chosen |= _emphasis(study)
    return {"left_out": study.asked.left_out, **chosen}


def _emphasis(study: Study) -> dict[str, Any]:
    plan = study.plan
    study.make_profiles()
    strength, seen = study.choose_strength()
    others = () if plan.quick else tuple(each for each in plan.strengths if each != strength)
    arms = emphasis_arms((strength, *others), study.asked.tasks, quick=plan.quick)
    study.ask_arms(arms, seen)
    study.ask_neutral(arms, seen)
    return {"arms": arms, "strength": strength, "chosen_on": len(seen)}


def model_digest(model: Any) -> str:
    """16 hex digits that tell this model's weights from others': of the shape and some numbers of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten()[:1024].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
