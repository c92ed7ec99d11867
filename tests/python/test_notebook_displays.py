"""What a cell of a notebook may end in: short as text, harmless as HTML, and figures that show by themselves."""

from __future__ import annotations

import re
from typing import Any

import attnrb
import pytest
import torch
from attnrb import functional
from attnrb.analysis import AttentionReport, analyze
from attnrb.studies.compare import compare
from browser import Elements
from saved_tiny_model import TEXT, tiny_model, tiny_tokenizer

ALLOWED = {"div", "style", "h4", "p", "table", "thead", "tbody", "tr", "th", "td", "span"}
HOSTILE = "</style></div><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def report() -> AttentionReport:
    config = attnrb.RebalanceConfig(alpha=0.5)
    return analyze(tiny_model(), tiny_tokenizer(), [HOSTILE, TEXT * 2], compare=config, model_name=HOSTILE)


def check_fragment(shown: str) -> str:
    """A piece of HTML changes nothing around it, runs nothing and loads nothing; its text."""
    parser = Elements()
    parser.feed(shown)
    assert parser.found[0] == ("div", {"class": "attnrb-fragment"})
    assert {tag for tag, _ in parser.found} <= ALLOWED
    for _, attributes in parser.found:
        assert attributes.keys() <= {"class", "style"}
    rules = re.findall(r"([^{}]+)\{", re.search(r"<style>(.*?)</style>", shown, re.DOTALL)[1])  # type: ignore[index]
    selectors = [each.strip() for rule in rules for each in rule.split(",")]
    assert selectors and all(each.startswith(".attnrb-fragment") for each in selectors)
    assert len(shown) < 60_000 and "plotly" not in shown.lower()
    return shown


def test_reports_are_short(report: AttentionReport) -> None:
    for value in (report, report.after, report.texts[0], report.texts):
        assert len(repr(value)) < 600, type(value)
    assert "plain, rebalanced" in repr(report) and "2 texts" in repr(report)


def test_a_report_shows_itself(report: AttentionReport) -> None:
    shown = check_fragment(report._repr_html_())
    assert "&lt;script&gt;" in shown and "First-key share" in shown


def test_a_comparison_shows_itself() -> None:
    found = compare(tiny_model(), tiny_tokenizer(), "the quick", attnrb.RebalanceConfig(), max_new_tokens=3)
    assert len(repr(found)) < 400
    check_fragment(found._repr_html_())


def test_outliers_are_told_by_their_shape() -> None:
    query = torch.randn(1, 2, 9, 8)
    found = functional.attention(query, query, query, emit=0.01).outliers
    assert repr(found) == "Outliers(indices [1, 2, 9, 9], counts [1, 2, 9])"
    indices, counts = found
    assert torch.equal(found.indices, indices) and torch.equal(found.counts, counts)


def test_a_patch_names_what_was_learnt() -> None:
    from attnrb import LearnedGains

    model = tiny_model()
    with attnrb.patch(model, LearnedGains(model, attnrb.RebalanceConfig())) as patched:
        assert "LearnedGains" in repr(patched) and len(repr(patched)) < 600


def test_figures_show_without_magic(report: AttentionReport) -> None:
    pytest.importorskip("matplotlib")
    for figure in (report.plot_depth(["entropy"]), report.plot_heads(), report.plot_token_classes()):
        data: Any = figure._repr_png_()  # type: ignore[attr-defined]
        assert data.startswith(b"\x89PNG\r\n\x1a\n")


def test_runs_of_a_figure_share_a_scale_and_show_their_change(report: AttentionReport) -> None:
    pytest.importorskip("matplotlib")
    heads = report.plot_heads("first_key")
    images = [axis.get_images()[0] for axis in heads.axes if axis.get_images()]
    assert len(images) == 3 and images[0].get_clim() == images[1].get_clim()
    low, high = images[2].get_clim()
    assert low == -high
    change = report.after.first_key - report.before.first_key
    assert abs(images[2].get_array() - change).max() < 1e-12
    received = report.plot_received(1)
    images = [axis.get_images()[0] for axis in received.axes if axis.get_images()]
    assert len(images) == 3 and images[0].get_clim() == images[1].get_clim()
    depth = report.plot_depth(["entropy"])
    drawn = [axis for axis in depth.axes if axis.patches]
    assert len(drawn) == 1 and len(drawn[0].patches) == len(report.layers)
