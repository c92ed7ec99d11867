"""Which heads and layers to emphasise in, found within a budget: the study of selection.

Note: [What is selected from]
A ranking of all heads, from the gradients of all tasks together, says which heads could matter; how many of them, how
strongly, and whether one layer or a few would do, it does not. So these are tried on development items, by successive
halving (Note: [Successive halving] of `attnrb.evaluation.trials`): all candidates on a few items of each task, the best
of each three on three times as many, and so on. The winner is compared with the plain model, with all heads at the same
strength and with the defaults, on held-out items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnrb.evaluation.trials import halving_rounds
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.profile import HeadProfile
from attnrb.studies.arms import PLAIN, Arm
from attnrb.studies.conflict import SPLITS
from attnrb.studies.study import Study

__all__ = ["candidates", "run_selection"]

_FACTOR = 3
_KEPT = (4, 8, 16, 32, 64, 128)
_LAYERS = (1, 2, 4)


def candidates(strengths: Sequence[float], ranking: HeadProfile) -> dict[str, Emphasis]:
    """The settings to choose from, by name: each strength in all heads, in the best ones, and in the best layers.

    Args:
        strengths: of `attnrb.Emphasis`.
        ranking: of all heads. A layer is as good as its heads' scores above 0 together.
    """
    total = ranking.layers * ranking.heads
    layers = sorted(range(ranking.layers), key=lambda layer: (-_worth(ranking.scores[layer]), layer))
    found = {}
    for strength in strengths:
        found[f"×{strength:g}, all heads"] = Emphasis(strength=strength)
        for keep in (each for each in _KEPT if each < total):
            found[f"×{strength:g}, {keep} heads"] = Emphasis(strength=strength, heads=ranking.keeping(keep))
        for count in (each for each in _LAYERS if each < ranking.layers):
            chosen = sorted(layers[:count])
            name = f"×{strength:g}, layer{'s' * (count > 1)} {', '.join(map(str, chosen))}"
            found[name] = Emphasis(strength=strength, layers=chosen)
    return found


def _worth(scores: Sequence[float]) -> float:
    return sum(max(0.0, score) for score in scores)


def run_selection(study: Study) -> dict[str, Any]:
    """Select, and ask the held-out items: what was chosen, as `make_study_report` takes it.

    Raises:
        LeakError: an arm's setting saw an item that it would be reported on.
        RunFileError: an answer could not be written.
    """
    study.make_profiles()
    tasks = study.asked.ranked
    settings = candidates(study.plan.strengths, study.profiles["all"])
    trials, winner, seen = _halved(study, settings, tasks)
    ranked_on = frozenset(study.profiles["all"].about["seen"])
    strength = settings[winner].strength
    others = {
        f"×{strength:g}, all heads": Emphasis(strength=strength),
        "the default: ×8, all heads": Emphasis(),
        f"×{strength:g}, random heads": Emphasis(strength=strength),
    }
    arms = [Arm(PLAIN, family="none", tasks=tasks)]
    name = f"selected: {winner}"
    arms.append(Arm(name, "as it is", "marked", settings[winner], family="selected", tasks=tasks))
    for label, policy in others.items():
        heads = "random" if "random" in label else "all"
        arms.append(Arm(label, "as it is", "marked", policy, heads, "others", tasks=tasks))
    study.ask_arms(arms, seen | ranked_on)
    return {"arms": tuple(arms), "strength": strength, "chosen_on": len(seen), "trials": trials}


def _halved(
    study: Study, settings: Mapping[str, Emphasis], tasks: Sequence[str]
) -> tuple[list[dict[str, Any]], str, frozenset[str]]:
    """Every setting with how many items it was tried on and got right; the winner; the items that chose it."""
    left = list(settings)
    trials: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for items in halving_rounds(study.plan.development, _FACTOR):
        asked = {}
        for name in left:
            arm = Arm(name, "as it is", "marked", settings[name])
            mine = study.asked.questions(arm, SPLITS[0], tasks)
            asked[name] = [each for each in mine if each.number < study.plan.examples + items]
        study.ask([each for mine in asked.values() for each in mine], frozenset())
        for name, mine in asked.items():
            right = sum(study.file.records[each.key]["correct"] for each in mine)
            trials[name] = {"setting": name, "items": len(mine), "correct": right, "accuracy": right / len(mine)}
            seen |= {each.item.fingerprint for each in mine}
        left.sort(key=lambda name: -trials[name]["correct"])  # of equals the first
        if items < study.plan.development:
            left = left[: -(-len(left) // _FACTOR)]
    return list(trials.values()), left[0], frozenset(seen)
