"""Write the tables of docs/results.md from the reports of studies under docs/results/.

    .venv/bin/python docs/study_tables.py           # write
    .venv/bin/python docs/study_tables.py --check   # say whether the page agrees with the reports

Between ``<!-- study NAME -->`` and ``<!-- end of study -->`` stand the tables of docs/results/NAME.json, which
``attnrb study --json`` wrote. Where there is no such file the page says so, and shows no figure.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnrb.studies.study_report import difference_grid, markdown, profile_table, repeating_table, trials_table

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "results.md"
BLOCK = re.compile(r"<!-- study (?P<name>[\w.-]+) -->\n.*?<!-- end of study -->", re.DOTALL)


def tables(report: Mapping[str, Any]) -> str:
    """The report of a study in Markdown."""
    settings, about = report["settings"], report["environment"]
    lines = [
        f"    {_command(about)}",
        "",
        f"{report['answers']:,} answers, {settings['items']} held-out items of each task at most, {report['dtype']}, "
        f"{about['processor']}, {about['instruction_set']}, {about['cores']} cores; "
        f"{sum(report['cpu_seconds'].values()) / 60:,.0f} minutes of processor time.",
    ]
    if report["strength"] is not None:
        lines[-1] += f" The strength, {report['strength']:g}, was chosen on {report['chosen_on']} development items."
    lines += ["", "Right answers, in percent:", "", markdown(profile_table(report)), ""]
    lines += ["Differences from the plain model, in points:", "", markdown(difference_grid(report)), ""]
    if (trials := trials_table(report))[1]:
        lines += ["Settings that were tried, which is no result:", "", markdown(trials), ""]
    if (repeating := repeating_table(report))[1]:
        lines += ["Written answers, and how many of them repeat themselves:", "", markdown(repeating), ""]
    if report["neutral_perplexity"]:
        rows = [[arm, f"{value:.2f}"] for arm, value in report["neutral_perplexity"].items()]
        lines += ["Perplexity of neutral text behind a span:", "", markdown((["arm", "perplexity"], rows)), ""]
    if report.get("above_chance"):
        rows = [[task, "yes" if above else "no"] for task, above in report["above_chance"].items()]
        lines += ["Whether the plain model is above chance:", "", markdown((["task", "above chance"], rows)), ""]
    if report.get("left_out"):
        lines += ["Not asked:", "", *(f"- {task}: {why}" for task, why in report["left_out"].items()), ""]
    if report["requirements"]:
        rows = [[each["task"], each["what"], "yes" if each["holds"] else "no"] for each in report["requirements"]]
        lines += ["What was expected before the run:", "", markdown((["task", "expected", "found"], rows)), ""]
    return "\n".join(lines)


def _command(about: Mapping[str, Any]) -> str:
    """As it was typed: a launcher gives each of several processes the same one."""
    command = " ".join(about["command"])
    if about["processes"] > 1:
        command = command.replace("python ", f"torchrun --nproc-per-node {about['processes']} ", 1)
    return command


def filled(page: str, folder: Path) -> str:
    """The page with the tables of every report in the folder."""

    def block(match: re.Match[str]) -> str:
        file = folder / f"{match['name']}.json"
        found = "Not measured yet.\n"
        if file.is_file():
            found = tables(json.loads(file.read_text(encoding="utf-8")))
        return f"<!-- study {match['name']} -->\n\n{found}\n<!-- end of study -->"

    return BLOCK.sub(block, page)


def main() -> int:
    """See the module."""
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, DOCS / "results")
    if "--check" in sys.argv[1:]:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
