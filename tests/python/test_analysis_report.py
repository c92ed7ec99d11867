"""The report as a value: what it adds up, what survives JSON, what is refused, and its files."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import attnrb
import numpy as np
import pytest
from attnrb.analysis import METRICS, TOKEN_CLASSES, AttentionReport, Progress, analyze
from attnrb.studies.first_key import first_key_shares
from saved_tiny_model import LAYERS, TEXT, tiny_model, tiny_tokenizer

CONFIG = attnrb.RebalanceConfig(alpha=0.5, threshold=0.02)
TEXTS = [TEXT, "in 1999, the turtle said: no.\n", "a fox & a dog"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def report(model: Any, tokenizer: Any) -> AttentionReport:
    return analyze(model, tokenizer, TEXTS, compare=CONFIG, model_name="tiny")


def test_texts_are_means_over_all_their_queries(model: Any, tokenizer: Any, report: AttentionReport) -> None:
    alone = [analyze(model, tokenizer, text, compare=CONFIG) for text in TEXTS]
    queries = np.array([each.token_count for each in alone], dtype=float)
    assert report.token_count == queries.sum() and report.text_count == 3
    for place, run in enumerate(report.runs):
        for metric in METRICS:
            if metric == "outlier_overlap":
                continue
            weights = queries - 1 if metric == "first_key" else queries
            expected = np.average([each.runs[place].metric(metric) for each in alone], axis=0, weights=weights)
            np.testing.assert_allclose(run.metric(metric), expected, rtol=1e-12, atol=1e-12)
        for text, each in enumerate(alone):
            np.testing.assert_array_equal(run.received[text], each.runs[place].received[0])


def test_first_key_is_that_of_compare(model: Any, tokenizer: Any, report: AttentionReport) -> None:
    import torch

    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    alone = analyze(model, tokenizer, TEXT, compare=CONFIG)
    np.testing.assert_allclose(alone.after.layer_means("first_key"), first_key_shares(model, ids, CONFIG), rtol=1e-5)


def test_classes_add_up(report: AttentionReport) -> None:
    assert sum(report.class_counts.values()) == report.token_count
    for run in report.runs:
        total = np.sum([run.token_class[name] for name in TOKEN_CLASSES], axis=0)
        np.testing.assert_allclose(total, 1.0, rtol=1e-6)
        parts = [run.token_class[name] for name in ("special", "whitespace", "punctuation")]
        np.testing.assert_array_equal(run.non_semantic, np.sum(parts, axis=0))


def test_outlier_tokens_exceed_the_threshold(report: AttentionReport) -> None:
    low = dataclasses.replace(report, z_threshold=1.0)
    for run in low.runs:
        scores = run.z_scores(0)
        for layer, heads in enumerate(low.outlier_tokens(run, 0)):
            for head, positions in enumerate(heads):
                assert positions == [at for at, score in enumerate(scores[layer, head]) if score > 1.0]


def test_layers_up_to_the_source_do_not_change(report: AttentionReport) -> None:
    for metric in METRICS:
        np.testing.assert_array_equal(report.before.metric(metric)[0], report.after.metric(metric)[0])
    assert not np.array_equal(report.before.entropy[1], report.after.entropy[1])


def test_json_gives_the_report_back(report: AttentionReport, tmp_path: Path) -> None:
    document = report.to_json(tmp_path / "report.json")
    for back in (AttentionReport.from_json(document), AttentionReport.from_json(tmp_path / "report.json")):
        assert back.to_json() == document
        assert back.texts == report.texts and back.after.config == CONFIG and back.after.sinks == report.after.sinks
        for run, original in zip(back.runs, report.runs, strict=True):
            for metric in METRICS:
                np.testing.assert_array_equal(run.metric(metric), original.metric(metric))
            for one, other in zip(run.received, original.received, strict=True):
                assert one.dtype == np.float32
                np.testing.assert_array_equal(one, other)


def test_rows_have_every_figure(report: AttentionReport, tmp_path: Path) -> None:
    rows = report.to_rows()
    assert len(rows) == len(report.runs) * len(report.layers) * report.heads
    for row in rows:
        run, place = report.run(row["run"]), report.layers.index(row["layer"])
        for name in METRICS:
            value = run.metric(name)[place, row["head"]]
            assert row[name] == value or (row[name] is None and np.isnan(value))
    report.to_csv(tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [{name: str("" if value is None else value) for name, value in row.items()} for row in rows] == read


def test_json_has_the_names_of_the_field(report: AttentionReport) -> None:
    document = json.loads(report.to_json())
    run = document["runs"][0]
    assert {"entropy", "first_key", "outliers_per_row", "outlier_overlap", "token_class"} <= run.keys()
    assert set(run["token_class"]) == set(TOKEN_CLASSES)
    assert np.array(run["entropy"]).shape == (LAYERS, 4)
    assert run["texts"][0].keys() == {"received", "outlier_tokens"}


@pytest.mark.parametrize(
    "document",
    ["{}", '{"format": "other"}', "{", '{"format": "attnrb attention report 1", "layers": 3}'],
    ids=["empty", "other format", "no JSON", "incomplete"],
)
def test_other_json_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="not a report of attention"):
        AttentionReport.from_json(document)


def test_wrong_shape_is_refused(report: AttentionReport) -> None:
    document = json.loads(report.to_json())
    document["runs"][0]["entropy"].pop()
    with pytest.raises(ValueError, match="shape"):
        AttentionReport.from_json(json.dumps(document))


def test_texts_may_be_a_generator_and_only_some_are_kept(model: Any, tokenizer: Any) -> None:
    seen: list[Progress] = []
    report = analyze(
        model, tokenizer, (text for text in [*TEXTS, "", "x"]), keep_texts=1, progress=seen.append, names=["first"]
    )
    assert report.text_count == 3
    assert [text.name for text in report.texts] == ["first"]
    assert [len(run.received) for run in report.runs] == [1]
    assert any("fewer than two tokens" in note for note in report.notes)
    assert any("first 1 of 3" in note for note in report.notes)
    assert len(seen) == 3 * LAYERS and seen[-1].fraction == 1.0 and seen[0].texts is None


def test_a_bar_says_how_many_texts_there_are(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    analyze(model, tokenizer, TEXTS, progress=True)
    shown = capsys.readouterr().err
    assert "3.00 of 3 texts" in shown and "None" not in shown
    analyze(model, tokenizer, iter(TEXTS), progress=True)
    shown = capsys.readouterr().err
    assert "3.00 texts" in shown and "None" not in shown


def test_baseline_comes_first(model: Any, tokenizer: Any) -> None:
    import torch

    other = tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    report = analyze(model, tokenizer, TEXT, baseline=other, baseline_name="base", compare=CONFIG)
    assert [run.label for run in report.runs] == ["baseline", "model", "rebalanced"]
    assert report.before.model == "base"
    np.testing.assert_array_equal(report.before.entropy, analyze(other, tokenizer, TEXT).before.entropy)
    np.testing.assert_array_equal(report.run("model").entropy, analyze(model, tokenizer, TEXT).before.entropy)


def test_learnt_gains_are_measured(tmp_path: Path) -> None:
    import torch
    from attnrb import LearnedGains

    model, tokenizer = tiny_model(), tiny_tokenizer()
    learned = LearnedGains(model, CONFIG)
    scheduled = analyze(model, tokenizer, TEXT, compare=CONFIG)
    started = analyze(model, tokenizer, TEXT, compare=learned)
    for metric in METRICS:
        np.testing.assert_array_equal(started.after.metric(metric), scheduled.after.metric(metric))
    assert started.after.config == CONFIG and started.threshold == CONFIG.threshold
    assert scheduled.after.gains is None and started.before.gains is None
    with torch.no_grad():
        learned.gains[0, 1] = 2.0
    moved = analyze(model, tokenizer, TEXT, compare=learned)
    assert not np.array_equal(moved.after.entropy, started.after.entropy)
    assert moved.after.gains is not None
    np.testing.assert_array_equal(moved.after.gains, learned.matrix().numpy())
    again = AttentionReport.from_json(moved.to_json())
    np.testing.assert_array_equal(again.after.gains, moved.after.gains)
    older = json.loads(moved.to_json())
    for run in older["runs"]:
        del run["gains"]
    assert AttentionReport.from_json(json.dumps(older)).after.gains is None
    assert learned.gains.requires_grad
    if importlib.util.find_spec("plotly"):
        assert "learnt, 0.00 to 2.00" in moved.to_html()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/cache/attnrb/SmolLM2-135M-Instruct.Q4_1-c828652dd4acaefc", "SmolLM2-135M-Instruct"),
        ("/models/mine.Q8_0-0123456789abcdef", "mine.Q8_0"),
        ("/models/llama-7b", "llama-7b"),
        ("owner/name", "owner/name"),
    ],
)
def test_a_model_is_named_by_its_file(tokenizer: Any, path: str, expected: str) -> None:
    model = tiny_model()
    model.config._name_or_path = path
    assert analyze(model, tokenizer, "a fox").before.model == expected


def test_model_is_left_as_it_was(tokenizer: Any) -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    analyze(model, tokenizer, TEXT)
    assert [module.training for module in model.modules()] == modes
    with attnrb.patch(model):
        pass


def test_long_text_is_cut_and_said_so(model: Any, tokenizer: Any) -> None:
    report = analyze(model, tokenizer, TEXT, max_tokens=7)
    assert report.token_count == 7
    assert "cut after 7 of" in report.notes[0]


def test_text_beyond_the_context_is_noted(model: Any, tokenizer: Any) -> None:
    assert "more than the 128" in analyze(model, tokenizer, TEXT * 8).notes[0]


def test_learnt_positions_cannot_be_exceeded() -> None:
    from tiny_models import tiny

    with pytest.raises(ValueError, match="max_tokens"):
        analyze(tiny("gpt2"), _Numbers(), "5 " * 300)


class _Numbers:
    """A tokenizer of numbers."""

    all_special_ids = ()
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {id_}" for id_ in ids)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": []}, ValueError, "texts: expected at least one"),
        ({"texts": ["", "  "[:1]]}, ValueError, "fewer than two tokens"),
        ({"texts": [3]}, TypeError, "texts: expected strings, got int"),
        ({"z_threshold": 0}, ValueError, "z_threshold"),
        ({"max_tokens": 1}, ValueError, "max_tokens"),
        ({"compare": {"alpha": 1}}, TypeError, "compare: expected an attnrb.Policy or None"),
        ({"compare": CONFIG, "threshold": 0.5}, ValueError, "threshold: 0.5 differs"),
        ({"threshold": 2.0}, ValueError, "threshold"),
        ({"source_layer": 9}, ValueError, "source_layer"),
        ({"chat": True}, ValueError, "chat template"),
    ],
)
def test_bad_arguments(model: Any, tokenizer: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        analyze(model, tokenizer, **{"texts": TEXT, **options})


def test_baseline_of_another_shape(model: Any, tokenizer: Any) -> None:
    from tiny_models import tiny

    with pytest.raises(ValueError, match="baseline: expected as many layers"):
        analyze(model, _Numbers(), "5 6 7", baseline=tiny("llama"))


@pytest.mark.slow
def test_plots(report: AttentionReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = report.save_plots(tmp_path / "plots")
    assert {path.name for path in paths} >= {"depth.png", "token_classes.png", "heads_first_key.png", "received_1.png"}
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = report.plot_depth(["entropy"]).axes[0].get_lines()
    for line, run in zip(lines, report.runs, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), run.layer_means("entropy"))
    image = report.plot_heads("first_key").axes[1].get_images()[0]
    np.testing.assert_array_equal(image.get_array(), report.after.first_key)
    with pytest.raises(ValueError, match="metric"):
        report.plot_heads("nonsense")
    with pytest.raises(ValueError, match="text"):
        report.plot_received(9)


def test_a_failed_write_leaves_the_old_file(report: AttentionReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with mock.patch("os.replace", side_effect=OSError(28, "full")), pytest.raises(OSError, match="full"):
        report.to_json(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
