"""Run a study: profiles and strengths from development items, all arms on held-out ones, every answer on disk at once.

Note: [What a study may know]
Heads are ranked on the first development items of a task, and settings are chosen on the next ones. Each setting
carries the fingerprints of the items that it was chosen on, and an arm whose setting saw one of the items that it is
about to be reported on is refused before the model is asked. Items are known by what they say, so calling a held-out
item a development item hides nothing.

Note: [A study in several processes]
All processes go through the same steps. In each step they share out what is not on disk yet, by their ranks, wait for
each other, and read what the others wrote. So each step finds what one process would find.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnrb.evaluation.runfile import Key, RunFile
from attnrb.evaluation.runner import Progress
from attnrb.hosts.processes import Processes
from attnrb.policies.base import Policy
from attnrb.policies.emphasis import Emphasis
from attnrb.policies.profile import HeadProfile
from attnrb.studies.adapters import Adapter
from attnrb.studies.answers import AnswerRow, answer_row
from attnrb.studies.arms import DRAWS, PLAIN, Arm, Setting, check_no_leak
from attnrb.studies.asked import Asked, Question
from attnrb.studies.conflict import SPLITS
from attnrb.studies.engines import Engine, ModelEngine
from attnrb.studies.instructions import repeats_itself
from attnrb.studies.material import WrittenItem
from attnrb.studies.neutral import NEUTRAL_TASK, NeutralText, neutral_texts
from attnrb.studies.plan import StudyPlan
from attnrb.studies.profile import profile_heads
from attnrb.studies.transfer import random_heads
from attnrb.text.spans import Span

__all__ = ["FIRST_KEY", "Study", "context_of", "first_key_marked"]

DEVELOPMENT, HELD_OUT = SPLITS

_NEUTRAL_BATCH = 6
_BLOCK_ITEMS = 50  # so many answers of one arm are lost at most by a kill
_WRITTEN_BLOCK = 32  # and of written ones


class Study:
    """A plan, a model and the file of a run.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode.
        tokenizer: its tokenizer.
        plan: what to ask.
        file: where answers go; those in it are not asked again.
        progress: called as answers are finished.
        processes: those that share the work: see Note: [A study in several processes].
        engine: what answers. Default: the model itself.

    Attributes:
        asked: the items.
        profiles: rankings of heads, by what arms call them.
        adapters: what is added to the model's weights, by what arms call it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: StudyPlan,
        file: RunFile,
        progress: Callable[[Progress], None] | None = None,
        processes: Processes | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.model, self.tokenizer, self.plan, self.file = model, tokenizer, plan, file
        self.processes = processes or Processes()
        self.engine = engine or ModelEngine(model, tokenizer)
        self.asked = Asked(plan, context_of(model))
        self.profiles: dict[str, HeadProfile] = {}
        self.adapters: dict[str, Adapter] = {}
        self._progress = progress or (lambda _: None)
        self._rows: dict[tuple[str, str, str], list[AnswerRow]] = {}

    def say(self, doing: str) -> None:
        """Name a step that asks nothing."""
        self._progress(Progress(0, 1, 0, 1, doing))

    def share_out(self, jobs: Sequence[tuple[Key, Callable[[], Mapping[str, Any]]]]) -> None:
        """Do what is not on disk yet, each job in one process, and put its record there; wait for all others."""
        waiting = [(key, job) for key, job in jobs if key not in self.file.records]
        for key, job in waiting[self.processes.rank :: self.processes.count]:
            start = time.process_time()
            self.file.append([{**_fields(key), **job(), "cpu": _since(start)}])
        self._together()

    def _together(self) -> None:
        if self.processes.count > 1:
            self.processes.wait()
            self.file.reread()
            self.processes.wait()  # before anybody writes again

    def make_profiles(self) -> None:
        """Rank the heads for each task, or read the ranking from the file; draw the random ones."""
        keys = {task: Key(task, -1, "profile", DEVELOPMENT, None) for task in self.asked.ranked}
        self.share_out([(key, lambda task=task: self._profile(task)) for task, key in keys.items()])  # type: ignore[misc]
        own = {task: HeadProfile.from_dict(self.file.records[key]["profile"]) for task, key in keys.items()}
        self.profiles |= own
        self.profiles["all"] = _sum(list(own.values()))
        for task in self.asked.tasks:
            self.profiles[f"all but {task}"] = _sum([profile for name, profile in own.items() if name != task])
        for draw in range(DRAWS):
            drawn = random_heads(next(iter(own.values())), self.plan.seed + draw)
            self.profiles[f"random {draw}"] = replace(drawn, about={**drawn.about, "seen": []})

    def _profile(self, task: str) -> dict[str, Any]:
        self.say(f"Ranking heads for {task}")
        examples = self.asked.items(task, DEVELOPMENT)[: self.plan.examples]
        pairs = [(item.prompt(self.tokenizer, span="marked"), item.answer) for item in examples]
        found = profile_heads(self.model, self.tokenizer, None, pairs, self.plan.keep)
        about = {**found.about, "seen": [item.fingerprint for item in examples], "task": task}
        return {"profile": replace(found, about=about).to_dict()}

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
        right, seen = self.right_answers(arms, self.asked.ranked)
        return max(right, key=lambda strength: (right[strength], -strength)), seen

    def right_answers(
        self, arms: Mapping[Any, Sequence[Arm]], tasks: Sequence[str]
    ) -> tuple[dict[Any, int], frozenset[str]]:
        """How many development items of some tasks the arms get right, by what they are the arms of.

        Returns:
            The numbers, and the fingerprints of the items.
        """
        asked = {
            name: [each for arm in mine for each in self.asked.questions(arm, DEVELOPMENT, tasks)]
            for name, mine in arms.items()
        }
        self.ask([each for mine in asked.values() for each in mine], frozenset())
        right = {name: sum(self.file.records[each.key]["correct"] for each in mine) for name, mine in asked.items()}
        return right, frozenset(each.item.fingerprint for mine in asked.values() for each in mine)

    def ask_arms(self, arms: Sequence[Arm], seen: frozenset[str]) -> None:
        """Ask all arms the held-out items; ``seen``: what their settings were chosen on.

        Raises:
            LeakError: an arm's setting saw one of them.
        """
        unserved = [arm.name for arm in arms if not self.engine.serves(arm.policy)]
        self.asked.left_out |= dict.fromkeys(unserved, "the engine does not serve its policy")
        served = [arm for arm in arms if arm.name not in unserved]
        self.ask([each for arm in served for each in self.asked.questions(arm, HELD_OUT)], seen)

    def ask_neutral(self, arms: Sequence[Arm], seen: frozenset[str]) -> None:
        """Read neutral texts behind a span with the plain model and with the arms that have a price."""
        texts = neutral_texts()
        blocks = []
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
                    blocks.append((policy, block))
        for policy, block in blocks[self.processes.rank :: self.processes.count]:
            self.file.append(self._read_neutral(policy, block))
        self._together()

    def _read_neutral(self, policy: Policy | None, block: Sequence[tuple[Key, NeutralText]]) -> list[dict[str, Any]]:
        start = time.process_time()
        rows = [
            answer_row(self.model, self.tokenizer, text.prompt(self.tokenizer), text.answer, NEUTRAL_TASK)
            for _, text in block
        ]
        found = self.engine.sums(rows, policy)
        cpu = _since(start) / len(block)
        return [
            {**_fields(key), "loglikelihood": round(each, 6), "tokens": len(row.answer), "cpu": round(cpu, 6)}
            for (key, _), row, each in zip(block, rows, found, strict=True)
            if key not in self.file.records
        ]

    def ask(self, questions: Sequence[Question], seen: frozenset[str]) -> None:
        """Answer what is not answered yet, and put it on disk block by block."""
        settings: dict[Setting, list[Question]] = {}
        for each in questions:
            setting = each.arm.setting(each.task, each.number, self.profiles, seen)
            settings.setdefault(setting, []).append(each)
        for setting, mine in settings.items():
            for arm in {each.arm.name for each in mine}:
                check_no_leak(arm, setting, [each.item for each in mine if each.split == HELD_OUT])
        total, work = len(questions), sum(each.work for each in questions)
        waiting = [each for each in questions if each.key not in self.file.records]
        done, work_done = total - len(waiting), work - sum(each.work for each in waiting)
        self._progress(Progress(done, total, work_done, work, "Starting"))
        blocks = [
            (setting, block)
            for setting, mine in settings.items()
            for block in _blocks([each for each in mine if each.key not in self.file.records])
        ]
        count = self.processes.count
        for setting, block in blocks[self.processes.rank :: count]:
            self.file.append(self._answers(setting, block))
            # Each process knows its own share and takes the others' to be as far.
            done, work_done = done + count * len(block), work_done + count * sum(each.work for each in block)
            doing = f"{block[0].task}, {block[0].arm.name}"
            self._progress(Progress(min(done, total), total, min(work_done, work), work, doing))
        self._together()

    def _answers(self, setting: Setting, block: Sequence[Question]) -> list[dict[str, Any]]:
        task = self.asked.tasks[block[0].task]
        if task.tokens is None:
            rows = [self._answer_rows(each) for each in block]
            adapter = None if setting.adapter is None else self.adapters[setting.adapter]
            start = time.process_time()
            scores = self.engine.scores(rows, setting.policy, adapter)
            cpu = _since(start) / len(block)
            return [_record(each, mine, cpu) for each, mine in zip(block, scores, strict=True)]
        prompts = [each.item.prompt(self.tokenizer, each.arm.form, each.arm.span) for each in block]
        start = time.process_time()
        if task.budget is None:
            found = self.engine.written(prompts, task.tokens, setting.policy)
        else:
            found = self.engine.thought(prompts, task.budget, task.tokens, setting.policy)
        cpu = _since(start) / len(block)
        return [_written_record(each, *mine, cpu) for each, mine in zip(block, found, strict=True)]

    def _answer_rows(self, each: Question) -> list[AnswerRow]:
        key = (f"{each.task} {each.item.fingerprint}", each.arm.form, each.arm.span)
        if key not in self._rows:
            first = each.arm.span == FIRST_KEY
            prompt = each.item.prompt(self.tokenizer, each.arm.form, "none" if first else each.arm.span)
            name = f"{each.task} {each.number}"
            rows = [answer_row(self.model, self.tokenizer, prompt, " " + word, name) for word in each.item.candidates]
            self._rows[key] = [first_key_marked(row) for row in rows] if first else rows
        return self._rows[key]


