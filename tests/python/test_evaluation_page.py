"""The page of an evaluation in a headless browser: plots are drawn, nothing leaves, text stays text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("lm_eval", "plotly", "optuna"):
    pytest.importorskip(package)

from attnrb.config import RebalanceConfig  # noqa: E402
from attnrb.evaluation.grid import Plan, evaluate  # noqa: E402
from attnrb.evaluation.model import AttnrbLM  # noqa: E402
from attnrb.evaluation.page import letter_notes, page, points, sentence  # noqa: E402
from attnrb.evaluation.search import SearchPlan, search  # noqa: E402
from attnrb.evaluation.search_page import search_page  # noqa: E402
from browser import Heard, browser, opened  # noqa: E402
from saved_tiny_model import tiny_tokenizer  # noqa: E402
from tiny_evaluation import roomy_model, save_data  # noqa: E402

HOSTILE = "</script><script>document.title='caught'</script><img src=x onerror=\"document.title='caught'\">"


@pytest.fixture(scope="module")
def lm() -> AttnrbLM:
    return AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), plain=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


def test_an_evaluation(lm: AttnrbLM, data: Path, tmp_path: Path, chromium: Any) -> None:
    plan = Plan(("mmlu_anatomy", "siqa"), data, (RebalanceConfig(alpha=3.0),), "both", (0, 4), limit=3)
    report = evaluate(lm, plan, tmp_path / "run.jsonl", model=HOSTILE)
    assert report is not None
    (tmp_path / "page.html").write_text(page(report.to_dict()), "utf-8")
    with opened(chromium, tmp_path / "page.html") as (tab, heard):
        assert HOSTILE in tab.locator("h1").inner_text()
        assert tab.title() != "caught"
        plots = tab.locator(".plot")
        assert plots.count() == 2 + 2  # differences, accuracies, and two groups over budgets
        for number in range(plots.count()):
            assert plots.nth(number).locator("svg.main-svg").count() >= 1
    assert heard == Heard()


def test_a_search(lm: AttnrbLM, data: Path, tmp_path: Path, chromium: Any) -> None:
    result = search(lm, SearchPlan(("siqa",), data, evaluations=3, development=2), tmp_path / "run.jsonl", model="m")
    assert result is not None
    (tmp_path / "page.html").write_text(search_page(result.to_dict()), "utf-8")
    with opened(chromium, tmp_path / "page.html") as (tab, heard):
        assert tab.locator("#trials").count() == 1
        assert tab.locator('.plot[data-spec="trials"] svg.main-svg').count() >= 1
    assert heard == Heard()


def difference(**changes: Any) -> dict[str, Any]:
    each = {
        "items": 100,
        "plain": 0.4,
        "rebalanced": 0.42,
        "difference": 0.02,
        "bootstrap": [-0.01, 0.05],
        "mcnemar": {"p": 0.3, "only_plain": 1, "only_rebalanced": 3},
        "holm": 0.6,
        "verdict": "no difference shown",
        "needed_items": 3000,
    }
    return {**each, **changes}


def test_one_letter_is_told() -> None:
    groups = {"stem": {"items": 10, "answers": {"A": 9, "B": 1}}, "siqa": {"items": 10, "answers": {"A": 8, "B": 2}}}
    (note,) = letter_notes({"results": [{"arm": "plain", "label": "direct", "groups": groups}]})
    assert note.startswith("stem, direct: plain answers A to 9 of 10 items")


def test_sentences() -> None:
    said = sentence("stem", difference(), "alpha=0.2", "direct")
    assert "improve" not in said
    assert "shows no difference in accuracy: +2.0 [−1.0, +5.0] points, 40.0 % to 42.0 % of 100 items" in said
    assert "3,000 items would be needed" in said
    same = {"p": 1.0, "only_plain": 0, "only_rebalanced": 0}
    said = sentence("stem", difference(mcnemar=same, needed_items=None, difference=0.0), "alpha=0.2", "direct")
    assert "right on the same items" in said
    assert "improves accuracy" in sentence("stem", difference(verdict="improves"), "alpha=0.2", "direct")
    assert points(-0.015) == "−1.5"
