"""Run a study: profiles and strengths from development items, all arms on held-out ones, every answer on disk at once.

Note: [What a study may know]
Heads are ranked on the first development items of a task, and the strength is chosen on the next ones. Each setting
carries the fingerprints of the items that it was chosen on, and an arm whose setting saw one of the items that it is
about to be reported on is refused before the model is asked. Items are known by what they say, so calling a held-out
item a development item hides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from attnrb.evaluation.runfile import Key, RunFile
from attnrb.evaluation.runner import Progress
from attnrb.hosts.transformers.patch import patch
from attnrb.policies.base import Policy
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.profile import HeadProfile
from attnrb.studies.answers import AnswerRow, answer_row, log_likelihoods
from attnrb.studies.arms import DRAWS, PLAIN, PRICE, Arm, Setting, check_no_leak
from attnrb.studies.candidates import candidate_batches, candidate_scores
from attnrb.studies.conflict import SPLITS
from attnrb.studies.material import MATERIAL, StudyItem, study_items
from attnrb.studies.neutral import NEUTRAL_TASK, NeutralText, neutral_texts
from attnrb.studies.profile import profile_heads
from attnrb.studies.transfer import random_heads

__all__ = ["STUDIES", "Study", "StudyPlan"]

STUDIES = ("emphasis", "rebalancing", "gains")
DEVELOPMENT, HELD_OUT = SPLITS

_BATCH_TOKENS = 2048
_NEUTRAL_BATCH = 6
_BLOCK_ITEMS = 50  # so many answers of one arm are lost at most by a kill


@dataclass(frozen=True)
class StudyPlan:
    """What a study asks.

    Attributes:
        study: one of `STUDIES`.
        quick: fewer strengths, and arms beside the main ones on a share of the items.
        items: held-out items of each task.
        examples: development items of each task that rank the heads.
        development: further development items of each task that the strength is chosen on.
        strengths: those to choose from.
        keep: heads of a profile.
        steps: of training, for learnt gains.
        seeds: how often gains are learnt, each time in another order.
        seed: of items and random heads.
    """

    study: str = "emphasis"
    quick: bool = True
    items: int = 100
    examples: int = 12
    development: int = 16
    strengths: tuple[float, ...] = (8.0, 16.0)
    keep: int = 32
    steps: int = 12
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ValueError(f"study: expected one of {', '.join(STUDIES)}, got {self.study!r}")
        for name in ("items", "examples", "development", "keep", "steps", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.strengths:
            raise ValueError("strengths: expected at least one, got none")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those whose span helps."""
        return tuple(task for task in MATERIAL if task != PRICE)

    def to_dict(self) -> dict[str, Any]:
        """Every option, JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


class _Question(NamedTuple):
    arm: Arm
    task: str
    split: str
    number: int
    item: StudyItem

    @property
    def key(self) -> Key:
        return Key(self.task, self.number, self.arm.name, self.split, None)

    @property
    def work(self) -> int:
        return len(self.item.text(self.arm.form)[0])


class Study:
    """A plan, a model and the file of a run.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode.
        tokenizer: its tokenizer.
        plan: what to ask.
        file: where answers go; those in it are not asked again.
        progress: called as answers are finished.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: StudyPlan,
        file: RunFile,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.plan, self.file = model, tokenizer, plan, file
        self.profiles: dict[str, HeadProfile] = {}
        self._progress = progress or (lambda _: None)
        self._rows: dict[tuple[str, str, str], list[AnswerRow]] = {}

    def say(self, doing: str) -> None:
        """Name a step that asks nothing."""
        self._progress(Progress(0, 1, 0, 1, doing))

    def items(self, task: str, split: str) -> Sequence[StudyItem]:
        """The items of a task; of the development ones the first rank heads, and the others choose a strength."""
        plan = self.plan
        count = plan.items if split == HELD_OUT else plan.examples + plan.development
        return study_items(task, count, split=split, seed=plan.seed)

    def make_profiles(self) -> None:
        """Rank the heads for each task, or read the ranking from the file; draw the random ones."""
        for task in self.plan.tasks:
            key = Key(task, -1, "profile", DEVELOPMENT, None)
            if key not in self.file.records:
                self.say(f"Ranking heads for {task}")
                start = time.process_time()
                examples = self.items(task, DEVELOPMENT)[: self.plan.examples]
                pairs = [(item.prompt(self.tokenizer, span="marked"), item.answer) for item in examples]
                found = profile_heads(self.model, self.tokenizer, None, pairs, self.plan.keep)
                about = {**found.about, "seen": [item.fingerprint for item in examples], "task": task}
                record = replace(found, about=about).to_dict()
                self.file.append([{**_fields(key), "profile": record, "cpu": _since(start)}])
            self.profiles[task] = HeadProfile.from_dict(self.file.records[key]["profile"])
        for task in self.plan.tasks:
            others = [profile for name, profile in self.profiles.items() if name in self.plan.tasks and name != task]
            self.profiles[f"all but {task}"] = _sum(others)
        for draw in range(DRAWS):
            drawn = random_heads(next(iter(self.profiles.values())), self.plan.seed + draw)
            self.profiles[f"random {draw}"] = replace(drawn, about={**drawn.about, "seen": []})

    def choose_strength(self) -> tuple[float, frozenset[str]]:
        """The strength with the highest accuracy on development items, of all heads and own heads together.

        Returns:
            It, the lowest of equals, and the fingerprints of the items that chose it.
        """
        arms = {
            strength: [
                Arm(f"×{strength:g}, {heads} heads", "as it is", "marked", Emphasis(strength=strength), heads)
                for heads in ("own", "all")
            ]
            for strength in sorted(self.plan.strengths)
        }
        asked = {
            strength: [each for arm in mine for each in self._questions(arm, DEVELOPMENT)]
            for strength, mine in arms.items()
        }
        self.ask([each for mine in asked.values() for each in mine], frozenset())
        right = {
            strength: sum(self.file.records[each.key]["correct"] for each in mine) for strength, mine in asked.items()
        }
        seen = frozenset(each.item.fingerprint for mine in asked.values() for each in mine)
        return max(right, key=lambda strength: (right[strength], -strength)), seen

    def ask_arms(self, arms: Sequence[Arm], seen: frozenset[str]) -> None:
        """Ask all arms the held-out items; ``seen``: what their strength was chosen on.

        Raises:
            LeakError: an arm's setting saw one of them.
        """
        self.ask([each for arm in arms for each in self._questions(arm, HELD_OUT)], seen)

    def ask_neutral(self, arms: Sequence[Arm], seen: frozenset[str]) -> None:
        """Read neutral texts behind a span with the plain model and with the arms that have a price."""
        texts = neutral_texts()
        for arm in arms:
            if arm.name != PLAIN and arm.family != "price":
                continue
            policy = arm.setting(NEUTRAL_TASK, 0, self.profiles, seen).policy
            for start in range(0, len(texts), _NEUTRAL_BATCH):
                block = [
                    (Key(NEUTRAL_TASK, index, arm.name, HELD_OUT, None), texts[index])
                    for index in range(start, min(start + _NEUTRAL_BATCH, len(texts)))
                ]
                if any(key not in self.file.records for key, _ in block):
                    self.file.append(self._read_neutral(policy, block))

    def _read_neutral(self, policy: Policy | None, block: Sequence[tuple[Key, NeutralText]]) -> list[dict[str, Any]]:
        start = time.process_time()
        rows = [
            answer_row(self.model, self.tokenizer, text.prompt(self.tokenizer), text.answer, NEUTRAL_TASK)
            for _, text in block
        ]
        with torch.inference_mode(), nullcontext() if policy is None else patch(self.model, policy) as patched:
            found = log_likelihoods(self.model, rows, patched)
        cpu = _since(start) / len(block)
        return [
            {**_fields(key), "loglikelihood": round(float(each.sum()), 6), "tokens": len(each), "cpu": round(cpu, 6)}
            for (key, _), each in zip(block, found, strict=True)
            if key not in self.file.records
        ]

    def _questions(self, arm: Arm, split: str) -> list[_Question]:
        found = []
        for task in MATERIAL if split == HELD_OUT else self.plan.tasks:
            if arm.asks(task):
                items = list(enumerate(self.items(task, split)))
                items = items[: arm.items(len(items))] if split == HELD_OUT else items[self.plan.examples :]
                found += [_Question(arm, task, split, index, item) for index, item in items]
        return found

    def ask(self, questions: Sequence[_Question], seen: frozenset[str]) -> None:
        """Answer what is not answered yet, and put it on disk block by block."""
        settings: dict[Setting, list[_Question]] = {}
        for each in questions:
            setting = each.arm.setting(each.task, each.number, self.profiles, seen)
            settings.setdefault(setting, []).append(each)
        for setting, mine in settings.items():
            for arm in {each.arm.name for each in mine}:
                check_no_leak(arm, setting, [each.item for each in mine if each.split == HELD_OUT])
        total, work = len(questions), sum(each.work for each in questions)
        waiting = [each for each in questions if each.key not in self.file.records]
        done, work_done = total - len(waiting), work - sum(each.work for each in waiting)
        for setting, mine in settings.items():
            for block in _blocks([each for each in mine if each.key not in self.file.records]):
                self.file.append(self._answers(setting, block))
                done, work_done = done + len(block), work_done + sum(each.work for each in block)
                self._progress(Progress(done, total, work_done, work, f"{block[0].task}, {block[0].arm.name}"))

    def _answers(self, setting: Setting, block: Sequence[_Question]) -> list[dict[str, Any]]:
        prompts = [self._answer_rows(each) for each in block]
        records: list[dict[str, Any]] = []
        with nullcontext() if setting.policy is None else patch(self.model, setting.policy) as patched:
            for batch in candidate_batches(prompts, _BATCH_TOKENS):
                start = time.process_time()
                found = candidate_scores(self.model, [prompts[index] for index in batch], patched)
                cpu = _since(start) / len(batch)
                records += [_record(block[index], mine, cpu) for index, mine in zip(batch, found, strict=True)]
        return records

    def _answer_rows(self, each: _Question) -> list[AnswerRow]:
        key = (f"{each.task} {each.item.fingerprint}", each.arm.form, each.arm.span)
        if key not in self._rows:
            prompt = each.item.prompt(self.tokenizer, each.arm.form, each.arm.span)
            name = f"{each.task} {each.number}"
            self._rows[key] = [
                answer_row(self.model, self.tokenizer, prompt, " " + word, name) for word in each.item.candidates
            ]
        return self._rows[key]


