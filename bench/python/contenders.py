"""Operands of a case and everyone who runs on them, verified against the float64 reference before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from attnrb import Outliers, Visibility, functional
from attnrb.ops import reference
from bars import OFF, SDPA, SDPA_BEST, Case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

GAIN = 0.1
THRESHOLD = 0.01
OUTLIERS_A_ROW = 10.0


class WrongResultError(RuntimeError):
    """An output is not what it has to be; timing it would mean nothing."""


@dataclass(frozen=True)
class Operands:
    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    visibility: Visibility | None
    outliers: Outliers

    @property
    def outliers_a_row(self) -> float:
        return float(self.outliers.counts.double().mean())


def prepare(case: Case) -> Operands:
    """Random operands, their scores spread so that a row has about ten outliers, as in real text at an early layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, rows: int) -> Tensor:
        return torch.randn(case.batch, heads, rows, case.width, generator=generator)

    query, key, value = (
        normal(case.heads, case.queries),
        normal(case.key_heads, case.keys),
        normal(case.key_heads, case.keys),
    )
    key, value = key.to(case.dtype), value.to(case.dtype)
    visibility = Visibility(key_start=torch.tensor(case.starts())) if case.ragged else None
    best = None
    for spread in (0.5, 0.8, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5):  # scores of this standard deviation
        scaled = (query * spread).to(case.dtype)
        _, _, outliers = functional.source_attention(scaled, key, value, threshold=THRESHOLD, visibility=visibility)
        found = Operands(case, scaled, key, value, visibility, outliers)
        if best is None or abs(found.outliers_a_row - OUTLIERS_A_ROW) < abs(best.outliers_a_row - OUTLIERS_A_ROW):
            best = found
        elif best.outliers_a_row > 1.0:
            break  # past the best
    assert best is not None
    return best


def contenders(operands: Operands) -> dict[str, Callable[[], Tensor]]:
    """By name: attnrb, and each denominator that the case is measured against."""
    case, query, key, value = operands.case, operands.query, operands.key, operands.value
    gain = torch.full((1,), GAIN)
    nothing = Outliers(operands.outliers.indices[..., :0].contiguous(), torch.zeros_like(operands.outliers.counts))

    def source() -> Tensor:
        return functional.source_attention(query, key, value, threshold=THRESHOLD, visibility=operands.visibility)[0]

    def rebalanced(outliers: Outliers) -> Tensor:
        return functional.rebalanced_attention(query, key, value, outliers, gain, visibility=operands.visibility)

    mask = _mask(case)
    causal = mask is None and not case.decode

    def plain() -> Tensor:
        return sdpa(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True)

    def grouped() -> Tensor:
        # A view: head h = key_head * G + g is row g of its key head.
        rows = query.view(case.batch, case.key_heads, case.heads // case.key_heads, case.width)
        return sdpa(rows, key, value, attn_mask=mask).view(query.shape)

    runs: dict[str, Callable[[], Tensor]] = {
        "attnrb": source if case.source else lambda: rebalanced(operands.outliers),
        SDPA: plain,
    }
    wanted = {name for name, _ in case.bars}
    if SDPA_BEST in wanted:
        runs[SDPA_BEST] = grouped
    if OFF in wanted:
        runs[OFF] = lambda: rebalanced(nothing)
    return runs


def plain_read(operands: Operands) -> Callable[[], object]:
    """Reads the keys and values of a case once, in every thread, and writes nothing."""
    halves = [tensor.view(torch.int32) for tensor in (operands.key, operands.value)]
    return lambda: [half.amax() for half in halves]


def _mask(case: Case) -> Tensor | None:
    """A boolean mask where SDPA cannot be told otherwise: padding, and queries that do not begin at the first key."""
    slot = torch.arange(case.keys)
    if case.ragged:
        return (slot >= torch.tensor(case.starts())[:, None])[:, None, None, :]
    if case.queries in (1, case.keys):
        return None
    return slot <= slot[case.keys - case.queries :, None]


def verify(operands: Operands, runs: dict[str, Callable[[], Tensor]], *, rows: int = 24) -> None:
    """Checks every contender on some heads and rows, spread evenly, first and last among them.

    The rule is that of the accuracy tests: relative to the row's magnitude, max_d sum_j A_ij |v_jd|, an error of at
    most twice that of SDPA plus one unit in the last place of the dtype.
    """
    case = operands.case
    heads = np.unique(np.linspace(0, case.heads - 1, 4).round().astype(int))
    picked = np.unique(np.linspace(0, case.queries - 1, rows).round().astype(int))
    query = operands.query[:, heads][:, :, picked]
    groups = case.heads // case.key_heads
    key, value = operands.key[:, heads // groups], operands.value[:, heads // groups]
    slots = np.arange(case.keys)
    seen = slots <= (case.keys - case.queries + picked)[:, None]
    seen = seen & (slots >= np.array(case.starts())[:, None])[:, None, None, :]
    weights, _ = reference.attention_weights(query, key, visibility=seen)
    plain = reference.weighted_values(weights, value, seen)
    magnitude = (weights @ np.abs(value.double().numpy())).max(axis=3, keepdims=True)

    found = Outliers(*(tensor[:, heads][:, :, picked] for tensor in operands.outliers))
    held = reference.held_mask(*found, np.broadcast_to(seen, weights.shape))
    own = slots == (case.keys - case.queries + picked)[:, None]
    margin = max(1e-5, float(torch.finfo(case.dtype).eps) if case.dtype != torch.float32 else 0.0) * THRESHOLD
    far = np.abs(weights - THRESHOLD) > margin
    if ((held != (weights > THRESHOLD) & ~own) & far).any():
        raise WrongResultError(f"{case.name}: the outlier sets differ from the reference")
    boosted = reference.weighted_values(reference.rebalance(weights, held, GAIN), value, seen)

    def error(name: str, expected: reference.Floats) -> float:
        result = runs[name]()[:, heads][:, :, picked].double().numpy()
        return float((np.abs(result - expected) / magnitude).max())

    allowed = 2.0 * error(SDPA, plain) + float(torch.finfo(case.dtype).eps)
    for name in runs:
        if name != SDPA:
            off = error(name, boosted if name == "attnrb" and not case.source else plain)
            if not off <= allowed:  # a NaN fails too
                raise WrongResultError(f"{case.name}: {name} is off by {off:.2e}, allowed are {allowed:.2e}")


def smaller(case: Case) -> Case:
    """The same case at a quarter of the length, for --quick."""
    queries = case.queries if case.queries in (1, 64, 256) else case.queries // 4
    keys = queries if case.queries == case.keys else max(case.keys // 4, queries)
    return replace(case, name=f"{case.name} (quick: n{keys})", queries=queries, keys=keys)
