"""Run the grid: every item, in every way of asking, with every model; what is finished goes to disk at once.

Note: [Order of a run]
Items are taken in blocks of like length, and each block is answered by the plain and by every re-balanced model before
the next one. So a run that was stopped has pairs to compare, and the models are compared under the same conditions.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnrb.evaluation.data import LETTERS, DataError
from attnrb.evaluation.runfile import Key, RunFile
from attnrb.evaluation.selection import Cell, Selected
from attnrb.evaluation.tasks import ANSWER_TOKENS, extract
from attnrb.policies import Policy

__all__ = ["PLAIN", "Progress", "Question", "arm_label", "prepare", "run"]

PLAIN = "plain"
"""Label of the model as it is."""

_BLOCK_CHARACTERS = 24_000  # of a block's prompts: about a dozen automatic batches on a CPU
_BLOCK_ITEMS = {"direct": 64, "cot": 32}
_GENERATED_WEIGHT = 6  # work of a generated token, in tokens of a prompt
_CHARACTERS_PER_TOKEN = 4
_CLOSING = ANSWER_TOKENS + 8  # tokens of a cue and an answer


@dataclass(frozen=True)
class Question:
    """An item in one way of asking, with the harness' requests for it."""

    task: str
    item: int
    cell: Cell
    harness_task: Any
    doc: Mapping[str, Any]
    context: str
    requests: tuple[Any, ...]

    def key(self, arm: str) -> Key:
        """Of the answer that the model `arm` gives."""
        return Key(self.task, self.item, arm, self.cell.prompting, self.cell.budget)

    @property
    def prompt_hash(self) -> str:
        """Tells this prompt, with its choices, from others."""
        digest = hashlib.sha256(self.context.encode())
        for request in self.requests:
            digest.update(repr(request.args[1]).encode())
        return digest.hexdigest()[:12]

    @property
    def work(self) -> int:
        """About how much work an answer is, in tokens of a prompt."""
        generated = 0 if self.cell.budget is None else self.cell.budget[1] + ANSWER_TOKENS
        return len(self.context) // _CHARACTERS_PER_TOKEN + _GENERATED_WEIGHT * generated + 1


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    done: int
    """Answers on disk."""
    total: int
    """Answers in all."""
    work_done: int
    """Work done by this start, and what was on disk before."""
    work: int
    doing: str
    """For a person."""


def arm_label(policy: Policy | None) -> str:
    """Names a model by its policy; None is the model as it is."""
    return PLAIN if policy is None else policy.label()


def prepare(
    lm: Any,
    selected: Sequence[Selected],
    cells: Sequence[Cell],
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    items: Mapping[str, Sequence[int]] | None = None,
    chat: bool = False,
) -> list[Question]:
    """The questions of a run.

    Args:
        lm: the harness' model, for its chat template.
        selected: the tasks.
        cells: the ways to ask.
        limit: items of each task (each subject of MMLU). Default: all.
        shuffle_seed: take them in an order drawn with this seed. Default: the file's order.
        items: places of the items to take, by task, in place of `limit`.
        chat: put prompts into the chat template.

    Raises:
        DataError: a task cannot be asked so.
    """
    questions = []
    for each in selected:
        for cell in cells:
            task = each.build(cell)
            task.set_fewshot_seed(seed=0)
            docs = list(task.eval_docs)
            places = list(range(len(docs)))
            if shuffle_seed is not None:
                random.Random(f"{shuffle_seed} {each.name}").shuffle(places)
            chosen = places[:limit] if items is None else items[each.name]
            for place in chosen:
                questions.append(_question(lm, each.name, cell, task, place, docs[place], chat))
    return questions


