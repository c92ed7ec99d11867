"""A study as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnrb.evaluation.page import check_installed, table, whole_page
from attnrb.reports.html_page import escape
from attnrb.reports.printable import printable
from attnrb.studies.study_report import difference_table, profile_table, repeating_table, trials_table

__all__ = ["check_installed", "study_page"]


def study_page(report: Mapping[str, Any]) -> str:
    """The page of a study's report.

    Raises:
        ImportError: what pages need is not installed.
    """
    title = f"Study of {report['study']}: {printable(str(report['model']))}"
    lead = f"{report['answers']:,} answers. Plain is the model without any edit, and the prompt without markup."
    if report["strength"] is not None:
        lead += f" Strength {report['strength']:g}, chosen on {report['chosen_on']} development items."
    command = " ".join(report["environment"]["command"])
    checks = "".join(
        f"<li>{escape(each['task'])}: {escape(each['what'])}: {'yes' if each['holds'] else 'no'}</li>"
        for each in report["requirements"]
    )
    parts = [
        f"<section><h2>What was expected</h2><ul>{checks}</ul></section>" if checks else "",
        f"<section><h2>Right answers, in percent</h2>{table(*profile_table(report), 1)}</section>",
        f"<section><h2>Differences</h2><p class='soft small'>Interval: paired bootstrap, level 0.95. p: McNemar's "
        f"exact test, and Holm's correction within each family.</p>{table(*difference_table(report), 2)}</section>",
        _section("Settings that were tried on development items, which is no result", trials_table(report), 1),
        _section("Written answers", repeating_table(report), 2),
        _left_out(report),
        f"<section><h2>How to repeat it</h2><pre>{escape(command)}</pre></section>",
    ]
    return whole_page(title, escape(lead), parts, report["environment"]["attnrb"])


def _section(title: str, found: tuple[list[str], list[list[str]]], numbers: int) -> str:
    return f"<section><h2>{title}</h2>{table(*found, numbers)}</section>" if found[1] else ""


def _left_out(report: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escape(task)}: {escape(why)}</li>" for task, why in report.get("left_out", {}).items())
    return f"<section><h2>Not asked</h2><ul>{items}</ul></section>" if items else ""
