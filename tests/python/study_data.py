"""A folder of made-up questions for tests of studies: enough that both splits have some of every kind."""

from __future__ import annotations

import csv
from pathlib import Path

from tiny_evaluation import write_lines

SOURCES = ("high_school_european_history", "high_school_us_history")
_NAMES = ("Ada", "Bela", "Cleo", "Dora", "Edna", "Fynn", "Gita", "Hugo", "Ines", "Jule")


def save_study_data(folder: Path, count: int = 30) -> Path:
    """Files of each data set, with ``count`` questions each."""
    (folder / "mmlu").mkdir(parents=True, exist_ok=True)
    for subject in (*SOURCES, "anatomy"):
        rows = []
        for n in range(count):
            question = f"What is the use of part {n} in {subject}?"
            if subject in SOURCES:
                question = (
                    f"This question refers to the following information.\n{subject}, letter {n}.\nAs of {n}.\nWhy?"
                )
            rows.append([question, f"cause {n}", f"end {n}", f"luck {n}", f"plan {n}", "ABCD"[n % 4]])
        with (folder / "mmlu" / f"{subject}_test.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    pairs = [
        {"query": f"Question: do {n}\n", "choices": [f"so {n}", f"another way {n}"], "gold": n % 2}
        for n in range(count)
    ]
    situations = [
        {
            "query": f"Context: {_NAMES[n % 10]} met {n} people.\nQuestion: How was {n}?\nChoices:\nA. glad {n}\n"
            "B. sad and tired\nAnswer:",
            "choices": ["A", "B"],
            "gold": (n + 1) % 2,
        }
        for n in range(count)
    ]
    write_lines(folder / "piqa.jsonl", pairs)
    write_lines(folder / "siqa.jsonl", situations)
    sums = [{"context": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(count)]
    write_lines(folder / "gsm8k.jsonl", sums)
    return folder
