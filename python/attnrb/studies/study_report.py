"""What a study found: accuracies with intervals, differences corrected within their families, prices and CPU time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnrb.evaluation.statistics import accuracy, difference, holm, verdict
from attnrb.studies.arms import PLAIN, Arm
from attnrb.studies.conflict import SPLITS
from attnrb.studies.neutral import NEUTRAL_TASK, perplexity

__all__ = [
    "difference_grid",
    "difference_table",
    "make_study_report",
    "markdown",
    "profile_table",
    "repeating_table",
    "requirements",
    "trials_table",
]

HELD_OUT = SPLITS[1]
_MUST = ("conflict", "retrieval", "story")
_ABOVE, _EXCLUDED = 0.40, 0.20


def make_study_report(
    records: Iterable[Mapping[str, Any]], chosen: Mapping[str, Any], seed: int, order: Sequence[str] = ()
) -> dict[str, Any]:
    """The figures of a study, JSON-ready.

    Args:
        records: of its run.
        chosen: what the study chose on development items: ``arms``, ``strength``, ``chosen_on``, and perhaps
            ``trials`` (the settings that it was chosen from), ``left_out`` (tasks, and why) and ``chance`` (what
            guessing gets right, by task).
        seed: of the bootstrap.
        order: names of tasks, as they are to be shown; others follow by name. Records come as they were finished.
    """
    arms: Sequence[Arm] = chosen["arms"]
    by_arm: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    neutral: dict[str, list[Mapping[str, Any]]] = {}
    cpu = {"profiles": 0.0, "development": 0.0, "held-out": 0.0}
    for record in records:
        kind = "profiles" if record["arm"] == "profile" else record["prompting"]
        cpu[kind] += record["cpu"]
        if record["task"] == NEUTRAL_TASK:
            neutral.setdefault(record["arm"], []).append(record)
        elif record["prompting"] == HELD_OUT:
            by_arm.setdefault((record["arm"], record["task"]), {})[record["item"]] = record
    known = {arm.name for arm in arms}
    place = {task: number for number, task in enumerate(order)}
    keys = sorted(by_arm, key=lambda key: (place.get(key[1], len(place)), key[1]))
    found = {key: dict(sorted(by_arm[key].items())) for key in keys if key[0] in known}
    asked = [(arm, task) for arm in arms for name, task in found if name == arm.name and arm.asks(task)]
    results = [_result(arm, task, found[arm.name, task]) for arm, task in asked]
    pairs = [
        _difference(arm, task, found[arm.against, task], found[arm.name, task], seed)
        for arm, task in asked
        if arm.name != PLAIN
    ]
    _correct(pairs)
    return {
        "strength": chosen["strength"],
        "chosen_on": chosen["chosen_on"],
        "arms": {arm.name: arm.to_dict() for arm in arms},
        "results": results,
        "differences": pairs,
        "requirements": requirements(results, pairs),
        "trials": list(chosen.get("trials", ())),
        "left_out": dict(chosen.get("left_out", {})),
        "above_chance": _above_chance(results, chosen.get("chance", {})),
        "neutral_perplexity": {arm: round(perplexity(mine), 4) for arm, mine in neutral.items() if arm in known},
        "cpu_seconds": {kind: round(seconds, 1) for kind, seconds in cpu.items()},
    }


def _above_chance(results: Sequence[Mapping[str, Any]], chance: Mapping[str, float]) -> dict[str, bool]:
    """Whether the plain model's interval lies above what guessing gets right, for tasks where that is known."""
    plain = {each["task"]: each for each in results if each["arm"] == PLAIN}
    return {task: plain[task]["wilson"][0] > chance[task] for task in chance if task in plain}


