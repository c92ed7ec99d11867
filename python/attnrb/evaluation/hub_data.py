"""Files of questions made from data sets of the Hugging Face hub, so that anybody can repeat an evaluation.

Note: [Sums of questions]
A file's own sum changes with the order of its fields, which no answer depends on. So questions have a sum of their own:
SHA-256 over the question, the prompt, the choices and the answer of each, in order. `KNOWN` has those of the files that
docs/results.md was measured with. Files made here from other versions of a data set differ in it, and say so.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnrb.evaluation import mmlu
from attnrb.evaluation.data import LETTERS, DataError, ItemSet, read_items, task_names

__all__ = ["KNOWN", "SOURCES", "SUMS_FILE", "Made", "Source", "check_sums", "items_sum", "make"]

SUMS_FILE = "SHA256SUMS"
"""Sums of all files, as ``sha256sum --check`` reads them."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the questions of a task come from, and how a row becomes a line."""

    dataset: str
    """Id on the hub."""
    split: str
    line: Callable[[Row], Any]
    name: str | None = None
    """Of the data set's configuration."""


@dataclass(frozen=True)
class Made:
    """A task whose files were written."""

    task: str
    dataset: str
    items: int
    sum: str
    """See `Note: [Sums of questions]`."""

    @property
    def same(self) -> bool | None:
        """Whether these are the questions of docs/results.md; None where it has none of this name."""
        return None if self.task not in KNOWN else self.sum == KNOWN[self.task]


def _piqa(row: Row) -> Any:
    return {"query": f"Question: {row['goal']}\n", "choices": [row["sol1"], row["sol2"]], "gold": int(row["label"])}


def _siqa(row: Row) -> Any:
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    query = f"Context: {row['context']}\nQuestion: {row['question']}\nChoices:\n{options}\nAnswer:"
    return {"query": query, "choices": ["A", "B", "C"], "gold": int(row["label"]) - 1}


def _gsm8k(row: Row) -> Any:
    thoughts, _, answer = row["answer"].rpartition("####")
    return {
        "context": row["question"],
        "chain_of_thought": thoughts.strip(),
        "answer": answer.strip().replace(",", ""),
    }


def _mmlu(row: Row) -> list[str]:
    return [row["question"], *row["choices"], "ABCD"[int(row["answer"])]]


SOURCES: dict[str, Source] = {
    "mmlu": Source("cais/mmlu", "test", _mmlu),
    "piqa": Source("baber/piqa", "validation", _piqa),
    "siqa": Source("lighteval/siqa", "validation", _siqa),
    "gsm8k": Source("openai/gsm8k", "test", _gsm8k, "main"),
}
"""The tasks that can be made: the data sets are those that lm-evaluation-harness reads."""

KNOWN: dict[str, str] = {
    "mmlu": "c7a256057a3d3d1548d03831203c1370ec3341e1a31abb6c802f07ce0af00637",
    "piqa": "82aa020c1071c0ed84ae33065ab0e0d8a98f368aff9dd428eba98a27fee850c4",
    "siqa": "634fb3d37cb3a06adfcc41843e39c6f3dd112f7b9487c6c3693b97f40b6c9b66",
    "gsm8k": "446e19009bc44b6f046c0838878fe13ecefda7e7cd49d7c4c795a6100a7194ce",
}
"""Sums of the questions that docs/results.md was measured with. Its siqa has two choices, and the hub's three."""


