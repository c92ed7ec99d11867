"""What a study compares: arms, the settings they come to, and a guard against settings that saw the held-out items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from attnrb.policies.base import Policy
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.profile import HeadProfile
from attnrb.policies.rebalance import Rebalance
from attnrb.studies.material import FORMS, StudyItem
from attnrb.studies.plan import StudyTask
from attnrb.studies.shuffled import ShuffledRebalance

__all__ = [
    "DRAWS",
    "PLAIN",
    "Arm",
    "LeakError",
    "Setting",
    "check_no_leak",
    "emphasis_arms",
    "rebalancing_arms",
    "settings_of_rebalancing",
]

PLAIN = "plain"
"""The arm that all others are compared with: the model and the prompt as they are."""
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
        adapter: which of the study's adapters the model has; None: none.
    """

    policy: Policy | None
    seen: frozenset[str] = frozenset()
    adapter: str | None = None


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
        adapter: which of the study's adapters the model has; None: none.
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
    adapter: str | None = None

    def asks(self, task: str) -> bool:
        """Whether it is asked a task's items."""
        return self.tasks is None or task in self.tasks

    def items(self, count: int) -> int:
        """Of ``count`` items, how many it is asked: the first ones."""
        return max(1, round(self.share * count))

    def setting(self, task: str, index: int, profiles: Mapping[str, HeadProfile], seen: frozenset[str]) -> Setting:
        """What it edits in one item: ``index`` says which random draw, ``seen`` what its strength was chosen on."""
        if self.policy is None or self.heads == "all" or not isinstance(self.policy, Emphasis):
            changes = self.policy is not None or self.adapter is not None
            return Setting(self.policy, seen if changes else frozenset(), self.adapter)
        name = {"own": task, "transferred": f"all but {task}", "random": f"random {index % DRAWS}"}
        policy = replace(self.policy, heads=profiles[name.get(self.heads, self.heads)])
        return Setting(policy, seen)

    def to_dict(self) -> dict[str, Any]:
        """What it is, JSON-ready."""
        policy = None if self.policy is None else self.policy.label()
        return {"form": self.form, "span": self.span, "policy": policy, "heads": self.heads, "family": self.family}


class _Shares(NamedTuple):
    """Which share of the items arms beside the main ones are asked."""

    text: float
    strengths: float
    ways: float
    transfer: float


_QUICK_SHARES, _FULL_SHARES = _Shares(0.4, 1.0, 0.4, 0.25), _Shares(0.4, 0.2, 0.4, 0.2)


def emphasis_arms(strengths: Sequence[float], tasks: Mapping[str, StudyTask], *, quick: bool) -> tuple[Arm, ...]:
    """The arms of the study of emphasis.

    Args:
        strengths: all choices of heads have each of these. The first one is also that of the other arms.
        tasks: of the study. Those that no heads are ranked for get the heads of all others.
        quick: with arms beside the main ones on a share of the items.
    """
    shares = _QUICK_SHARES if quick else _FULL_SHARES
    ranked = tuple(name for name, task in tasks.items() if task.profiled)
    others = tuple(name for name, task in tasks.items() if not task.profiled and not task.price)
    written = tuple(name for name in others if tasks[name].tokens is not None)
    long = tuple(name for name in others if name not in written)
    strong = strengths[0]
    main, prefix = Emphasis(strength=strong), f"×{strong:g}"
    found = [Arm(PLAIN, family="none")]
    for form in FORMS[1:]:
        asked = {"alone": ranked, "repeated": (*ranked, *others)}.get(form, (*ranked, *written))
        found.append(Arm(f"text: {form}", form, family="text", tasks=asked, share=shares.text))
    for strength in strengths:
        for heads in ("own", "all", "transferred", "random"):
            first = strength == strong
            family = "headline" if heads == "own" and first else "heads"
            more = {"own": (), "random": written}.get(heads, others)
            if not first:  # what is too strong for a text that is written shows in no likelihood
                more = written if heads == "transferred" else ()
            asked = (*ranked, *more)
            name, policy = f"×{strength:g}, {heads} heads", Emphasis(strength=strength)
            share = 1.0 if first else shares.strengths
            found.append(Arm(name, _AS_IS, "marked", policy, heads, family, tasks=asked, share=share))
    for span, family in (("wrong", "wrong"), ("automatic", "automatic")):
        found.append(Arm(f"{prefix}, own heads, {span} span", _AS_IS, span, main, "own", family, tasks=ranked))
        # The sentence that shares words with a request is the request's, not the instruction's.
        mine = others if span == "wrong" else long
        if mine:
            name = f"{prefix}, transferred heads, {span} span"
            found.append(Arm(name, _AS_IS, span, main, "transferred", family, tasks=mine))
    found += _ways(main, prefix, ranked, shares.ways)
    for task in ranked:
        name, rest = f"{prefix}, heads of {task}", tuple(other for other in ranked if other != task)
        found.append(Arm(name, _AS_IS, "marked", main, task, "transfer", tasks=rest, share=shares.transfer))
    prices = tuple(name for name, task in tasks.items() if task.price)
    for heads in ("all", *ranked[:1]):
        name = f"{prefix}, {'all heads' if heads == 'all' else f'heads of {heads}'}, irrelevant span"
        found.append(Arm(name, _AS_IS, "marked", main, heads, "price", tasks=prices))
    return tuple(found)


