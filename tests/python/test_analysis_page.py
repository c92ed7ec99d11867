"""The HTML report: driven in a real browser, and looked through for anything that could get out or in."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import attnrb
import pytest
from attnrb.analysis import AttentionReport, TextReport, Token, analyze
from browser import Elements, opened
from saved_tiny_model import LAYERS, TEXT, tiny_model, tiny_tokenizer

pytest.importorskip("plotly")

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=https://example.invalid/x onerror=alert(2)>',
    "<!--<script>",
    "&lt;b&gt;",
    "'; alert(3); //",
    "\u2028\u2029",
    "\u202egnp.exe",
    "\x00\x1b[31m",
    "{{constructor.constructor('alert(4)')()}}",
    "<style>*{display:none}</style>",
]


@pytest.fixture(scope="module")
def report() -> AttentionReport:
    """Two texts, one with hostile tokens, before and after re-balancing."""
    config = attnrb.RebalanceConfig(alpha=0.5)
    report = analyze(tiny_model(), tiny_tokenizer(), [TEXT, TEXT[:40]], compare=config, model_name=HOSTILE[0])
    first = report.texts[0]
    tokens = tuple(
        dataclasses.replace(token, text=HOSTILE[place]) if place < len(HOSTILE) else token
        for place, token in enumerate(first.tokens)
    )
    runs = tuple(
        dataclasses.replace(
            run, sinks=tuple(dataclasses.replace(sink, text=HOSTILE[1]) for sink in run.sinks) or run.sinks
        )
        for run in report.runs
    )
    texts = (TextReport(HOSTILE[1], tokens), report.texts[1])
    return dataclasses.replace(report, texts=texts, runs=runs, notes=(HOSTILE[0],))


@pytest.fixture(scope="module")
def page(report: AttentionReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.to_html(path)
    return path


def test_page_loads_nothing_and_says_so_in_its_policy(page: Path) -> None:
    parser = Elements()
    parser.feed(page.read_text("utf-8"))
    for tag, attributes in parser.found:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes and "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    policies = [attributes for tag, attributes in parser.found if attributes.get("http-equiv")]
    assert len(policies) == 1
    policy = policies[0]["content"] or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy and "http" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert [tag for tag, _ in parser.found].count("script") == 3


SHADES = "tokens => tokens.map(token => Number(token.style.getPropertyValue('--a')))"


def ready(tab: Any) -> None:
    tab.wait_for_selector("html[data-ready=true]")


def test_hostile_tokens_stay_text(chromium: Any, page: Path, report: AttentionReport) -> None:
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        shown = tab.locator("#text .t").all_text_contents()
        assert shown[0] == HOSTILE[0] and shown[1] == HOSTILE[1]
        assert "\u202e" not in "".join(shown) and "\x1b" not in "".join(shown)
        assert len(shown) == len(report.texts[0].tokens)
        assert HOSTILE[0] in tab.title() and HOSTILE[0] in tab.inner_text("h1")
        assert tab.locator("#text *:not(.t)").count() == 0
        assert tab.locator("img").count() == 0
        assert heard.dialogs == [] and heard.messages == [] and heard.requests == []


def shown(tab: Any, layer: int) -> None:
    """Wait for a layer. A selector, since the page's own policy lets no string be evaluated while it polls."""
    tab.locator(f"#layer-name:text-is('layer {layer}')").wait_for()


def test_slider_moves_through_the_layers(chromium: Any, page: Path, report: AttentionReport) -> None:
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        slider = tab.get_by_label("Layer", exact=False).first
        assert tab.inner_text("#layer-name") == "all layers"
        before = tab.locator("#text .t").nth(14).get_attribute("style")
        slider.focus()
        for layer in range(LAYERS):
            tab.keyboard.press("ArrowRight")
            shown(tab, layer)
            # The token that receives most is the darkest.
            shades = tab.eval_on_selector_all("#text .t", SHADES)
            received = report.before.received[0][layer].mean(0)
            assert shades[int(received.argmax())] == pytest.approx(1, abs=2e-3)
            assert min(shades) == 0
        assert tab.locator("#text .t").nth(14).get_attribute("style") != before
        assert heard.messages == [] and heard.requests == []


def test_hover_tells_exact_values(chromium: Any, page: Path, report: AttentionReport) -> None:
    with opened(chromium, page, viewport={"width": 1200, "height": 900}) as (tab, heard):
        ready(tab)
        assert not tab.is_visible("#tip")
        tab.locator("#text .t").nth(15).hover()
        tab.wait_for_selector("#tip:visible")
        tip = tab.inner_text("#tip")
        token = report.texts[0].tokens[15]
        assert f"id {token.id}" in tip and token.token_class.replace("_", " ") in tip
        for run in report.runs:
            shown = re.search(rf"received, {run.label}\s+([\d.]+) %", tip)
            assert shown is not None
            assert float(shown[1]) == pytest.approx(100 * float(run.received[0][:, :, 15].mean()), rel=5e-3)
        tab.select_option("#head", "2")
        tab.locator("#text .t").nth(16).hover()
        assert "head 2" in tab.inner_text("#tip")
        tab.mouse.move(5, 5)
        tab.wait_for_selector("#tip", state="hidden")
        assert heard.messages == []