def _question(lm: Any, name: str, cell: Cell, task: Any, place: int, doc: Mapping[str, Any], chat: bool) -> Question:
    template = lm.apply_chat_template if chat else None
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=template,
        gen_prefix=task.doc_to_prefix(doc),
    )
    requests = task.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(name, place, task.config.repeats),
        apply_chat_template=chat,
        chat_template=template,
    )
    requests = requests if isinstance(requests, list) else [requests]
    return Question(name, doc.get("index", place), cell, task, doc, context, tuple(requests))


def run(
    lm: Any,
    questions: Sequence[Question],
    arms: Mapping[str, Policy | None],
    file: RunFile,
    *,
    progress: Callable[[Progress], None] | bool | None = None,
) -> None:
    """Answer what is not answered yet: see Note: [Order of a run].

    Several processes of one run (``accelerate launch``) share the questions out by their rank.

    Args:
        lm: an `attnrb.hosts.lm_eval.model.AttnrbLM` that is plain.
        questions: what to ask.
        arms: the models, by label: configurations, or None for the model as it is.
        file: where answers go.
        progress: called after each block; True shows a bar, which in a notebook is one of its own.

    Raises:
        RunFileError: an answer could not be written.
    """
    with _told(progress, lm.rank == 0) as say:
        _run(lm, questions, arms, file, say)


def _run(
    lm: Any,
    questions: Sequence[Question],
    arms: Mapping[str, Policy | None],
    file: RunFile,
    say: Callable[[Progress], None],
) -> None:
    def open_arms(question: Question) -> list[str]:
        return [arm for arm in arms if not _finished(file, question, arm)]

    total, work = len(questions) * len(arms), sum(question.work for question in questions) * len(arms)
    waiting = [question for question in questions if open_arms(question)]
    done = total - sum(len(open_arms(question)) for question in waiting)
    work_done = work - sum(question.work * len(open_arms(question)) for question in waiting)
    say(Progress(done, total, work_done, work, "Starting"))
    for block in list(_blocks(waiting, lm.batch_size))[lm.rank :: lm.world_size]:
        for arm, config in arms.items():
            asked = [question for question in block if arm in open_arms(question)]
            if not asked:
                continue
            with lm.rebalanced(config):
                file.append(_answer(lm, asked, arm))
            # Of a run in several processes, each knows its own share and takes the others' to be as far.
            done += len(asked) * lm.world_size
            work_done += sum(question.work for question in asked) * lm.world_size
            say(Progress(min(done, total), total, min(work_done, work), work, f"{block[0].cell.label}, {arm}"))


@contextlib.contextmanager
def _told(progress: Callable[[Progress], None] | bool | None, is_first: bool) -> Iterator[Callable[[Progress], None]]:
    """What is called as answers are finished. A bar is the first process' alone."""
    if callable(progress):
        yield progress
        return
    if not progress or not is_first:
        yield lambda _: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(bar_format="{l_bar}{bar}| {n_fmt} of {total_fmt} answers [{elapsed}<{remaining}]") as bar:

        def tell(now: Progress) -> None:
            if bar.total is None:
                bar.initial = now.done  # on disk already, which tells nothing of the speed
            bar.total = now.total
            bar.update(now.done - bar.n)
            bar.set_description(now.doing)

        yield tell


def _finished(file: RunFile, question: Question, arm: str) -> bool:
    record = file.records.get(question.key(arm))
    return record is not None and record.get("prompt") == question.prompt_hash


def _blocks(questions: Sequence[Question], batch_size: int | str) -> Iterator[list[Question]]:
    """Questions of one way of asking and of like length, longest first: what is too much is so at the start."""
    kinds: dict[tuple[Cell, str], list[Question]] = {}
    for question in questions:
        kinds.setdefault((question.cell, question.requests[0].request_type), []).append(question)
    for (cell, _), members in kinds.items():
        most = batch_size if isinstance(batch_size, int) else _BLOCK_ITEMS[cell.prompting]
        block: list[Question] = []
        characters = 0
        for question in sorted(members, key=lambda question: (-len(question.context), question.task, question.item)):
            full = len(block) >= most or (
                cell.prompting == "direct"
                and not isinstance(batch_size, int)
                and characters + len(question.context) > _BLOCK_CHARACTERS
            )
            if block and full:
                yield block
                block, characters = [], 0
            block.append(question)
            characters += len(question.context)
        if block:
            yield block


