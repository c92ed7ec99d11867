"""The heat map of a profile as a page: what it shows, in a real browser, and that nothing gets out or in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from attnrb import HeadProfile
from attnrb.studies.profile_page import profile_page
from browser import Elements, opened

HOSTILE = "</dd><script>alert(1)</script><img src=https://example.invalid/x onerror=alert(2)>\u202e\x1b[31m"
SCORES = [[0.5, -0.25, 0.0], [0.125, 2.0, -2.0]]
PROFILE = HeadProfile(SCORES, 2, {"model": HOSTILE, HOSTILE: {"policy": HOSTILE}})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "heads.html"
    path.write_text(profile_page(PROFILE), encoding="utf-8")
    return path


def test_it_loads_nothing_and_says_so_in_its_policy(page: Path) -> None:
    parser = Elements()
    parser.feed(page.read_text("utf-8"))
    for tag, attributes in parser.found:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes and "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert [tag for tag, _ in parser.found].count("script") == 1
    [policy] = [attributes["content"] or "" for _, attributes in parser.found if attributes.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    text = page.read_text("utf-8")
    assert "\u202e" not in text and "\x1b" not in text


@pytest.mark.parametrize("width", [1360, 390])
def test_every_head_is_a_cell(chromium: Any, page: Path, width: int) -> None:
    with opened(chromium, page, viewport={"width": width, "height": 800}) as (tab, heard):
        cells = tab.locator(".heat td")
        assert cells.count() == 6
        labels = [cells.nth(place).get_attribute("aria-label") for place in range(6)]
        assert labels[0] == "layer 0, head 0: +0.5000, kept"
        assert labels[5] == "layer 1, head 2: -2.0000"
        assert [cells.nth(place).text_content() for place in range(6)] == ["★", "", "", "", "★", ""]
        shades = cells.evaluate_all("cells => cells.map(cell => Number(cell.style.getPropertyValue('--a')))")
        expected = [(abs(score) / 2.0) ** 0.5 for row in SCORES for score in row]
        assert shades == pytest.approx(expected, abs=1e-3)
        harms = cells.evaluate_all("cells => cells.map(cell => cell.classList.contains('harms'))")
        assert harms == [score < 0 for row in SCORES for score in row]
        assert HOSTILE[:30] in tab.locator("dl").text_content()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no scrolling sideways"
        assert not heard.messages and not heard.requests and not heard.dialogs


def test_colours_follow_the_button(chromium: Any, page: Path) -> None:
    with opened(chromium, page, color_scheme="light") as (tab, heard):
        colour = "getComputedStyle(document.querySelector('.heat td:nth-child(4)')).backgroundColor"
        before = tab.evaluate(colour)
        tab.click("#theme")
        assert tab.evaluate(colour) != before
        assert not heard.messages


def test_a_profile_of_equal_scores() -> None:
    assert profile_page(HeadProfile([[0.0, 0.0]], 1)).count("★</td>") == 1