def test_plots_show_tooltips(chromium: Any, page: Path) -> None:
    with opened(chromium, page, viewport={"width": 1200, "height": 900}) as (tab, heard):
        ready(tab)
        for plot, expected in ((".depth", r"%|plain"), (".head-map", r"layer \d+, head \d+")):
            area = tab.locator(f"{plot} .nsewdrag").first
            area.scroll_into_view_if_needed()
            area.hover()
            tab.wait_for_selector(f"{plot} .hoverlayer text")
            text = " ".join(tab.locator(f"{plot} .hoverlayer text").all_text_contents())
            assert re.search(expected, text), text
        assert tab.locator(".depth svg.main-svg").count() >= 6
        tab.select_option("#metric", "entropy")
        assert heard.messages == [] and heard.requests == []


def test_keyboard_reaches_tokens_and_outliers(chromium: Any, page: Path) -> None:
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        tab.locator("#text").focus()
        tab.keyboard.press("Home")
        tab.keyboard.press("ArrowRight")
        assert tab.locator(".t.current").get_attribute("data-index") == "1"
        assert "token" in tab.inner_text("#tip")
        tab.keyboard.press("End")
        last = tab.locator("#text .t").count() - 1
        assert tab.locator(".t.current").get_attribute("data-index") == str(last)
        tab.keyboard.press("Escape")
        assert not tab.is_visible("#tip")
        assert heard.messages == []


def test_runs_and_texts_can_be_chosen(chromium: Any, page: Path, report: AttentionReport) -> None:
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        for value, kind in (("1", "level"), ("change", "change"), ("0", "level")):
            tab.locator(f"#which input[value='{value}']").check(force=True)
            tab.wait_for_selector(f"#scale.{kind}")
        tab.select_option("#which-text", "1")
        shown = tab.locator("#text .t").all_text_contents()
        assert "".join(shown) == "".join(token.text for token in report.texts[1].tokens)
        assert heard.messages == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_and_the_button(chromium: Any, page: Path, scheme: str) -> None:
    with opened(chromium, page, color_scheme=scheme) as (tab, heard):
        ready(tab)

        def brightness() -> int:
            colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

        assert (brightness() > 600) == (scheme == "light")
        tab.click("#theme")
        assert (brightness() > 600) == (scheme == "dark")
        assert heard.messages == []


def test_phone_has_no_sideways_scrolling_and_taps_show_values(chromium: Any, page: Path) -> None:
    with opened(chromium, page, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as (tab, heard):
        ready(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.locator("#text .t").nth(20).tap()
        assert tab.is_visible("#tip")
        box = tab.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert heard.messages == []


def test_print_shows_everything(chromium: Any, page: Path) -> None:
    with opened(chromium, page, color_scheme="dark") as (tab, heard):
        ready(tab)
        tab.emulate_media(media="print")
        assert not tab.is_visible("#layer") and not tab.is_visible("#theme")
        assert tab.evaluate("getComputedStyle(document.getElementById('text')).overflow") == "visible"
        document = tab.pdf(format="A4", print_background=True)
        assert document.startswith(b"%PDF") and len(document) > 20_000
        assert heard.messages == []


def test_long_text_stays_usable(chromium: Any, report: AttentionReport, tmp_path: Path) -> None:
    import numpy as np

    length = 8000
    tokens = tuple(Token(place, f" w{place}" if place % 17 else ".\n", "content") for place in range(length))
    generator = np.random.default_rng(0)
    runs = tuple(
        dataclasses.replace(run, received=(generator.random((LAYERS, report.heads, length), dtype=np.float32),))
        for run in report.runs
    )
    long = dataclasses.replace(report, texts=(TextReport("long", tokens),), runs=runs)
    page = tmp_path / "long.html"
    long.to_html(page)
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        assert tab.locator("#text .t").count() == length
        tab.locator("#layer").focus()
        for layer in range(LAYERS):
            tab.keyboard.press("ArrowRight")
            shown(tab, layer)
        tab.locator("#text").focus()
        tab.keyboard.press("End")
        assert tab.locator(".t.current").get_attribute("data-index") == str(length - 1)
        assert heard.messages == []


def test_single_heads_are_left_out_of_a_long_page(report: AttentionReport, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrb.analysis import page as module

    assert '"by_head":true' in report.to_html()
    monkeypatch.setattr(module, "_MOST_BY_HEAD", 10)
    short = report.to_html()
    assert '"by_head":false' in short and '"received_by_head":null' in short
