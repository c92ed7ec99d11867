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


def test_values_with_tensors_tell_their_shapes() -> None:
    query, bias = torch.randn(1, 2, 300, 8), torch.zeros(1, 1, 300)
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool)
    table = torch.zeros(2, 40, dtype=torch.int32)
    found = functional.attention(query, query, query, emit=0.01)
    edit = attnrb.Edit(found.outliers, gain=0.5, key_bias=bias)
    outliers = "outliers=Outliers(indices [1, 2, 300, 99], counts [1, 2, 300])"
    shown = {
        repr(found): f"Attended(output=float32 [1, 2, 300, 8], lse=float32 [1, 2, 300], {outliers})",
        repr(edit): f"Edit({outliers}, gain=0.5, rule='none', key_bias=float32 [1, 1, 300])",
        repr(attnrb.Visibility(mask=mask, window=9)): "Visibility(key_offset=0, window=9, mask=bool [1, 1, 300, 300])",
        repr(attnrb.Paging(table, torch.arange(3), torch.arange(2))): (
            "Paging(block_table=int32 [2, 40], query_starts=int64 [3], seq_lens=int64 [2])"
        ),
    }
    for text, expected in shown.items():
        assert text == expected


def test_what_an_observer_keeps_is_short() -> None:
    model, calls = tiny_model(), []
    with attnrb.patch(model, alpha=0.5, observer=calls.append):
        model(torch.arange(5, 45)[None])
    assert repr(calls[-1]).startswith(f"AttentionCall(layer={calls[-1].layer}, query=float32 [1, ")
    assert max(len(repr(call)) for call in calls) < 500


def test_models_texts_and_profiles_are_short() -> None:
    from attnrb.models import LoadedModel
    from attnrb.policies import HeadProfile
    from attnrb.studies.generation import Generation

    loaded = LoadedModel(tiny_model(), tiny_tokenizer())
    assert repr(loaded).startswith("LoadedModel(") and "million parameters, float32 on cpu; " in repr(loaded)
    model, tokenizer = loaded
    assert model is loaded.model and tokenizer is loaded.tokenizer and len(repr(loaded)) < 200
    long = Generation(tuple(range(500)), "a word " * 500, False, 0.1, 10.0)
    assert "500 tokens, cut" in repr(long) and len(repr(long)) < 100
    profile = HeadProfile([[0.1, -0.2], [0.4, 0.3]], keep=2, about={"model": HOSTILE})
    shown = check_fragment(profile._repr_html_())
    assert "<td>1</td><td>0, 1</td><td>+0.4</td>" in shown


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