def _result(arm: Arm, task: str, answers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    found = accuracy([record["correct"] for record in answers.values()])
    groups: dict[str, list[bool]] = {}
    for record in answers.values():
        if record["group"]:
            groups.setdefault(record["group"], []).append(record["correct"])
    repeating = [record["repeats"] for record in answers.values() if "repeats" in record]
    return {
        "arm": arm.name,
        "task": task,
        **({"repeating": sum(repeating) / len(repeating)} if repeating else {}),
        "items": found.items,
        "correct": found.correct,
        "accuracy": found.accuracy,
        "wilson": list(found.wilson),
        "groups": {name: [sum(mine), len(mine)] for name, mine in sorted(groups.items())},
        "cpu_seconds_per_item": round(sum(record["cpu"] for record in answers.values()) / len(answers), 4),
    }


def _difference(
    arm: Arm, task: str, plain: Mapping[int, Mapping[str, Any]], edited: Mapping[int, Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    both = sorted(set(plain) & set(edited))
    found = difference([plain[i]["correct"] for i in both], [edited[i]["correct"] for i in both], seed=seed)
    return {
        "arm": arm.name,
        "against": arm.against,
        "task": task,
        "family": arm.family,
        "items": found.items,
        "plain": found.plain,
        "edited": found.rebalanced,
        "difference": found.difference,
        "bootstrap": list(found.bootstrap),
        "lost": found.only_plain,
        "won": found.only_rebalanced,
        "mcnemar": found.mcnemar,
        "found": found,
    }


def _correct(pairs: Sequence[dict[str, Any]]) -> None:
    """Holm's correction within each family, and what follows from it."""
    for family in {pair["family"] for pair in pairs}:
        mine = [pair for pair in pairs if pair["family"] == family]
        for pair, adjusted in zip(mine, holm([pair["mcnemar"] for pair in mine]), strict=True):
            pair["holm"] = adjusted
            pair["verdict"] = verdict(pair.pop("found"), adjusted)


def requirements(results: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the study of emphasis is expected to show, and whether it did, on each task where it should.

    Profiled heads stand above the plain model by more than 40 points with an interval that excludes 20, a wrong span
    below the plain model, and random heads between the plain model and the profiled ones.
    """
    right = {(each["arm"], each["task"]): each["accuracy"] for each in results}
    checks = []
    for pair in pairs:
        if pair["family"] != "headline" or pair["task"] not in _MUST:
            continue
        task, own = pair["task"], pair["arm"]
        low = pair["bootstrap"][0]
        checks.append(_check(task, "profiled heads > plain + 40", pair["difference"] > _ABOVE and low > _EXCLUDED))
        checks.append(_check(task, "wrong span < plain", right[f"{own}, wrong span", task] < right[PLAIN, task]))
        random = right[own.replace("own", "random"), task]
        checks.append(_check(task, "plain < random heads < profiled", right[PLAIN, task] < random < right[own, task]))
    return checks


def _check(task: str, what: str, holds: bool) -> dict[str, Any]:
    return {"task": task, "what": what, "holds": holds}


def profile_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracies in percent, a line for each arm and a column for each task: head and rows.

    An arm's name says which share of the items it is asked, where that is not all.
    """
    right = {(each["arm"], each["task"]): each for each in report["results"]}
    tasks = list(dict.fromkeys(task for _, task in right))
    items = _most_items(right)
    rows = []
    for arm in dict.fromkeys(name for name, _ in right):
        mine = {task: right[arm, task] for task in tasks if (arm, task) in right}
        cells = (f"{100 * mine[task]['accuracy']:.0f}" if task in mine else "" for task in tasks)
        rows.append([_with_share(arm, mine, items), *cells])
    return ["arm", *tasks], rows


def _most_items(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, int]:
    """How many items an arm is asked that is asked all of them, for each task of (arm, task)."""
    items: dict[str, int] = {}
    for (_, task), each in found.items():
        items[task] = max(items.get(task, 0), each["items"])
    return items


def _with_share(arm: str, mine: Mapping[str, Mapping[str, Any]], items: Mapping[str, int]) -> str:
    """An arm's name, and which share of the items of its tasks it is asked, where that is not all."""
    share = sum(each["items"] for each in mine.values()) / sum(items[task] for task in mine)
    return arm if share > 0.99 else f"{arm} ({100 * share:.0f} % of the items)"


def difference_table(
    report: Mapping[str, Any], families: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Differences in points, with interval and corrected p: head and rows."""
    head = ["task", "arm", "items", "plain, %", "arm, %", "difference, points", "lost", "won", "p", "p, Holm"]
    rows = []
    for pair in report["differences"]:
        if families is None or pair["family"] in families:
            low, high = pair["bootstrap"]
            rows.append(
                [
                    pair["task"],
                    pair["arm"],
                    f"{pair['items']:,}",
                    f"{100 * pair['plain']:.1f}",
                    f"{100 * pair['edited']:.1f}",
                    f"{_points(pair['difference'])} [{_points(low)}, {_points(high)}]",
                    str(pair["lost"]),
                    str(pair["won"]),
                    f"{pair['mcnemar']:.2g}",
                    f"{pair['holm']:.2g}",
                ]
            )
    return head, rows


def difference_grid(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Differences in points with their intervals, a line for each arm and a column for each task: head and rows.

    Bold: Holm's p is below 0.05. The head says how many items an arm is asked that is asked all of them, an arm's name
    says which share of them it has, where that is not all.
    """
    pairs = {(pair["arm"], pair["task"]): pair for pair in report["differences"]}
    items = _most_items(pairs)
    tasks = [task for task in dict.fromkeys(each["task"] for each in report["results"]) if task in items]
    rows = []
    for arm in dict.fromkeys(name for name, _ in pairs):
        mine = {task: pairs[arm, task] for task in tasks if (arm, task) in pairs}
        cells = (_with_interval(mine[task]) if task in mine else "" for task in tasks)
        rows.append([_with_share(arm, mine, items), *cells])
    return ["arm", *(f"{task}, n = {items[task]:,}" for task in tasks)], rows


def _with_interval(pair: Mapping[str, Any]) -> str:
    found, low, high = (
        f"{round(100 * value):+d}".replace("-", "−") for value in (pair["difference"], *pair["bootstrap"])
    )
    return f"{f'**{found}**' if pair['holm'] < 0.05 else found} [{low}, {high}]"


def repeating_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Of written answers, how many repeat themselves, in percent: head and rows. No rows without such answers."""
    rows = [
        [each["task"], each["arm"], f"{100 * each['accuracy']:.0f}", f"{100 * each['repeating']:.0f}"]
        for each in report["results"]
        if "repeating" in each
    ]
    return ["task", "arm", "right, %", "repeating themselves, %"], rows


def trials_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Settings that were tried on development items, the best of those that went furthest first: head and rows."""
    trials = sorted(report.get("trials", ()), key=lambda each: (-each["items"], -each["accuracy"]))
    rows = [[each["setting"], f"{each['items']:,}", f"{100 * each['accuracy']:.1f}"] for each in trials]
    return ["setting", "development items", "right, %"], rows


def markdown(table: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    """A table in Markdown; columns of numbers stand to the right."""
    head, rows = table
    cells = [[row[column] for row in rows] for column in range(len(head))]
    numbers = [all(not cell or cell.lstrip("*")[0] in "0123456789+−" for cell in column) for column in cells]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---:" if each else "---" for each in numbers) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")