def make(
    tasks: Iterable[str],
    folder: Path,
    *,
    sources: Mapping[str, str] | None = None,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Made]:
    """Write the files of these tasks, and the sums of all.

    Args:
        tasks: names of `SOURCES`.
        folder: where they go; made if it is not there.
        sources: another data set for a task: an id on the hub, or a folder that ``datasets.load_dataset`` reads. That
            of ``mmlu`` has a folder for each subject.
        revision: branch, tag or commit of the data sets on the hub. Default: their main branch.
        progress: called with a short line before each file.

    Raises:
        DataError: there is no such task, the data set cannot be read, or a row of it is not as expected.
        ImportError: the package datasets is missing.
        OSError: a file cannot be written.
    """
    wanted = list(dict.fromkeys(tasks))
    if unknown := [each for each in wanted if each not in SOURCES]:
        raise DataError(f"tasks: expected some of {', '.join(SOURCES)}, got {', '.join(unknown)}")
    if stray := sorted(set(sources or {}) - {*wanted}):
        raise DataError(f"source: {stray[0]!r} is not among the tasks to make ({', '.join(wanted)})")
    say = progress or (lambda _: None)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for task in wanted:
        place = (sources or {}).get(task, SOURCES[task].dataset)
        for path, content in _files(task, place, revision, say):
            _write(folder / path, content)
        sets = [read_items(folder, each) for each in _members(task)]
        made.append(Made(task, place, sum(len(each.items) for each in sets), items_sum(sets)))
    sums = {path: _sha256(folder / path) for path in _data_files(folder)}
    _write(folder / SUMS_FILE, "".join(f"{value}  {path}\n" for path, value in sums.items()))
    return made


def check_sums(folder: Path) -> list[str]:
    """The files of a folder that are not as `SUMS_FILE` says, missing ones included.

    Raises:
        DataError: there is no such file, or a line of it has not a sum and a name.
    """
    place = folder / SUMS_FILE
    if not place.is_file():
        raise DataError(f"out: there is no {SUMS_FILE} in {str(folder)!r}; attnrb data writes one")
    wrong = []
    for number, line in enumerate(place.read_text("utf-8").splitlines(), 1):
        value, space, name = line.partition("  ")
        if not space or len(value) != 64:
            raise DataError(f"out: {SUMS_FILE}, line {number}: expected a sum, two spaces and a name, got {line!r}")
        if not (folder / name).is_file() or _sha256(folder / name) != value:
            wrong.append(name)
    return wrong


def items_sum(sets: Iterable[ItemSet]) -> str:
    """See `Note: [Sums of questions]`."""
    digest = hashlib.sha256()
    for each in sets:
        for item in each.items:
            about = [item.question, item.prompt, list(item.choices), item.gold, item.answer]
            digest.update(json.dumps(about, ensure_ascii=True).encode())
    return digest.hexdigest()


def _members(task: str) -> list[str]:
    return [f"mmlu_{subject}" for subject in mmlu.SUBJECTS] if task == "mmlu" else [task]


def _files(task: str, place: str, revision: str | None, say: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Each file of a task, by its path in the folder, and what goes into it."""
    source = SOURCES[task]
    local = Path(place).is_dir()
    if task != "mmlu":
        say(f"Reading {place}")
        rows = _rows(place, None if local else source.name, source.split, None if local else revision)
        lines = (json.dumps(_converted(source, row, place), ensure_ascii=False) for row in rows)
        yield f"{task}.jsonl", "".join(f"{line}\n" for line in lines)
        return
    for subject in mmlu.SUBJECTS:
        say(f"Reading {place}, {subject}")
        where, name = (str(Path(place) / subject), None) if local else (place, subject)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            _converted(source, row, where) for row in _rows(where, name, source.split, None if local else revision)
        )
        yield f"mmlu/{subject}_test.csv", text.getvalue()


def _rows(place: str, name: str | None, split: str, revision: str | None) -> Iterable[Row]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError("attnrb data needs the package datasets: run `pip install 'attnrb[eval]'`") from error
    try:
        rows: Iterable[Row] = datasets.load_dataset(place, name, split=split, revision=revision)
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise DataError(f"source: {place!r} could not be read ({reason or type(error).__name__})") from error
    return rows


def _converted(source: Source, row: Row, place: str) -> Any:
    try:
        return source.line(row)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"source: a row of {place!r} is not as expected ({type(error).__name__}: {error}); it has "
            f"{', '.join(map(str, row))}"
        ) from error


def _data_files(folder: Path) -> list[str]:
    names = [f"{each}.jsonl" for each in task_names(folder) if (folder / f"{each}.jsonl").is_file()]
    return sorted([*names, *(f"mmlu/{each.name}" for each in (folder / "mmlu").glob("*_test.csv"))])


def _write(path: Path, content: str) -> None:
    from attnrb.reports.files import write_whole

    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True)
    write_whole(path, content)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
