"""What a study compares: arms, the settings they come to, and a guard against settings that saw the held-out items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnrb.policies.base import Policy
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.profile import HeadProfile
from attnrb.policies.rebalance import Rebalance
from attnrb.studies.material import FORMS, StudyItem

__all__ = [
    "DRAWS",
    "PLAIN",
    "PRICE",
    "Arm",
    "LeakError",
    "Setting",
    "check_no_leak",
    "emphasis_arms",
    "rebalancing_arms",
]

PLAIN = "plain"
"""The arm that all others are compared with: the model and the prompt as they are."""
PRICE = "irrelevant"
"""The task whose span helps nobody."""
DRAWS = 5
"""Draws of random heads; items take them in turn."""

_AS_IS = FORMS[0]
_SEEN = "seen"  # in what a profile says about itself


class LeakError(ValueError):
    """A setting was chosen on items that it is to be reported on, or nobody knows on which."""


@dataclass(frozen=True)
class Setting:
    """A policy, and the items that had a part in choosing it.

    Attributes:
        policy: what is edited; None: nothing.
        seen: the fingerprints of the items that the policy was chosen on.
    """

    policy: Policy | None
    seen: frozenset[str] = frozenset()


def check_no_leak(arm: str, setting: Setting, held_out: Iterable[StudyItem]) -> None:
    """Refuse an arm that knows the items it would be reported on.

    Args:
        arm: its name, for the message.
        setting: what it edits. Profiles of heads say in their ``about["seen"]`` which items ranked them.
        held_out: what it would be reported on.

    Raises:
        LeakError: an item is among those that the setting saw, or the setting's heads come from a profile that does
            not say what it saw.
    """
    seen = set(setting.seen)
    heads = getattr(setting.policy, "heads", None)
    if isinstance(heads, HeadProfile):
        if _SEEN not in heads.about:
            raise LeakError(f"{arm}: its profile of heads does not say which items it was made from")
        seen |= set(heads.about[_SEEN])
    known = [item for item in held_out if item.fingerprint in seen]
    if known:
        raise LeakError(
            f"{arm}: its setting was chosen on {len(known)} of the items that it is reported on; choose on development "
            "items alone"
        )


@dataclass(frozen=True)
class Arm:
    """One way to point, or to edit.

    Attributes:
        name: as reports have it.
        form: one of `attnrb.studies.material.FORMS`.
        span: one of `attnrb.studies.material.POINTED`.
        policy: what is edited, but for its heads; None: nothing.
        heads: ``"all"``; ``"own"``, of the task's profile; ``"transferred"``, of all other tasks' gradients together;
            ``"random"``; or the name of a task, whose profile it is.
        family: differences of one family are corrected together.
        against: the arm that it is compared with.
        tasks: the tasks it is asked; None: all.
        share: of the items that it is asked, from 0 to 1.
    """

    name: str
    form: str = "as it is"
    span: str = "none"
    policy: Policy | None = None
    heads: str = "all"
    family: str = "controls"
    against: str = PLAIN
    tasks: tuple[str, ...] | None = None
    share: float = 1.0

    def asks(self, task: str) -> bool:
        """Whether it is asked a task's items."""
        return self.tasks is None or task in self.tasks

    def items(self, count: int) -> int:
        """Of ``count`` items, how many it is asked: the first ones."""
        return max(1, round(self.share * count))

    def setting(self, task: str, index: int, profiles: Mapping[str, HeadProfile], seen: frozenset[str]) -> Setting:
        """What it edits in one item: ``index`` says which random draw, ``seen`` what its strength was chosen on."""
        if self.policy is None or self.heads == "all" or not isinstance(self.policy, Emphasis):
            return Setting(self.policy, frozenset() if self.policy is None else seen)
        name = {"own": task, "transferred": f"all but {task}", "random": f"random {index % DRAWS}"}
        policy = replace(self.policy, heads=profiles[name.get(self.heads, self.heads)])
        return Setting(policy, seen)

    def to_dict(self) -> dict[str, Any]:
        """What it is, JSON-ready."""
        policy = None if self.policy is None else self.policy.label()
        return {"form": self.form, "span": self.span, "policy": policy, "heads": self.heads, "family": self.family}


def emphasis_arms(strengths: Sequence[float], tasks: Sequence[str], *, quick: bool) -> tuple[Arm, ...]:
    """The arms of the study of emphasis.

    Args:
        strengths: all choices of heads have each of these. The first one is also that of the other arms.
        tasks: those whose span helps.
        quick: with arms beside the main ones on a share of the items.
    """
    asked, few = tuple(tasks), 0.4 if quick else 1.0
    strong = strengths[0]
    main, prefix = Emphasis(strength=strong), f"×{strong:g}"
    found = [Arm(PLAIN, family="none")]
    for form in FORMS[1:]:
        found.append(Arm(f"text: {form}", form, family="text", tasks=asked, share=few))
    for strength in strengths:
        for heads in ("own", "all", "transferred", "random"):
            family = "headline" if heads == "own" and strength == strong else "heads"
            policy = Emphasis(strength=strength)
            found.append(Arm(f"×{strength:g}, {heads} heads", _AS_IS, "marked", policy, heads, family, tasks=asked))
    found.append(Arm(f"{prefix}, own heads, wrong span", _AS_IS, "wrong", main, "own", "wrong", tasks=asked))
    found.append(
        Arm(f"{prefix}, own heads, automatic span", _AS_IS, "automatic", main, "own", "automatic", tasks=asked)
    )
    ways = {
        f"{prefix}, own heads, rows all": (replace(main, rows="all"), "own"),
        f"{prefix}, own heads, rows last": (replace(main, rows="last"), "own"),
        "PASTA: outside ×0.01, own heads, rows all": (Emphasis(strength=1.0, outside=0.01, rows="all"), "own"),
        "SpotLight: share 0.3, all heads, rows all": (Emphasis(share=0.3, rows="all"), "all"),
    }
    for name, (policy, heads) in ways.items():
        found.append(Arm(name, _AS_IS, "marked", policy, heads, "ways", tasks=asked, share=few))
    for task in tasks:
        others, share = tuple(other for other in tasks if other != task), 0.25 if quick else 1.0
        name = f"{prefix}, heads of {task}"
        found.append(Arm(name, _AS_IS, "marked", main, task, "transfer", tasks=others, share=share))
    for heads in ("all", *tasks[:1]):
        name = f"{prefix}, {'all heads' if heads == 'all' else f'heads of {heads}'}, irrelevant span"
        found.append(Arm(name, _AS_IS, "marked", main, heads, "price", tasks=(PRICE,)))
    return tuple(found)


def rebalancing_arms(tasks: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of the study of re-balancing: the published strength, the paper's own formula and larger ones."""
    found = [Arm(PLAIN, family="none", tasks=tuple(tasks))]
    for alpha in (0.2, 1.0, 4.0, 16.0):
        for normalize in (False, True):
            name = f"alpha {alpha:g}" + (", rows normalised" if normalize else "")
            policy = Rebalance(alpha=alpha, normalize=normalize)
            found.append(Arm(name, policy=policy, family="re-balancing", tasks=tuple(tasks)))
    boosted = Rebalance(boost_all=True)
    found.append(Arm("alpha 0.2, all keys (control)", policy=boosted, family="control", tasks=tuple(tasks)))
    return tuple(found)
