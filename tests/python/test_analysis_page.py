"""The HTML report: driven in a real browser, and looked through for anything that could get out or in."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import attnrb
import numpy as np
import pytest
from attnrb.analysis import AttentionReport, Detail, TextReport, Token, analyze, expected_attention
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


SETTLED = f"""async () => {{
  const shades = () => ({SHADES})([...document.querySelectorAll('#text .t')]);
  for (let before = null; ; ) {{
    const now = shades();
    if (String(now) === before) return now;
    before = String(now);
    await new Promise((done) => setTimeout(done, 200));
  }}
}}"""
"""The shades of all tokens once none has changed for a while."""
PRINTED = f"""() => new Promise((done) => {{
  const slider = document.getElementById("layer");
  slider.value = Number(slider.value) - 1;
  slider.dispatchEvent(new Event("input", {{ bubbles: true }}));
  requestAnimationFrame(() => {{
    window.dispatchEvent(new Event("beforeprint"));
    done(({SHADES})([...document.querySelectorAll("#text .t")]));
  }});
}})"""
"""The shades of all tokens on paper, where printing begins in the frame of a step to the layer before."""


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
            # Shades are of how many times the expected a token receives, on one scale for all runs.
            shades = tab.eval_on_selector_all("#text .t", SHADES)
            received = [run.received[0][layer].mean(0).astype(float) for run in report.runs]
            times = [each / expected_attention(each) for each in received]
            expected = np.clip(np.log(times[0]) / np.log(np.max(times)), 0, 1)
            np.testing.assert_allclose(shades, expected, atol=0.5 / 40 + 1e-3)
            assert max(shades) > 0.5 and min(shades) == 0
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
        tab.locator("#text .t").nth(3).hover()
        lines = "(name) => getComputedStyle(document.querySelector(name)).textDecorationLine"
        assert tab.evaluate(lines, "#text") == "none"  # rows of single tokens are asked for on a screen alone
        outline = "getComputedStyle(document.querySelector('#text .current')).outlineStyle"
        assert tab.evaluate(outline) == "none"
        document = tab.pdf(format="A4", print_background=True)
        assert document.startswith(b"%PDF") and len(document) > 20_000
        assert heard.messages == []


def test_long_text_stays_usable(chromium: Any, report: AttentionReport, tmp_path: Path) -> None:
    length = 8000
    tokens = tuple(Token(place, f" w{place}" if place % 17 else ".\n", "content") for place in range(length))
    generator = np.random.default_rng(0)
    runs = tuple(
        dataclasses.replace(run, received=(generator.random((LAYERS, report.heads, length), dtype=np.float32),))
        for run in report.runs
    )
    long = dataclasses.replace(report, texts=(TextReport("long", tokens),), runs=runs, rows=())
    page = tmp_path / "long.html"
    long.to_html(page)
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        assert tab.locator("#text .t").count() == length
        tab.locator("#layer").focus()
        for layer in range(LAYERS):
            tab.keyboard.press("ArrowRight")
            shown(tab, layer)
        # What is out of sight follows, as time goes by, or at once where the page is printed.
        last = tab.evaluate(SETTLED)
        printed = tab.evaluate(PRINTED)
        shown(tab, LAYERS - 2)
        assert sum(one != other for one, other in zip(printed, last, strict=True)) > length / 2
        assert tab.evaluate(SETTLED) == printed
        tab.keyboard.press("ArrowRight")
        shown(tab, LAYERS - 1)
        assert tab.evaluate(SETTLED) == last
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


def test_heads_that_are_named_are_in_a_long_page(report: AttentionReport, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrb.analysis import page as module

    monkeypatch.setattr(module, "_MOST_BY_HEAD", 10)
    named = dataclasses.replace(report, detail=Detail(layers=(1,), heads=(0, 2)), rows=()).to_html()
    assert '"by_head":true' in named and '"detail":{"layers":[1],"heads":[0,2]' in named
    assert '<option value="2">' in named and '<option value="3">' not in named


def test_a_click_shows_where_a_token_looks(chromium: Any, page: Path, report: AttentionReport) -> None:
    import torch

    config = attnrb.RebalanceConfig(alpha=0.5)
    keys = analyze(tiny_model(), tiny_tokenizer(), TEXT, compare=config, keep_keys=True).keys[0]
    query, layer, head = 25, 2, 1
    rows = [run.layers[layer].weights(torch.tensor([query]))[head, 0].double().numpy() for run in keys]
    with opened(chromium, page, viewport={"width": 1200, "height": 900}) as (tab, heard):
        ready(tab)
        tab.locator("#layer").fill(str(layer + 1))
        shown(tab, layer)
        tab.select_option("#head", str(head))
        tab.locator("#text .t").nth(query).click()
        tab.wait_for_selector("#query-there:visible")
        assert f"layer {layer}, head {head}" in tab.inner_text("#query-what")
        lines = [line.split("\t") for line in tab.inner_text("#query-keys").split("\n")]
        told = {int(line[1]): line for line in lines if line[1].strip().isdigit()}
        best = int(np.max(rows, axis=0).argmax())
        assert best == int(lines[0][1])
        for key, line in told.items():
            for row, cell in zip(rows, line[2:4], strict=True):
                if cell != "less":
                    assert float(cell.removesuffix(" %")) == pytest.approx(100 * row[key], rel=6e-3, abs=6e-4)
        # The text is shaded by the same weights.
        shades = tab.eval_on_selector_all("#text .t", SHADES)
        assert int(np.argmax(shades)) == int(rows[0].argmax()) or max(shades) == shades[int(rows[0].argmax())]
        assert tab.locator(".t.query").get_attribute("data-index") == str(query)
        # Every head in a picture, which a click on it goes to.
        tab.wait_for_selector("#query-heads .nsewdrag")
        tab.keyboard.press("Escape")
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#query", state="hidden")
        # By keys alone.
        tab.locator("#text").focus()
        tab.keyboard.press("Home")
        tab.keyboard.press("]")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#query-there:visible")
        assert tab.inner_text("#query-place").startswith("token 1 of")
        assert heard.messages == [] and heard.requests == []


def test_tokens_without_a_row_say_so(chromium: Any, report: AttentionReport, tmp_path: Path) -> None:
    few = analyze(tiny_model(), tiny_tokenizer(), TEXT, compare=attnrb.RebalanceConfig(), detail=Detail(megabytes=0.01))
    few.to_html(tmp_path / "few.html")
    assert few.rows[0] is not None
    without = next(place for place in range(40) if place not in few.rows[0].queries)
    with opened(chromium, tmp_path / "few.html") as (tab, heard):
        ready(tab)
        assert tab.locator(".t.has-row").count() == len(few.rows[0].queries)
        tab.locator("#text .t").nth(without).click()
        tab.wait_for_selector("#query-missing:visible")
        assert "--serve" in tab.inner_text("#query-missing")
        assert not tab.is_visible("#query-there")
        assert heard.messages == []


def test_a_served_page_asks_for_rows(chromium: Any) -> None:
    from attnrb.analysis.serve import ReportServer

    config = attnrb.RebalanceConfig(alpha=0.5)
    report = analyze(
        tiny_model(), tiny_tokenizer(), TEXT, compare=config, keep_keys=True, detail=Detail(megabytes=0.01)
    )
    with ReportServer(report) as server:
        context = chromium.new_context()
        tab = context.new_page()
        said: list[str] = []
        tab.on("console", lambda message: message.type in ("warning", "error") and said.append(message.text))
        tab.goto(server.address)
        ready(tab)
        for query in (3, 20):
            tab.locator("#text .t").nth(query).click()
            tab.wait_for_selector("#query-there:visible")
            tab.locator(f"#query-place:text-matches('token {query} of')").wait_for()
            assert tab.locator("#query-keys tr").count() >= 2
        context.close()
    assert said == []


def test_the_tooltip_follows_its_token(chromium: Any, page: Path) -> None:
    with opened(chromium, page, viewport={"width": 1000, "height": 700}) as (tab, heard):
        ready(tab)
        tab.locator("#text").focus()
        tab.keyboard.press("Home")
        tab.keyboard.press("ArrowRight")
        gap = """() => {
            const tip = document.getElementById("tip").getBoundingClientRect();
            const token = document.querySelector(".t.current").getBoundingClientRect();
            return [getComputedStyle(document.getElementById("tip")).visibility, Math.min(
                Math.abs(tip.bottom - token.top), Math.abs(tip.top - token.bottom))];
        }"""
        for distance in (120, -60, 2500):
            tab.mouse.move(5, 5)
            tab.mouse.wheel(0, distance)
            tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            visibility, space = tab.evaluate(gap)
            assert space <= 12 if visibility == "visible" else distance == 2500
        assert visibility == "hidden"
        assert heard.messages == []


def test_pictures_and_data_can_be_saved(chromium: Any, page: Path, report: AttentionReport) -> None:
    with opened(chromium, page, viewport={"width": 1200, "height": 900}) as (tab, heard):
        ready(tab)
        plots, buttons = tab.locator(".plot svg.main-svg").count(), tab.locator(".save button")
        assert buttons.count() >= 2 * 6 and plots >= 6
        first = tab.locator("div:has(> .depth) .save").first
        with tab.expect_download() as told:
            first.get_by_text("data").click()
        lines = Path(told.value.path()).read_text("utf-8").splitlines()
        assert lines[0] == "name,x,y,text,below,above"
        values = {tuple(line.split(",")[:2]): float(line.split(",")[2]) for line in lines[1:]}
        for run in report.runs:
            for layer, value in enumerate(run.layer_means("first_key")):
                assert values[run.label, str(layer)] == pytest.approx(value, rel=1e-5)
        with tab.expect_download() as told:
            first.get_by_text("picture").click()
        assert Path(told.value.path()).read_bytes().startswith(b"\x89PNG")
        with tab.expect_download() as told:
            tab.click("#save-received")
        table = Path(told.value.path()).read_bytes().decode().removesuffix("\r\n").split("\r\n")
        assert len(table) == 1 + (1 + LAYERS) * len(report.texts[0].tokens)
        assert heard.messages == []


def test_changes_are_drawn_where_lines_may_coincide(chromium: Any, page: Path, report: AttentionReport) -> None:
    drawn = """() => [...document.querySelectorAll(".depth")].map((plot) =>
        plot.data.filter((trace) => trace.type === "bar").map((trace) => trace.y))"""
    with opened(chromium, page) as (tab, heard):
        ready(tab)
        bars = tab.evaluate(drawn)
        assert len(bars) == 6 and all(len(each) == 1 for each in bars)
        change = report.after.layer_means("first_key") - report.before.layer_means("first_key")
        np.testing.assert_allclose(bars[0][0], change, rtol=1e-4, atol=1e-6)
        assert tab.locator('.classes[data-run="change"] svg.main-svg').count() >= 1
        assert heard.messages == []


def test_a_long_page_has_rows_of_heads_all_the_same(
    chromium: Any, report: AttentionReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnrb.analysis import page as module

    monkeypatch.setattr(module, "_MOST_BY_HEAD", 10)
    report.to_html(tmp_path / "long.html")
    with opened(chromium, tmp_path / "long.html") as (tab, heard):
        ready(tab)
        tab.locator("#text .t").nth(20).click()
        tab.wait_for_selector("#query-there:visible")
        tab.select_option("#head", "2")
        tab.locator("#query-what:text-matches('head 2')").wait_for()
        tab.locator("#text .t").nth(18).hover()
        assert "received, plain, all heads" in tab.inner_text("#tip")
        tab.locator("#query-back").click()
        tab.locator("#text .t").nth(17).hover()
        assert "received, plain, all heads" in tab.inner_text("#tip")
        assert heard.messages == []
