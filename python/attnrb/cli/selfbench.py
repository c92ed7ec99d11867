"""A quick bench of re-balanced attention against PyTorch's, on random inputs whose results are checked before timing.

The directory ``bench`` of the source tree holds the thorough one. This one answers in seconds whether an installation
runs as it should.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnrb import functional, reference
from attnrb.ops.edit import Edit
from attnrb.ops.library import instruction_set
from attnrb.ops.outliers import Outliers
from attnrb.ops.visibility import Visibility
from attnrb.policies import LayerView, Mixture, ModelShape, Policy, Request
from attnrb.text.spans import Span, Spans

HEADS, KEY_HEADS, WIDTH = 8, 2, 64
THRESHOLD, GAIN = 0.01, 0.2
DECODE_FACTOR = 16  # keys of the decode case, in lengths of the prefill case
_CHECKED_QUERIES = 64  # the reference is slow and dense; the last queries see the most keys
_SHARPNESS = 3.0  # spread of the scores: enough for a few outliers a row, as in trained models
_SECONDS = 0.5  # of repetitions of each op


class WrongResultError(RuntimeError):
    """An op gave a wrong result here. The message names it and the error."""


@dataclass(frozen=True)
class Row:
    """One op beside PyTorch's attention on the same inputs."""

    name: str
    seconds: float
    """Median time of the op."""
    torch_seconds: float
    """Median time of ``scaled_dot_product_attention``, which re-balances nothing."""
    error: float
    """Largest absolute difference from the float64 reference."""
    torch_error: float
    """That of ``scaled_dot_product_attention`` from plain attention in float64."""

    @property
    def ratio(self) -> float:
        """Time of the op over that of PyTorch: below 1, the op is faster."""
        return self.seconds / self.torch_seconds