FIRST_KEY = "first key"
"""What the span of an arm lies on: the first token, whatever it says."""


def first_key_marked(row: AnswerRow) -> AnswerRow:
    """The same row with its first token as its span."""
    return row._replace(spans=(Span(0, 1),))


def context_of(model: Any) -> int | None:
    """How many tokens a model can read; None where it does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def _record(question: Question, log_likelihoods: Sequence[float], cpu: float) -> dict[str, Any]:
    scores = question.item.scores(log_likelihoods)
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        **_fields(question.key),
        "correct": scores[0] > max(scores[1:]),
        "answer": question.item.candidates[best],
        "gold": question.item.candidates[0],
        "group": question.item.group,
        "loglikelihoods": [round(each, 6) for each in log_likelihoods],
        "prompt": question.item.fingerprint,
        "cpu": round(cpu, 6),
    }


def _written_record(question: Question, text: str, tokens: int, cpu: float) -> dict[str, Any]:
    assert isinstance(question.item, WrittenItem), "a task of written answers has items that judge them"
    return {
        **_fields(question.key),
        "correct": question.item.judge(text),
        "output": text,
        "tokens": tokens,
        "repeats": repeats_itself(text),
        "gold": question.item.candidates[0],
        "group": question.item.group,
        "prompt": question.item.fingerprint,
        "cpu": round(cpu, 6),
    }


def _fields(key: Key) -> dict[str, Any]:
    return dict(key._asdict())


def _since(start: float) -> float:
    return round(time.process_time() - start, 6)


def _blocks(questions: Sequence[Question]) -> Iterator[list[Question]]:
    by_task: dict[tuple[str, str], list[Question]] = {}
    for each in questions:
        by_task.setdefault((each.arm.name, each.task), []).append(each)
    for mine in by_task.values():
        size = _WRITTEN_BLOCK if mine[0].written else _BLOCK_ITEMS
        for start in range(0, len(mine), size):
            yield mine[start : start + size]


def _sum(profiles: Sequence[HeadProfile]) -> HeadProfile:
    """The ranking by the sum of several ones' gradients."""
    scores = torch.tensor([profile.scores for profile in profiles], dtype=torch.float64, device="cpu").sum(0)
    seen = [each for profile in profiles for each in profile.about["seen"]]
    return HeadProfile(scores.tolist(), profiles[0].keep, {"seen": seen})
