"""A folder of items and a tiny model to ask them, for tests of evaluation: made in milliseconds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from saved_tiny_model import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

CONTEXT = 2048
SUBJECTS = ("anatomy", "sociology")
MMLU_ITEMS = 5
PAIRS = 6


def save_data(folder: Path) -> Path:
    """Questions of every kind of file, with the traps of CSV among them."""
    (folder / "mmlu").mkdir(parents=True, exist_ok=True)
    for subject in SUBJECTS:
        rows = [["Which, of these,\nis not a value?", "None", "NA", 'a "quoted" one', "null", "B"]]
        rows += [
            [f"{subject} {n}: {'long ' * n}?", f"a{n}", f"b{n}", f"c{n}", f"d{n}", "ABCD"[n % 4]] for n in range(4)
        ]
        with (folder / "mmlu" / f"{subject}_test.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    write_lines(
        folder / "piqa.jsonl",
        [
            {"query": f"Question: do {n}\n", "choices": [f"so {n}", f"another way {n}"], "gold": n % 2}
            for n in range(PAIRS)
        ],
    )
    write_lines(
        folder / "siqa.jsonl",
        [
            {
                "query": f"Context: c{n}\nQuestion: q?\nChoices:\nA. one {n}\nB. two\nAnswer:",
                "choices": ["A", "B"],
                "gold": (n + 1) % 2,
            }
            for n in range(PAIRS)
        ],
    )
    write_lines(folder / "gsm8k.jsonl", [{"context": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)])
    return folder


def save_task(folder: Path) -> Path:
    """A task of the harness' own kind, ``colours``, with its items in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = ["red", "blue", "green"]
    items = [{"question": f"Which colour has {n}?", "choices": choices, "gold": n % 3} for n in range(PAIRS)]
    write_lines(folder / "colours.jsonl", items)
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "colours.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "colours.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML too
    return folder


def no_tasks() -> Any:
    """A manager without the harness' ten thousand tasks, which take it seconds to list: for tasks that are built."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def roomy_model() -> Any:
    """The tiny model with a context that takes prompts of questions."""
    model = tiny_model()
    model.config.max_position_embeddings = CONTEXT
    return model


def save_roomy_model(folder: Path) -> Path:
    """Save it with its tokenizer."""
    roomy_model().save_pretrained(folder)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return folder
