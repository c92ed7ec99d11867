"""Operands on a device and everyone who runs on them, verified against float64 before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from attnrb import Outliers, functional
from contenders import GAIN, OUTLIERS_A_ROW, THRESHOLD, WrongResultError
from gpu_cases import HEADS, KEY_HEADS, WIDTH, Case
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

ATTNRB, SDPA, FLEX, EAGER = "attnrb", "sdpa", "flex", "eager"
GROUP = HEADS // KEY_HEADS
VERIFIED = 512  # tokens of the sequence on which gradients are verified


@dataclass(frozen=True)
class Operands:
    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor | None  # of the output, in training
    outliers: Outliers

    @property
    def outliers_a_row(self) -> float:
        return float(self.outliers.counts.double().mean())


def prepare(case: Case, device: torch.device) -> Operands:
    """Random operands, their scores spread so that a late row has about ten outliers, as in real text."""
    torch.manual_seed(0)

    def normal(heads: int, rows: int) -> Tensor:
        return torch.randn(case.batch, heads, rows, WIDTH, device=device, dtype=torch.bfloat16)

    query, key, value = normal(HEADS, case.queries), normal(KEY_HEADS, case.keys), normal(KEY_HEADS, case.keys)
    late = query[:, :, -64:]

    def distance(spread: float) -> float:
        found = functional.source_attention(late * spread, key, value, threshold=THRESHOLD)[2]
        return abs(float(found.counts.double().mean()) - OUTLIERS_A_ROW)

    query = query * min((1.0, 1.3, 1.6, 2.0, 2.4, 2.8, 3.2), key=distance)
    outliers = functional.source_attention(query, key, value, threshold=THRESHOLD)[2]
    upstream = normal(HEADS, case.queries) if case.kind == "training" else None
    if upstream is not None:
        for leaf in (query, key, value):
            leaf.requires_grad_()
    return Operands(case, query, key, value, upstream, outliers)


def contenders(operands: Operands) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes the run: masks are built there, outside the time, and may not fit."""
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {ATTNRB: lambda: _attnrb(operands)}
    makers[SDPA] = lambda: _sdpa(operands)
    if operands.case.kind != "source":  # it emits no outliers
        makers[FLEX] = lambda: _flex(operands)
    makers[EAGER] = lambda: _eager(operands)
    if operands.upstream is None:
        return dict(makers)
    return {name: partial(_with_backward, operands, make) for name, make in makers.items()}


