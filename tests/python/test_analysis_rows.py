"""Rows of single queries: against dense weights in float64, as they are packed, and as a server gives them out."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import attnrb
import numpy as np
import pytest
import torch
from attnrb import RebalanceConfig
from attnrb.analysis import AttentionReport, Detail, analyze
from attnrb.analysis.rows import LARGEST, RunKeys, spread
from dense_oracle import DenseOracle
from saved_tiny_model import LAYERS, TEXT, tiny_model, tiny_tokenizer
from test_analysis_measures import _Tokenizer as Numbers
from tiny_models import LAYERS as TINY_LAYERS
from tiny_models import tiny, tokens

LENGTH = 19
TOLERANCE = 1e-5  # what the project promises in float32
CONFIGS = {
    "plain": RebalanceConfig(alpha=0.0),
    "default": RebalanceConfig(alpha=0.5),
    "normalize": RebalanceConfig(alpha=0.5, normalize=True),
    "boost_all": RebalanceConfig(alpha=0.5, boost_all=True),
    "heads": RebalanceConfig(gains=[0, 0.3, -0.2, 2.0, 0.1], heads=[1, 3], threshold=0.035, source_layer=2),
}


def dense_weights(model: Any, ids: torch.Tensor, config: RebalanceConfig) -> list[np.ndarray]:
    heads = model.config.num_attention_heads
    gains = [each or (0.0,) * heads for each in config.layer_gains(TINY_LAYERS, heads)]
    oracle = DenseOracle(
        gains,
        threshold=config.threshold,
        source_layer=config.source_layer,
        normalize=config.normalize,
        boost_all=config.boost_all,
        keep_weights=True,
    )
    with torch.inference_mode(), oracle.attached(model):
        model(ids, use_cache=False)
    return [oracle.weights[layer][0].numpy() for layer in sorted(oracle.weights)]


@pytest.mark.parametrize(
    ("name", "config"),
    [("llama", each) for each in CONFIGS]
    + [(name, "default") for name in ("mistral", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "llama4_text")]
    + [("gemma2", "heads"), ("gpt_oss", "normalize")],
)
def test_rows_are_those_of_the_weights(name: str, config: str) -> None:
    ids, applied = tokens(1, LENGTH, seed=5), CONFIGS[config]
    model, exact = tiny(name), tiny(name, torch.float64)
    exact.config._experts_implementation = "eager"  # grouped products of experts know no float64
    text = " ".join(map(str, ids[0].tolist()))
    report = analyze(model, Numbers(), text, compare=applied, keep_keys=True)
    truth, own = (dense_weights(each, ids, applied) for each in (exact, model))
    for place, kept in enumerate(report.keys[0][-1].layers):
        allowed = TOLERANCE + 2 * np.abs(own[place] - truth[place]).max()
        together = kept.weights(torch.tensor([0, 3, 4, LENGTH - 1])).numpy()
        np.testing.assert_allclose(together, truth[place][:, [0, 3, 4, LENGTH - 1]], rtol=allowed, atol=allowed)
        for query in (0, 7, LENGTH - 1):  # one alone takes another way
            alone = kept.weights(torch.tensor([query])).numpy()
            np.testing.assert_allclose(alone, truth[place][:, [query]], rtol=allowed, atol=allowed)


@pytest.fixture(scope="module")
def report() -> AttentionReport:
    config = RebalanceConfig(alpha=0.5, threshold=0.02)
    return analyze(tiny_model(), tiny_tokenizer(), [TEXT, TEXT[:40]], compare=config, keep_keys=True)


def unpacked(packed: np.ndarray) -> tuple[int, float, list[tuple[int, bool, float]]]:
    """How many outliers a row has, its sum, and its largest weights: key, whether it is an outlier, weight."""
    halves = packed[:, 1].copy().view(np.float16).astype(float)
    keys = packed[:, 0].astype(int)
    entries = [
        (key & 0x7FFF, key > 0x7FFF, weight) for key, weight in zip(keys[1:], halves[1:], strict=True) if weight > 0
    ]
    return int(keys[0]), float(halves[0]), entries


def test_packed_rows_have_the_largest_weights(report: AttentionReport) -> None:
    kept = report.keys[0][1]
    queries = [0, 5, kept.length - 1]
    layers, heads = [1, 2], [0, 3]
    packed = kept.pack(queries, layers, heads)
    assert packed.shape == (3, 1 + len(layers), 1 + len(heads), 1 + LARGEST, 2)
    weights = np.stack([each.weights(torch.tensor(queries)).numpy() for each in kept.layers])  # [L, H, queries, n]
    assert kept.source is not None
    source = set(zip(*(each.tolist() for each in kept.source), strict=True))
    for place, query in enumerate(queries):
        for row, layer in enumerate([None, *layers]):
            of_layer = weights.mean(0) if layer is None else weights[layer]
            for slot, head in enumerate([None, *heads]):
                expected = (of_layer.mean(0) if head is None else of_layer[head])[place]
                mine = {key for h, q, key in source if q == query and (head is None or h == head)}
                count, total, entries = unpacked(packed[place, row, slot])
                assert count == len(mine)
                assert total == pytest.approx(expected.sum(), rel=1e-3)
                order = np.sort(expected)[::-1][: min(LARGEST, len(expected))]
                found = np.zeros(len(order))
                found[: len(entries)] = [each[2] for each in entries]
                np.testing.assert_allclose(found, order, rtol=1e-3, atol=1e-7)  # half precision
                for key, is_outlier, weight in entries:
                    assert weight == pytest.approx(expected[key], rel=1e-3, abs=1e-7)
                    assert is_outlier == (key in mine)


def test_a_report_keeps_the_rows_that_fit(report: AttentionReport) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    length = len(report.texts[0].tokens)
    small = analyze(model, tokenizer, TEXT, compare=RebalanceConfig(alpha=0.5), detail=Detail(megabytes=0.02))
    (rows,) = small.rows
    assert rows is not None and 1 <= len(rows.queries) < length
    assert rows.queries[-1] == length - 1 and list(rows.queries) == sorted(set(rows.queries))
    size = sum(each.nbytes for each in rows.runs) * 4 / 3
    assert size <= 20_000 < size * (len(rows.queries) + 1) / len(rows.queries)
    for run, each in zip(report.keys[0], report.rows[0].runs, strict=True):
        np.testing.assert_array_equal(run.pack(report.rows[0].queries, range(LAYERS), range(4)), each)
    one = analyze(model, tokenizer, TEXT, detail=Detail(layers=(2,), heads=(1, 3)))
    assert one.rows[0] is not None
    assert (one.rows[0].layers, one.rows[0].heads, one.rows[0].runs[0].shape[1:3]) == ((2,), (1, 3), (2, 3))
    assert analyze(model, tokenizer, TEXT, detail=Detail(megabytes=0)).rows == (None,)
    assert AttentionReport.from_json(report.to_json()).rows == ()


def test_rows_of_both_ways_of_collecting_are_alike(report: AttentionReport) -> None:
    config = RebalanceConfig(alpha=0.5, threshold=0.02)
    light = analyze(tiny_model(), tiny_tokenizer(), [TEXT, TEXT[:40]], compare=config)
    assert light.keys == ()
    for rows, others in zip(light.rows, report.rows, strict=True):
        assert rows is not None and others is not None and rows.queries == others.queries
        for one, other in zip(rows.runs, others.runs, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("length", "count"), [(1, 256), (256, 256), (1000, 256), (9999, 256)])
def test_candidates_are_spread_and_have_the_last(length: int, count: int) -> None:
    positions = spread(length, count).tolist()
    assert positions == sorted(set(positions)) and positions[-1] == length - 1 and len(positions) <= count
    assert max(np.diff([-1, *positions])) <= -(-length // count) + 1


@pytest.mark.parametrize(
    "options", [{"layers": (-1,)}, {"heads": ()}, {"megabytes": -1.0}, {"megabytes": float("nan")}]
)
def test_detail_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Detail(**options)


@pytest.mark.parametrize("options", [{"layers": (LAYERS,)}, {"heads": (0, 99)}])
def test_layers_and_heads_that_are_not_there(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected numbers from 0 to"):
        analyze(tiny_model(), tiny_tokenizer(), TEXT, detail=Detail(**options))


def test_sinks_of_a_policy_are_in_the_rows() -> None:
    """A bias on the first key, which the measures of a layer would have to know, is in its rows."""
    kept = RunKeys(12, range(12))
    model = tiny_model()
    with (
        attnrb.patch(model, attnrb.SinkDamping(strength=1.0, first_key=0.25), observer=kept.add),
        torch.inference_mode(),
    ):
        model(torch.arange(2, 14)[None], use_cache=False)
    plain = RunKeys(12, range(12))
    with attnrb.patch(model, RebalanceConfig(alpha=0.0), observer=plain.add), torch.inference_mode():
        model(torch.arange(2, 14)[None], use_cache=False)
    first, before = (each.layers[0].weights(torch.arange(12)).double() for each in (kept, plain))
    scaled = before.clone()
    scaled[..., 0] *= 0.25
    torch.testing.assert_close(first, scaled / scaled.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(report: AttentionReport) -> Iterator[Any]:
    pytest.importorskip("plotly")
    from attnrb.analysis.serve import ReportServer

    with ReportServer(report) as running:
        yield running


def ask(server: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_the_server_gives_its_page_and_rows(server: Any, report: AttentionReport) -> None:
    status, body, headers = ask(server, "/")
    assert status == 200 and body.startswith(b"<!DOCTYPE html>") and b"connect-src 'self'" in body
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Frame-Options"] == "DENY"
    status, body, _ = ask(server, "/row?text=1&query=3")
    assert status == 200
    for packed, kept in zip(json.loads(body)["runs"], report.keys[1], strict=True):
        found = np.frombuffer(base64.b64decode(packed), dtype="<u2")
        np.testing.assert_array_equal(found, kept.pack([3], range(LAYERS), range(4)).ravel())
    assert server._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/row", 400),
        ("/row?text=0", 400),
        ("/row?text=0&query=-1", 400),
        ("/row?text=0&query=1.5", 400),
        ("/row?text=0&query=1&x=1", 400),
        ("/row?text=0&query=" + "9" * 4000, 400),
        ("/row?text=9&query=0", 404),
        ("/row?text=0&query=99999", 404),
        ("/../etc/passwd", 404),
        ("/?x", 404),
        ("//row", 400),
    ],
)
def test_the_server_refuses_what_is_not_there(server: Any, path: str, status: int) -> None:
    assert ask(server, path)[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.invalid"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Host": ""},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_the_server_answers_its_own_page_alone(server: Any, headers: dict[str, str]) -> None:
    for path in ("/", "/row?text=0&query=1"):
        status, body, _ = ask(server, path, **headers)
        assert status == 403 and b"alone" in body


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS", "HEAD"])
def test_the_server_knows_get_alone(server: Any, method: str) -> None:
    assert ask(server, "/", method)[0] == 501


def test_a_report_without_keys_is_not_served(report: AttentionReport) -> None:
    pytest.importorskip("plotly")
    from attnrb.analysis.serve import ReportServer

    with pytest.raises(ValueError, match="keep_keys"):
        ReportServer(replace(report, keys=()))


# ------------------------------------------------------------------------------------------- policies of other kinds


@pytest.mark.parametrize(
    "policy",
    [
        attnrb.SinkDamping(strength=1.0, first_key=0.25),
        attnrb.SinkDamping(strength=0.3, threshold=0.05),
        attnrb.Compose(attnrb.SinkDamping(strength=1.0, first_key=0.5), RebalanceConfig(alpha=0.5)),
    ],
    ids=["first key", "sinks", "composed"],
)
def test_other_policies_are_measured_from_their_weights(policy: attnrb.Policy) -> None:
    """Every measure, from the weights that a patched model returns itself."""
    from attnrb.analysis import TOKEN_CLASSES
    from dense_analysis import dense_measures

    model, tokenizer = tiny_model(), tiny_tokenizer()
    report = analyze(model, tokenizer, TEXT, compare=policy)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with attnrb.patch(model, policy), torch.inference_mode():
        returned = model(ids, use_cache=False, output_attentions=True).attentions
    weights = {layer: each[0].double().numpy() for layer, each in enumerate(returned)}
    n = ids.shape[1]
    lower = np.tril(np.ones((n, n), dtype=bool))
    outliers = {layer: (each > 0.01) & ~np.eye(n, dtype=bool) for layer, each in weights.items()}
    classes = [token.token_class for token in report.texts[0].tokens]
    truth = dense_measures(weights, outliers, dict.fromkeys(weights, lower), classes, 0)
    run = report.after
    for name in ("entropy", "first_key", "mean_distance", "outliers_per_row"):
        np.testing.assert_allclose(getattr(run, name), truth[name], rtol=2e-5, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(run.received[0], truth["received"], rtol=2e-5, atol=2e-5)
    for name in TOKEN_CLASSES:
        np.testing.assert_allclose(run.token_class[name], truth[name], rtol=2e-5, atol=2e-5, err_msg=name)
    assert not np.allclose(run.first_key, report.before.first_key, atol=1e-3)
