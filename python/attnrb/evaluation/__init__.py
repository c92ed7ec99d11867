"""Does re-balancing help a model reason? Evaluation on lm-evaluation-harness, which the extra ``eval`` installs.

    from attnrb.evaluation import AttnrbLM, Plan, evaluate

    report = evaluate(AttnrbLM(plain=True), Plan(("siqa",), data=Path("data")), Path("siqa.jsonl"), model="SmolLM2")

`ComputedTokenBudget` and the extraction of answers work without the harness.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnrb.evaluation.data import DataError
    from attnrb.evaluation.extraction import Extraction, extract_choice, extract_number
    from attnrb.evaluation.grid import evaluate
    from attnrb.evaluation.plan import Plan
    from attnrb.evaluation.report import Report
    from attnrb.evaluation.runfile import RunFileError
    from attnrb.evaluation.trials import SearchPlan, search
    from attnrb.hosts.lm_eval.budget import ComputedTokenBudget, Reading
    from attnrb.hosts.lm_eval.model import AttnrbLM

# Imported when they are first used: the harness alone takes seconds.
_PLACES = {
    "AttnrbLM": "attnrb.hosts.lm_eval.model",
    "ComputedTokenBudget": "attnrb.hosts.lm_eval.budget",
    "DataError": "attnrb.evaluation.data",
    "Extraction": "attnrb.evaluation.extraction",
    "Plan": "attnrb.evaluation.plan",
    "Reading": "attnrb.hosts.lm_eval.budget",
    "Report": "attnrb.evaluation.report",
    "RunFileError": "attnrb.evaluation.runfile",
    "SearchPlan": "attnrb.evaluation.trials",
    "evaluate": "attnrb.evaluation.grid",
    "extract_choice": "attnrb.evaluation.extraction",
    "extract_number": "attnrb.evaluation.extraction",
    "search": "attnrb.evaluation.trials",
}

__all__ = [
    "AttnrbLM",
    "ComputedTokenBudget",
    "DataError",
    "Extraction",
    "Plan",
    "Reading",
    "Report",
    "RunFileError",
    "SearchPlan",
    "evaluate",
    "extract_choice",
    "extract_number",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("lm_eval", "datasets", "statsmodels", "scipy", "optuna"):
            raise ImportError(
                f"attnrb.evaluation needs the package {error.name}: run `pip install 'attnrb[eval]'`"
            ) from error
        raise


def __dir__() -> list[str]:
    # `help` and completion show what is imported on demand, too.
    return sorted({*globals(), *__all__})