def _answer(lm: Any, questions: Sequence[Question], arm: str) -> list[dict[str, Any]]:
    start = time.perf_counter()
    computed: list[Any] = [None] * len(questions)
    kind = questions[0].requests[0].request_type
    if questions[0].cell.budget is not None:
        minimum, maximum = questions[0].cell.budget
        contexts = [question.context for question in questions]
        computed = lm.compute(contexts, minimum=minimum, maximum=maximum, answer_tokens=ANSWER_TOKENS)
        responses = [[each.answer] for each in computed]
    else:
        flat = [request for question in questions for request in question.requests]
        found = iter(getattr(lm, kind)(flat, disable_tqdm=True))
        responses = [[next(found) for _ in question.requests] for question in questions]
    seconds = (time.perf_counter() - start) / len(questions)
    return [
        _record(lm, question, arm, response, thought, seconds)
        for question, response, thought in zip(questions, responses, computed, strict=True)
    ]


def _record(
    lm: Any, question: Question, arm: str, responses: Sequence[Any], thought: Any, seconds: float
) -> dict[str, Any]:
    task = question.harness_task
    for request, response in zip(question.requests, responses, strict=True):
        request.resps = [response]
    # The harness' own filters, over the requests of this item alone.
    task._instances = list(question.requests)
    task.apply_filters()
    first = next(iter(question.requests[0].filtered_resps))
    metrics = task.process_results(question.doc, [request.filtered_resps[first] for request in question.requests])
    record: dict[str, Any] = {
        "task": question.task,
        "item": question.item,
        "arm": arm,
        "prompting": question.cell.prompting,
        "budget": None if question.cell.budget is None else list(question.cell.budget),
        "correct": _correct(question.task, metrics),
        "gold": _gold(question),
    }
    if question.requests[0].request_type == "loglikelihood":
        scores = [float(response[0]) for response in responses]
        if not all(map(math.isfinite, scores)):
            raise ValueError(
                f"model: its likelihoods for {question.task}, item {question.item}, are not finite; try --dtype float32"
            )
        record["answer"] = LETTERS[max(range(len(scores)), key=scores.__getitem__)] if len(scores) > 1 else None
        record["loglikelihoods"] = [round(score, 6) for score in scores]
    else:
        record["answer"] = extract(question.doc, responses[0]) if "choices" in question.doc else responses[0].strip()
        record["output"] = responses[0]
    record["computed_tokens"] = 0 if thought is None else thought.reading.computed_tokens
    if thought is not None:
        record["extensions"] = thought.reading.extensions
        record["reasoning"] = thought.reasoning
    if lm.too_long(question.context, 0 if question.cell.budget is None else question.cell.budget[1] + _CLOSING):
        record["truncated"] = True
    record["seconds"] = round(seconds, 4)
    record["prompt"] = question.prompt_hash
    return record


def _correct(task: str, metrics: Mapping[str, Any]) -> bool:
    for name in ("acc", "exact_match"):
        if name in metrics and float(metrics[name]) in (0.0, 1.0):
            return bool(metrics[name])
    raise DataError(
        f"tasks: {task} gives no right or wrong for each item ({', '.join(metrics)}), which pairs need: "
        "run it with `attnrb lm-eval`"
    )


def _gold(question: Question) -> str:
    if "answer" in question.doc and "choices" in question.doc and isinstance(question.doc["answer"], str):
        return question.doc["answer"]
    gold = question.harness_task.doc_to_target(question.doc)
    return LETTERS[gold] if isinstance(gold, int) and 0 <= gold < len(LETTERS) else str(gold)
