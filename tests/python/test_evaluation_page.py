"""The page of an evaluation in a headless browser: plots are drawn, nothing leaves, text stays text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

for package in ("lm_eval", "plotly", "optuna"):
    pytest.importorskip(package)

from attnrb.evaluation.grid import evaluate  # noqa: E402
from attnrb.evaluation.page import letter_notes, page, points, sentence  # noqa: E402
from attnrb.evaluation.plan import Plan  # noqa: E402
from attnrb.evaluation.report import headline  # noqa: E402
from attnrb.evaluation.search_page import search_page  # noqa: E402
from attnrb.evaluation.trials import SearchPlan, search  # noqa: E402
from attnrb.hosts.lm_eval.model import AttnrbLM  # noqa: E402
from attnrb.policies.rebalance import RebalanceConfig  # noqa: E402
from attnrb.reports.printable import printable  # noqa: E402
from browser import Heard, opened  # noqa: E402
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
def report(lm: AttnrbLM, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    configs = (RebalanceConfig(alpha=3.0), RebalanceConfig(alpha=0.5, layers=(1, 2)))
    plan = Plan(("mmlu_anatomy", "siqa"), data, configs, "both", (0, 4), limit=3)
    report = evaluate(lm, plan, tmp_path_factory.mktemp("run") / "run.jsonl", model=HOSTILE)
    assert report is not None
    return report.to_dict()


@pytest.fixture(scope="module")
def evaluation(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "evaluation.html"
    path.write_text(page(report), "utf-8")
    return path


@pytest.fixture(scope="module")
def searched(lm: AttnrbLM, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    result = search(lm, SearchPlan(("siqa",), data, evaluations=3, development=2), folder / "run.jsonl", model="m" * 80)
    assert result is not None
    (folder / "search.html").write_text(search_page(result.to_dict()), "utf-8")
    return folder / "search.html"


def test_an_evaluation(chromium: Any, evaluation: Path) -> None:
    with opened(chromium, evaluation) as (tab, heard):
        assert HOSTILE in tab.locator("h1").inner_text()
        assert tab.title() != "caught"
        plots = tab.locator(".plot")
        assert plots.count() == 2 + 2  # differences, accuracies, and two groups over budgets
        for number in range(plots.count()):
            assert plots.nth(number).locator("svg.main-svg").count() >= 1
    assert heard == Heard()


# What Plotly reads in a text that is not made literal: tags, links, entities, and what ends a template.
PSEUDO_HTML = (
    "<b>&lt;&#x3c;i&#x3e;</b>\x1b\u202e",
    "<a href=javascript:alert(1)>a</a><br>",
    "<extra></extra>%{x}<sup>2",
    "</text><script>alert(1)</script>",
)


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The same report with other names in it, keys among them."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [renamed(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_names_in_pictures_are_text(chromium: Any, report: dict[str, Any], tmp_path: Path) -> None:
    plain, *arms = dict.fromkeys(result["arm"] for result in report["results"])
    groups = list(dict.fromkeys(name for result in report["results"] for name in result["groups"]))
    names = dict(zip([*arms, *groups], PSEUDO_HTML, strict=True))
    (tmp_path / "page.html").write_text(page(renamed(report, names)), "utf-8")
    with opened(chromium, tmp_path / "page.html") as (tab, heard):
        accuracies = tab.locator('.plot[data-spec="accuracies"]')
        assert accuracies.locator(".legendtext").all_text_contents() == [
            plain,
            *(printable(names[arm]) for arm in arms),
        ]
        ticks = accuracies.locator(".xtick2 text, .xtick text").all_text_contents()
        assert {printable(names[group]) for group in groups} <= set(ticks)
        assert tab.locator(".plot a, .plot b, .plot script, .plot [style*='font-weight:bold']").count() == 0
        accuracies.evaluate("plot => Plotly.Fx.hover(plot, [{curveNumber: 1, pointNumber: 0}])")
        tip = "".join(accuracies.locator(".hoverlayer text").all_text_contents())
        assert printable(names[arms[0]]) in tip and printable(names[groups[0]]) in tip
    assert heard == Heard()


def test_groups_that_are_named_as_parts_of_every_object(chromium: Any, report: dict[str, Any], tmp_path: Path) -> None:
    groups = list(dict.fromkeys(name for result in report["results"] for name in result["groups"]))
    for names in (("constructor", "__proto__"), ("toString", "valueOf")):
        changed = renamed(report, dict(zip(groups, names, strict=True)))
        (tmp_path / "page.html").write_text(page(changed), "utf-8")
        with opened(chromium, tmp_path / "page.html") as (tab, heard):
            ticks = tab.locator('.plot[data-spec="accuracies"]').locator(".xtick2 text, .xtick text")
            shown = {text.rstrip("\u200b") for text in ticks.all_text_contents()}
            assert set(names) <= shown
        assert heard == Heard()


def test_points_stand_where_their_figures_say(chromium: Any, evaluation: Path, report: dict[str, Any]) -> None:
    """In pixels, of every marker and bar: what shares a row must not move along the axis of values."""
    drawn = """name => {
        const plot = document.querySelector(`.plot[data-spec="${name}"]`);
        return plot.calcdata.flatMap((points) => points.map((point) => ({
          x: plot._fullLayout.xaxis.p2c(plot._fullLayout.xaxis.c2p(point.x)), y: point.y ?? point.s, size: point.s,
        })));
    }"""
    with opened(chromium, evaluation) as (tab, heard):
        points = tab.evaluate(drawn, "differences")
        bars = tab.evaluate(drawn, "accuracies")
    expected = [
        100 * group["difference"]
        for arm in dict.fromkeys(pair["arm"] for pair in report["differences"])
        for pair in report["differences"]
        if pair["arm"] == arm
        for group in pair["groups"].values()
    ]
    assert [point["x"] for point in points] == pytest.approx(expected)
    assert len(points) == 2 * 3 * 2  # models, ways of asking, groups
    shares = sorted(100 * group["accuracy"] for result in report["results"] for group in result["groups"].values())
    assert sorted(bar["size"] for bar in bars) == pytest.approx(shares)
    assert heard == Heard()


def test_a_search(chromium: Any, searched: Path) -> None:
    with opened(chromium, searched) as (tab, heard):
        assert tab.locator("#trials").count() == 1
        assert tab.locator('.plot[data-spec="trials"] svg.main-svg').count() >= 1
    assert heard == Heard()


@pytest.mark.parametrize("name", ["evaluation", "searched"])
def test_a_phone_has_no_sideways_scrolling(chromium: Any, name: str, request: pytest.FixtureRequest) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(chromium, request.getfixturevalue(name), **options) as (tab, heard):
        for summary in tab.locator("summary").all():
            summary.tap()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.scrollWidth <= 360)")
    assert heard == Heard()


def test_colours_follow_the_system_the_button_and_paper(chromium: Any, evaluation: Path) -> None:
    def brightness(tab: Any, of: str) -> int:
        colour = tab.evaluate(of)
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    page_colour = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    with opened(chromium, evaluation, color_scheme="dark") as (tab, heard):
        assert (brightness(tab, page_colour) < 300, brightness(tab, ink) > 600) == (True, True)
        assert tab.locator("#theme").inner_text() == "Light"
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert (brightness(tab, page_colour) > 600, brightness(tab, ink) < 300) == (True, True)
        tab.evaluate("dispatchEvent(new Event('afterprint'))")
        assert brightness(tab, page_colour) < 300
        tab.locator("#theme").focus()
        tab.keyboard.press("Enter")
        assert (brightness(tab, page_colour) > 600, brightness(tab, ink) < 300) == (True, True)
        assert tab.pdf(format="A4").startswith(b"%PDF")
    assert heard == Heard()


def test_tables_scroll_by_keyboard(chromium: Any, evaluation: Path) -> None:
    with opened(chromium, evaluation, viewport={"width": 360, "height": 740}) as (tab, heard):
        tab.locator(".scroll").first.focus()
        tab.keyboard.press("ArrowRight")
        for _ in range(100):  # it moves smoothly
            tab.wait_for_timeout(20)
            if moved := tab.evaluate("document.activeElement.scrollLeft"):
                break
        assert moved > 0
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
    groups = {"stem": {"items": 20, "answers": {"A": 18, "B": 2}}, "siqa": {"items": 20, "answers": {"A": 17, "B": 3}}}
    (note,) = letter_notes({"results": [{"arm": "plain", "label": "direct", "groups": groups}]})
    assert note.startswith("plain, direct, answers A to nearly everything (18 of 20 in stem), so that")
    both = {"stem": groups["stem"], "siqa": {"items": 20, "answers": {"A": 20}}}
    (note,) = letter_notes({"results": [{"arm": "plain", "label": "direct", "groups": both}]})
    assert "(18 of 20 in stem, 20 of 20 in siqa)" in note


def test_sentences() -> None:
    said = sentence("stem", difference(), "alpha=0.2", "direct")
    assert "improve" not in said
    assert "shows no difference in accuracy: +2.0 [−1.0, +5.0] points, 40.0 % to 42.0 % of 100 items" in said
    assert "3,000 items would be needed" in said
    same = {"p": 1.0, "only_plain": 0, "only_rebalanced": 0}
    said = sentence("stem", difference(mcnemar=same, needed_items=None, difference=0.0), "alpha=0.2", "direct")
    assert "right on the same items" in said
    assert "improves accuracy" in sentence("stem", difference(verdict="improves"), "alpha=0.2", "direct")
    assert " of 1 item," in sentence("stem", difference(items=1), "alpha=0.2", "direct")
    assert points(-0.015) == "−1.5"


def test_one_letter_needs_answers_enough() -> None:
    few = {"piqa": {"items": 3, "answers": {"A": 3}}, "siqa": {"items": 30, "answers": {}}}
    assert letter_notes({"results": [{"arm": "plain", "label": "direct", "groups": few}]}) == []


def pairs(**verdicts: str) -> dict[str, Any]:
    return {"arm": "alpha=0.2", "label": "direct", "groups": {k: difference(verdict=v) for k, v in verdicts.items()}}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], "Nothing was compared."),
        ([pairs(stem="no difference shown")], "No difference shown in 1 of 1 group."),
        (
            [pairs(stem="no difference shown", siqa="worsens", piqa="improves")],
            "Better in 1 of 3 groups: piqa. Worse in 1 of 3 groups: siqa. No difference shown in 1 of 3 groups.",
        ),
        (
            [pairs(stem="improves"), {**pairs(stem="no difference shown"), "label": "cot 64"}],
            "Better in 1 of 2 comparisons: stem (alpha=0.2, direct). No difference shown in 1 of 2 comparisons.",
        ),
    ],
)
def test_headline(differences: list[dict[str, Any]], expected: str) -> None:
    assert headline(differences) == expected


def test_the_headline_comes_first(chromium: Any, evaluation: Path, report: dict[str, Any]) -> None:
    with opened(chromium, evaluation) as (tab, heard):
        assert tab.locator("main section").first.locator(".headline").inner_text() == headline(report["differences"])
        assert not tab.locator("main section").first.locator("li").first.is_visible()
        with tab.expect_download() as told:
            tab.locator(".save").first.get_by_text("data").click()
        lines = Path(told.value.path()).read_text("utf-8").splitlines()
        assert len(lines) == 1 + sum(len(pair["groups"]) for pair in report["differences"])
    assert heard == Heard()


def test_a_subject_alone_has_its_own_name(report: dict[str, Any]) -> None:
    assert {name for result in report["results"] for name in result["groups"]} == {"mmlu_anatomy", "siqa"}
    assert all(result["subjects"] == {} for result in report["results"])


def test_in_a_notebook(lm: AttnrbLM, data: Path, tmp_path: Path) -> None:
    found = evaluate(lm, Plan(("siqa",), data, limit=2), tmp_path / "run.jsonl", model=HOSTILE)
    assert found is not None
    assert len(repr(found)) < 400 and "of 1 group" in repr(found)
    shown = found._repr_html_()
    assert "<script" not in shown and "<img" not in shown and "siqa" in shown
