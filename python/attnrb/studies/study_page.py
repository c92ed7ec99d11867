"""A study as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnrb.evaluation.page import check_installed, table, whole_page
from attnrb.reports.html_page import escape
from attnrb.reports.printable import printable
from attnrb.studies.study_report import difference_table, profile_table

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
        f"<section><h2>How to repeat it</h2><pre>{escape(command)}</pre></section>",
    ]
    return whole_page(title, escape(lead), parts, report["environment"]["attnrb"])