@dataclass(frozen=True)
class Report:
    """What `run` measured."""

    setting: str
    outliers_per_row: float
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of every field; each row carries its ratio."""
        rows = [{**asdict(row), "ratio": row.ratio} for row in self.rows]
        return {"setting": self.setting, "outliers_per_row": self.outliers_per_row, "rows": rows}


def run(
    *,
    length: int = 1024,
    dtype: torch.dtype = torch.float32,
    policy: Policy | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Check and time both attention ops in prefill (`length` tokens) and decode (one query, 16 times the keys).

    Args:
        length: tokens of the prefill case.
        dtype: float32, bfloat16 or float16.
        policy: also check and time the attention of a layer that it edits, a quarter of the keys being a span.
        progress: called with a short line before each step.

    Raises:
        WrongResultError: when a result is off by more than twice PyTorch's own error plus one rounding, or when an
            outlier set is wrong by more than entries that rounding may put on either side of the threshold.
    """
    rows: list[Row] = []
    outlier_count = outlier_rows = 0
    for name, queries, keys in (("prefill", length, length), ("decode", 1, length * DECODE_FACTOR)):
        (progress or (lambda _: None))(f"Checking and timing {name}")
        query, key, value = _inputs(queries, keys, dtype)

        def plain(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)

        def source(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> Tensor:
            return functional.source_attention(q, k, v, threshold=THRESHOLD)[0]

        outliers = functional.source_attention(query, key, value, threshold=THRESHOLD)[2]

        def rebalanced(q: Tensor = query, k: Tensor = key, v: Tensor = value, o: Outliers = outliers) -> Tensor:
            return functional.rebalanced_attention(q, k, v, o, GAIN)

        checked = slice(max(0, queries - _CHECKED_QUERIES), queries)
        some = query[:, :, checked]
        some_outliers = Outliers(outliers.indices[:, :, checked], outliers.counts[:, :, checked])
        _check_outliers(name, some, key, some_outliers)
        plain_truth, _, _ = reference.source_attention(some, key, value, threshold=THRESHOLD)
        truth = reference.rebalanced_attention(some, key, value, some_outliers, GAIN)
        torch_error = _error(plain()[:, :, checked], plain_truth)
        torch_seconds = _time(plain)
        cases: list[tuple[str, Callable[[], Tensor], reference.Floats]] = [
            ("finds outliers", source, plain_truth),
            ("re-balances", rebalanced, truth),
        ]
        if policy is not None:
            edit, edited = _edited(policy, query, key, value, outliers)
            cases.append((policy.name, edited, _edited_truth(edit, some, key, value, checked)))
        for op, function, expected in cases:
            error = _error(function()[:, :, checked], expected)
            allowed = 2 * torch_error + torch.finfo(dtype).eps * float(np.abs(expected).max())
            if not error <= allowed:
                raise WrongResultError(
                    f"{name} ({op}): the result is off by {error:.1e}, at most {allowed:.1e} was expected"
                )
            rows.append(Row(f"{name}, {op}", _time(function), torch_seconds, error, torch_error))
        outlier_count += int(outliers.counts.sum())
        outlier_rows += outliers.counts.numel()

    setting = (
        f"{HEADS} heads, {KEY_HEADS} key heads, width {WIDTH}, {str(dtype).removeprefix('torch.')}; "
        f"prefill {length} tokens, decode {length * DECODE_FACTOR} keys; "
        f"{instruction_set()}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    )
    return Report(setting, outlier_count / outlier_rows, rows)


def _edited(
    policy: Policy, query: Tensor, key: Tensor, value: Tensor, outliers: Outliers
) -> tuple[Edit | None, Callable[[], Tensor]]:
    """The edit of the second of two layers, whose first one has these outliers, and the attention that it gives."""
    plan = policy.resolve(ModelShape(layers=2, heads=HEADS))
    session = plan.begin(Request(Spans(((Span(0, max(1, key.shape[2] // 4)),),))))
    for layer in plan.emits:
        session.emitted(layer, outliers)
    visibility = Visibility(query_offset=key.shape[2] - query.shape[2])
    edit = session.edit(LayerView(1, query, key, lambda: {"visibility": visibility})) if 1 in plan.edited else None
    if isinstance(edit, Mixture):
        raise ValueError(f"policy: {policy.label()} is a mixture of several calls, which attnrb bench does not time")
    return edit, lambda: functional.attention(query, key, value, edit=edit).output


def _edited_truth(edit: Edit | None, query: Tensor, key: Tensor, value: Tensor, rows: slice) -> reference.Floats:
    """The reference's output of these rows under an edit."""
    if edit is not None and edit.outliers is not None and edit.outliers[0].shape[2] > 1:
        edit = replace(edit, outliers=Outliers(*(each[:, :, rows] for each in edit.outliers)))
    return reference.attention(query, key, value, edit=edit)[0]


def _inputs(queries: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    query = torch.randn(1, HEADS, queries, WIDTH, generator=generator, **made) * _SHARPNESS
    key = torch.randn(1, KEY_HEADS, keys, WIDTH, generator=generator, **made)
    value = torch.randn(1, KEY_HEADS, keys, WIDTH, generator=generator, **made)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _check_outliers(name: str, query: Tensor, key: Tensor, outliers: Outliers) -> None:
    weights, _ = reference.attention_weights(query, key)
    wanted = reference.outlier_mask(weights, THRESHOLD)
    found = reference.held_mask(*outliers, np.ones_like(wanted))
    # Inputs are exact, so only the op's float32 arithmetic can move an entry across the threshold.
    clear = np.abs(weights - THRESHOLD) > 1e-5
    wrong = int(((wanted != found) & clear).sum())
    if wrong:
        raise WrongResultError(f"{name} (finds outliers): {wrong} entries of the outlier set are wrong")


def _error(result: Tensor, expected: reference.Floats) -> float:
    difference = np.abs(result.double().numpy() - expected)
    return float(difference.max())


def _time(function: Callable[[], Any]) -> float:
    function()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
