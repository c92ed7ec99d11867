"""The study of re-balancing: settings compared on held-out items, the best ones chosen on development items.

Note: [Where there is nothing to lose or win]
A model that guesses cannot show what an edit does to its answers. So tasks with a chain of thought, which take most of
the time, are asked only where the plain model gets more development items right than by chance, with the lower end of
Wilson's interval. Other tasks are asked in any case, and the report says where the plain model stands.
"""

from __future__ import annotations

from typing import Any

from attnrb.evaluation.statistics import accuracy
from attnrb.policies.base import model_shape
from attnrb.policies.rebalance import Rebalance
from attnrb.studies.arms import PLAIN, Arm, rebalancing_arms, settings_of_rebalancing
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import MATERIAL
from attnrb.studies.questions import QUESTIONS
from attnrb.studies.study import Study

__all__ = ["run_rebalancing"]

_MADE, _ASKED = "made items", "questions"
_THOUGHT_ALPHAS = (0.2, 1.0)


def run_rebalancing(study: Study) -> dict[str, Any]:
    """Ask everything: what was chosen, as `attnrb.studies.study_report.make_study_report` takes it.

    Raises:
        LeakError: an arm's setting saw an item that it would be reported on.
        RunFileError: an answer could not be written.
    """
    layers = model_shape(study.model).layers
    compared = study.asked.compared
    kinds = {
        _MADE: tuple(name for name in compared if name in MATERIAL),
        _ASKED: tuple(name for name in compared if name not in MATERIAL),
    }
    settings = settings_of_rebalancing(layers)
    best: dict[str, tuple[str, Rebalance]] = {}
    seen: frozenset[str] = frozenset()
    chosen = []
    for kind, tasks in kinds.items():
        if tasks:
            arms = {name: [Arm(name, policy=policy)] for name, policy in settings.items()}
            right, mine = study.right_answers(arms, tasks)
            name = max(right, key=lambda each: right[each])  # the first of equals
            best[kind] = name, settings[name]
            seen |= mine
            chosen.append(
                Arm(f"chosen for {kind}: {name}", policy=settings[name], family="chosen setting", tasks=tasks)
            )
    arms_asked = (*rebalancing_arms(compared, layers, quick=study.plan.quick), *chosen)
    study.ask_arms(arms_asked, seen)
    thought, more = _thought(study, best.get(_ASKED))
    study.ask_arms(thought, seen | more)
    return {"arms": (*arms_asked, *thought), "chosen_on": len(seen), "chance": _chances(study)}


def _chances(study: Study) -> dict[str, float]:
    """What guessing gets right in each task of questions."""
    return {name: QUESTIONS[_question(name)].chance for name in study.asked.tasks if _question(name) in QUESTIONS}


def _question(task: str) -> str:
    return task.partition(",")[0]


def _thought(study: Study, best: tuple[str, Rebalance] | None) -> tuple[tuple[Arm, ...], frozenset[str]]:
    """The arms that are asked with a chain of thought, and the items that decided on which tasks."""
    tasks = tuple(name for name, task in study.asked.tasks.items() if task.tokens is not None)
    plain, seen = Arm(PLAIN, family="none"), set()
    able = []
    for task in tasks:
        asked = study.asked.questions(plain, SPLITS[0], [task])
        study.ask(asked, frozenset())
        seen |= {each.item.fingerprint for each in asked}
        found = accuracy([study.file.records[each.key]["correct"] for each in asked])
        if found.wilson[0] > QUESTIONS[_question(task)].chance:
            able.append(task)
        else:
            study.asked.left_out[task] = (
                f"the plain model got {found.correct} of {found.items} development items right, no more than by chance"
            )
    if not able:
        return (), frozenset(seen)
    family, asks = "computed tokens", tuple(able)
    found_arms = [Arm(PLAIN, family="none", tasks=asks)]
    for alpha in _THOUGHT_ALPHAS:
        found_arms.append(Arm(f"alpha {alpha:g}", policy=Rebalance(alpha=alpha), family=family, tasks=asks))
    if best is not None and best[1] not in [arm.policy for arm in found_arms]:
        found_arms.append(Arm(f"chosen for {_ASKED}: {best[0]}", policy=best[1], family=family, tasks=asks))
    return tuple(found_arms), frozenset(seen)