def _with_backward(operands: Operands, make: Callable[[], Callable[[], Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
    forward, leaves = make(), (operands.query, operands.key, operands.value)
    return lambda: torch.autograd.grad(forward(), leaves, operands.upstream)


def _attnrb(operands: Operands) -> Callable[[], Tensor]:
    query, key, value, outliers = operands.query, operands.key, operands.value, operands.outliers
    if operands.case.kind == "source":
        return lambda: functional.source_attention(query, key, value, threshold=THRESHOLD)[0]
    gain = torch.full((1,), GAIN, device=query.device)
    return lambda: functional.rebalanced_attention(query, key, value, outliers, gain)


def _sdpa(operands: Operands) -> Callable[[], Tensor]:
    query, key, value, causal = operands.query, operands.key, operands.value, operands.case.queries > 1
    return lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def _flex(operands: Operands) -> Callable[[], Tensor]:
    """One bit a pair says whether it is an outlier. FlexAttention's rows always sum to 1: it is normalize=True."""
    bits, more = packed_bits(operands.outliers, operands.case.keys), math.log1p(GAIN)

    def strengthened(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + more * ((bits[b, h, i, j // 32] >> (j % 32)) & 1)

    query, key, value, n = operands.query, operands.key, operands.value, operands.case.keys
    block_mask = None
    if operands.case.queries > 1:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=query.device)
    torch._dynamo.reset()  # each shape is compiled by itself, and no more than eight are kept
    # On a CPU this is a trial of the program: there is nothing to compile for.
    run: Any = torch.compile(flex_attention, dynamic=False) if query.is_cuda else flex_attention
    return lambda: run(query, key, value, score_mod=strengthened, block_mask=block_mask, enable_gqa=True)


def _eager(operands: Operands) -> Callable[[], Tensor]:
    """The published way: weights in memory, times a dense mask; the source layer compares them with the threshold."""
    query, key, value, case = operands.query, operands.key, operands.value, operands.case
    slot = torch.arange(case.keys, device=query.device)
    hidden = slot > slot[case.keys - case.queries :, None]
    held = None if case.kind == "source" else held_mask(operands.outliers, case.keys)

    def run() -> Tensor:
        keys, values = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
        scores = (query @ keys.transpose(2, 3)) / math.sqrt(WIDTH)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
        if held is None:
            _ = weights > THRESHOLD
        else:
            weights = torch.where(held, weights * (1.0 + GAIN), weights)
        return weights @ values

    return run


def packed_bits(outliers: Outliers, keys: int) -> Tensor:
    """int32 [B, H, M, keys / 32 rounded up]: bit j % 32 of word j // 32 says whether key j is an outlier of the row."""
    indices, counts = outliers
    bits = indices.new_zeros(*indices.shape[:3], -(-keys // 32))
    for c in range(indices.shape[3]):  # a column at a time: no table of 64-bit indices
        slots = indices[..., c : c + 1].long()
        bit = torch.where(c < counts[..., None], torch.ones_like(slots) << (slots % 32), 0)
        bit = torch.where(bit >= 2**31, bit - 2**32, bit)  # the sign of a word is its last bit
        bits.scatter_add_(3, slots.clamp(min=0) // 32, bit.to(bits.dtype))
    return bits


def held_mask(outliers: Outliers, keys: int) -> Tensor:
    """The same as bool [B, H, M, keys]: a byte a pair."""
    indices, counts = outliers
    held = torch.zeros(*indices.shape[:3], keys, dtype=torch.bool, device=indices.device)
    for c in range(indices.shape[3]):
        slots = indices[..., c : c + 1].long().clamp(min=0)
        held.scatter_(3, slots, held.gather(3, slots) | (c < counts[..., None]))
    return held


# ---------------------------------------------------------------------------------------------------- verification


def verify(operands: Operands, runs: dict[str, Callable[[], Any]]) -> None:
    """Raises WrongResultError unless every output is right: some batch elements, heads and rows, ends among them.

    The rule is that of the accuracy tests: relative to the row's magnitude, max_d sum_j A_ij |v_jd|, an error of at
    most twice that of SDPA plus one unit in the last place. Gradients: the same, relative to their norms. The eager way
    rounds each score twice before its exponential, which moves a weight by as many units as the largest score has.
    """
    case = operands.case
    batches, heads = _spread(case.batch, 2), _spread(HEADS, 4)
    rows = _spread(case.queries, 24)

    def part(tensor: Tensor, these: Tensor) -> Tensor:
        return tensor[batches][:, these]

    query = part(operands.query, heads)[:, :, rows].double()
    key, value = (part(each, heads // GROUP).double() for each in (operands.key, operands.value))
    slot = torch.arange(case.keys, device=query.device)
    own = slot == (case.keys - case.queries + rows.to(query.device))[:, None]
    seen = slot <= (case.keys - case.queries + rows.to(query.device))[:, None]
    scores = (query @ key.transpose(2, 3)) / math.sqrt(WIDTH)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    magnitude = (weights @ value.abs()).amax(3, keepdim=True)

    held = held_mask(Outliers(*(part(each, heads)[:, :, rows] for each in operands.outliers)), case.keys)
    far = (weights - THRESHOLD).abs() > THRESHOLD * torch.finfo(torch.bfloat16).eps
    if bool(((held != ((weights > THRESHOLD) & ~own)) & far).any()):
        raise WrongResultError(f"{case.name}: the outlier sets differ from those of float64")
    boosted = torch.where(held, weights * (1.0 + GAIN), weights)
    plain = weights @ value
    strengthened = plain if case.kind == "source" else boosted @ value
    truth = {ATTNRB: strengthened, SDPA: plain, EAGER: strengthened}
    truth[FLEX] = (boosted / boosted.sum(-1, keepdim=True)) @ value

    def error(name: str) -> float:
        result = part(runs[name](), heads)[:, :, rows].double()
        return float(((result - truth[name]).abs() / magnitude).max())

    _compare(case, {name: error(name) for name in runs}, float(scores.abs().max()))


def verify_gradients(case: Case, device: torch.device, names: list[str]) -> None:
    """The same for gradients, of a sequence short enough for dense autograd in float64."""
    short = prepare(replace(case, keys=min(case.keys, VERIFIED)), device)
    assert short.upstream is not None
    makers = contenders(short)
    held = held_mask(short.outliers, short.case.keys)
    leaves = [each.detach().double().requires_grad_() for each in (short.query, short.key, short.value)]
    keys, values = (each.repeat_interleave(GROUP, 1) for each in leaves[1:])
    scores = (leaves[0] @ keys.transpose(2, 3)) / math.sqrt(WIDTH)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=device).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    boosted = torch.where(held, weights * (1.0 + GAIN), weights)
    outputs = {ATTNRB: boosted, SDPA: weights, EAGER: boosted, FLEX: boosted / boosted.sum(-1, keepdim=True)}
    errors = {}
    for name in names:
        upstream = short.upstream.double()
        truth = torch.autograd.grad(outputs[name] @ values, leaves, upstream, retain_graph=True)
        found = makers[name]()()
        errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    _compare(short.case, errors, float(scores.detach().abs().max()))


def _compare(case: Case, errors: dict[str, float], largest_score: float) -> None:
    unit = float(torch.finfo(torch.bfloat16).eps)
    allowed = dict.fromkeys(errors, 2.0 * errors[SDPA] + unit)
    allowed[SDPA] = 4.0 * unit  # nobody's error but its own: probabilities and output rounded
    allowed[EAGER] = 2.0 * errors[SDPA] + unit * (1.0 + largest_score)
    for name, off in errors.items():
        if not off <= allowed[name]:  # a NaN fails too
            raise WrongResultError(f"{case.name}: {name} is off by {off:.2e}, allowed are {allowed[name]:.2e}")


def _spread(count: int, wanted: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()