def _record(question: _Question, scores: Sequence[float], cpu: float) -> dict[str, Any]:
    best = max(range(len(scores)), key=scores.__getitem__)
    margin = scores[0] - max(scores[1:])
    return {
        **_fields(question.key),
        "correct": margin > 0,
        "answer": question.item.candidates[best],
        "gold": question.item.candidates[0],
        "group": question.item.group,
        "loglikelihoods": [round(score, 6) for score in scores],
        "prompt": question.item.fingerprint,
        "cpu": round(cpu, 6),
    }


def _fields(key: Key) -> dict[str, Any]:
    return dict(key._asdict())


def _since(start: float) -> float:
    return round(time.process_time() - start, 6)


def _blocks(questions: Sequence[_Question]) -> Iterator[list[_Question]]:
    by_task: dict[tuple[str, str], list[_Question]] = {}
    for each in questions:
        by_task.setdefault((each.arm.name, each.task), []).append(each)
    for mine in by_task.values():
        for start in range(0, len(mine), _BLOCK_ITEMS):
            yield mine[start : start + _BLOCK_ITEMS]


def _sum(profiles: Sequence[HeadProfile]) -> HeadProfile:
    """The ranking by the sum of several ones' gradients."""
    scores = torch.tensor([profile.scores for profile in profiles], dtype=torch.float64, device="cpu").sum(0)
    seen = [each for profile in profiles for each in profile.about["seen"]]
    return HeadProfile(scores.tolist(), profiles[0].keep, {"seen": seen})