def _ways(main: Emphasis, prefix: str, tasks: tuple[str, ...], share: float) -> list[Arm]:
    """The same span by other settings."""
    ways = {
        f"{prefix}, own heads, rows all": (replace(main, rows="all"), "own"),
        f"{prefix}, own heads, rows last": (replace(main, rows="last"), "own"),
        "PASTA: outside ×0.01, own heads, rows all": (Emphasis(strength=1.0, outside=0.01, rows="all"), "own"),
        "SpotLight: share 0.3, all heads, rows all": (Emphasis(share=0.3, rows="all"), "all"),
    }
    return [
        Arm(name, _AS_IS, "marked", policy, heads, "ways", tasks=tasks, share=share)
        for name, (policy, heads) in ways.items()
    ]


_PUBLISHED = ("alpha 0.2", "alpha 1")  # the published code's, and that of the paper's own formula


def settings_of_rebalancing(layers: int) -> dict[str, Rebalance]:
    """The settings of re-balancing that are compared, by name.

    The published strength, the paper's own formula, larger ones, and other source layers.

    Args:
        layers: L, of the model.
    """
    found = {}
    for alpha in (0.2, 1.0, 4.0, 16.0):
        for normalize in (False, True):
            name = f"alpha {alpha:g}" + (", rows normalised" if normalize else "")
            found[name] = Rebalance(alpha=alpha, normalize=normalize)
    for source in sorted({max(1, layers // 4), layers // 2}):
        if source < layers - 1:
            found[f"alpha 1, source layer {source}"] = Rebalance(alpha=1.0, source_layer=source)
    return found


def rebalancing_arms(tasks: Sequence[str], layers: int, *, quick: bool) -> tuple[Arm, ...]:
    """The arms of the study of re-balancing, but for those whose setting is chosen on development items.

    Args:
        tasks: what is asked.
        layers: L, of the model.
        quick: with every arm on all items, of which there are few.
    """
    asked, few = tuple(tasks), 1.0 if quick else 0.2
    found = [Arm(PLAIN, family="none", tasks=asked)]
    for name, policy in settings_of_rebalancing(layers).items():
        share = 1.0 if name in _PUBLISHED else few
        found.append(Arm(name, policy=policy, family="re-balancing", tasks=asked, share=share))
    controls = {
        "alpha 0.2, all keys (control)": Rebalance(boost_all=True),
        "alpha 1, all keys (control)": Rebalance(alpha=1.0, boost_all=True),
        "alpha 1, sets drawn by chance (control)": ShuffledRebalance(alpha=1.0),
        "alpha 4, sets drawn by chance (control)": ShuffledRebalance(alpha=4.0),
        "alpha 4, sets drawn by chance, rows normalised (control)": ShuffledRebalance(alpha=4.0, normalize=True),
    }
    for name, policy in controls.items():
        found.append(Arm(name, policy=policy, family="control", tasks=asked, share=few))
    return tuple(found)
