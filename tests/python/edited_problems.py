"""Edited attention drawn at random over every option, and dense PyTorch that computes it as models write attention.

It shares no formula with attnrb: what a query sees, and which keys an outlier list names, come from the NumPy
reference; scores, softmax, rules and gradients are spelled out here. In float64 its autograd is the truth for gradients
(the NumPy reference is for what the forward returns); in lower dtypes it earns the tolerance.

Note: [Earned tolerance of edits]
As in Note: [Earned tolerance] and Note: [Earned tolerance of gradients]. With m the weight of a row's outliers, r that
of everything else and g the gain, a rule multiplies the weights of other keys by a and those of outliers by a + b. What
their roundings scale with is

    none   A = 1               B = |g|
    row    A = k / z           B = k |g| / z         with z = r + (1+g) m and k = (1 + |g| m) / z
    rest   A = 1 + |g| m / r   B = |1+g| + A

since a = 1 - g m / r is a difference, and z may be one. The magnitudes of the two notes hold with A + [j in S] B in the
place of the factors, with |dp_ij| = sum_d |dy_id v_jd|, since dp is a sum that may cancel, and with the gradient of a
weight

    |dA_ij| = A |dp_ij| + [j in S] (B |dp_ij| + C_i),    C_i = |a'| sum_j P_ij |dp_ij| + |b'| sum_{j in S} P_ij |dp_ij|.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from attnrb import Edit, Outliers, Visibility, reference
from cases import LAYOUTS
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("none", "row", "rest")
SIZES = ((1, 40), (1, 200), (2, 33), (7, 90), (33, 33), (60, 60), (96, 97), (130, 200), (50, 20))


@dataclass
class EditedProblem:
    """One call of `functional.attention`, and what its results are weighed with for gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]  # visibility, scale, softcap, sinks
    rule: str = "none"
    outliers: Outliers | None = None
    gain: Tensor | None = None
    key_bias: Tensor | None = None
    first_query: int | Tensor | None = None
    emit: float | None = None
    upstream: Tensor = field(default_factory=lambda: torch.empty(0))
    upstream_lse: Tensor | None = None

    def edit(self, leaves: dict[str, Tensor] | None = None) -> Edit | None:
        """The edit, with these leaves in the place of its tensors."""
        gain, bias = ((leaves or {}).get(name, getattr(self, name)) for name in ("gain", "key_bias"))
        if gain is None and bias is None:
            return None
        return Edit(self.outliers, gain, self.rule, bias, self.first_query)

    # ------------------------------------------------------------------------------------------- what is looked at

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    def bias_terms(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What a bias adds to each score, and which scores it removes: [B, H, M, N]."""
        queries, keys = self._shape[2:]
        seeing = reference.resolve_visibility(queries, keys, self.options["visibility"])
        slots = torch.arange(keys) + seeing.key_offset
        reached = slots < bias.shape[2]
        index = torch.where(reached, slots, 0)
        terms = torch.where(reached, bias[:, :, index] if bias.shape[2] else torch.zeros(keys), 0.0)[:, :, None]
        own = torch.as_tensor(seeing.query_offset).reshape(-1, 1, 1, 1) + torch.arange(queries)[:, None]
        first = -(2**62) if self.first_query is None else self.first_query
        holds = own >= torch.as_tensor(first).reshape(-1, 1, 1, 1)
        removed = (holds & (terms == -torch.inf)).expand(self._shape)
        return torch.where(holds & ~removed, terms, 0.0), removed

    @property
    def seen(self) -> Tensor:
        """Bool [B, H, M, N]: visible and not removed by the bias."""
        seen = torch.from_numpy(reference.visible(*self._shape, self.options["visibility"]))
        return seen if self.key_bias is None else seen & ~self.bias_terms(self.key_bias)[1]

    @property
    def held(self) -> Tensor:
        """Bool [B, H, M, N]: the outliers, where they are seen."""
        if self.outliers is None:
            return torch.zeros(self._shape, dtype=torch.bool)
        key_offset = reference.resolve_visibility(*self._shape[2:], self.options["visibility"]).key_offset
        return torch.from_numpy(reference.held_mask(*self.outliers, self.seen.numpy(), key_offset))

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh leaves in that dtype; gain, bias and sinks are float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        found = {name: getattr(self, name).to(dtype) for name in ("query", "key", "value")}
        others = {"gain": self.gain, "key_bias": self.key_bias, "sinks": self.options["sinks"]}
        found |= {name: each.to(wide) for name, each in others.items() if each is not None}
        return {name: leaf.detach().clone().requires_grad_() for name, leaf in found.items()}

    # --------------------------------------------------------------------------------------- attention, all of it

    def eager(self, leaves: dict[str, Tensor]) -> Dense:
        """As models write attention: products in the dtype of the query, softmax and rule in float32."""
        dtype = leaves["query"].dtype
        heads, groups = self.query.shape[1], self.query.shape[1] // self.key.shape[1]
        wide = torch.promote_types(dtype, torch.float32)
        seen, held = self.seen, self.held
        scale, cap = self.options["scale"], self.options["softcap"]
        scale = self.query.shape[3] ** -0.5 if scale is None else scale
        scores = (leaves["query"] @ leaves["key"].repeat_interleave(groups, 1).transpose(2, 3)) * scale
        scores = (cap * torch.tanh(scores / cap) if cap else scores).to(wide)
        if "key_bias" in leaves:
            scores = scores + self.bias_terms(leaves["key_bias"])[0]
        any_seen = seen.any(-1, keepdim=True)
        # Rows that see nothing are hidden behind rows of zeros, whose softmax has a gradient.
        scores = torch.where(any_seen, scores.masked_fill(~seen, -torch.inf), 0.0)
        if "sinks" in leaves:
            sink = leaves["sinks"].view(1, heads, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, torch.where(any_seen, sink, 0.0)], -1)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        everything = torch.softmax(scores, -1)
        weights = torch.where(any_seen, everything[..., : seen.shape[3]], 0.0)
        mass = (weights * held).sum(-1, keepdim=True)
        rest = (everything * ~torch.nn.functional.pad(held, (0, everything.shape[-1] - held.shape[-1]))).sum(-1, True)
        applied = weights
        if "gain" in leaves and self.outliers is not None:
            gain = leaves["gain"].view(1, -1, 1, 1)
            boosted = weights * (1 + gain * held)
            if self.rule == "none":
                applied = boosted
            elif self.rule == "row":
                total = rest + (1 + gain) * mass
                applied, lse = boosted / total, lse + torch.log(total)
            else:
                alone = rest == 0
                others = 1 - gain * mass / torch.where(alone, 1.0, rest)
                applied = torch.where(alone, weights, torch.where(held, boosted, weights * others))
        output = applied.to(dtype) @ leaves["value"].repeat_interleave(groups, 1)
        return Dense(output, torch.where(any_seen, lse, -torch.inf)[..., 0], weights, applied, mass, rest)

    def gradients(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], Dense]:
        """Of the leaves, by autograd through `eager`."""
        leaves = self.leaves(dtype)
        dense = self.eager(leaves)
        loss = (dense.output * self.upstream.to(dense.output)).sum()
        if self.upstream_lse is not None:
            loss = loss + (torch.where(dense.lse.isinf(), 0.0, dense.lse) * self.upstream_lse.to(dense.lse)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(leaf) if each is None else each for (name, leaf), each in pairs}, dense

    def from_stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Gradients in ``dtype`` from a stored log-sum-exp and output, as fused attention computes them.

        The scores are computed a second time, and their sums in another order, as a backward kernel does.
        """
        leaves, seen, held = self.leaves(dtype), self.seen, self.held
        with torch.no_grad():
            dense = self.eager(leaves)
            wide = dense.lse.dtype
            heads, groups = self.query.shape[1], self.query.shape[1] // self.key.shape[1]
            scale, cap = self.options["scale"], self.options["softcap"]
            scale = self.query.shape[3] ** -0.5 if scale is None else scale
            key, value = (leaves[name].repeat_interleave(groups, 1) for name in ("key", "value"))
            upstream = self.upstream.to(dtype)
            scores = (leaves["query"].flip(-1) @ key.flip(-1).transpose(2, 3)).to(wide) * scale
            tanh = torch.tanh(scores / cap) if cap else torch.zeros(())
            scores = cap * tanh if cap else scores
            if "key_bias" in leaves:
                scores = scores + self.bias_terms(leaves["key_bias"])[0]
            slopes = (upstream @ value.transpose(2, 3)).to(wide)
            parts = _Rule(self, dense)
            weights = torch.where(seen, torch.exp(scores - dense.lse[..., None]) * parts.total, 0.0)
            dot0 = (weights * slopes).sum(-1, keepdim=True)
            dot_u = (weights * slopes * held).sum(-1, keepdim=True)
            slope_of_mass = parts.da * dot0 + parts.db * dot_u
            delta = (upstream.to(wide) * dense.output.to(wide)).sum(-1, keepdim=True) + slope_of_mass * dense.mass
            edited = slopes * (parts.a + parts.b * held) + slope_of_mass * held
            grad_lse = torch.zeros(()) if self.upstream_lse is None else self.upstream_lse.to(wide)[..., None]
            lse_share = (1 + parts.gain * held) / parts.total
            grad_scores = weights * (edited - delta + grad_lse * lse_share)
            found = {"value": (weights * (parts.a + parts.b * held)).to(dtype).transpose(2, 3) @ upstream}
            inner = (grad_scores * (1 - tanh * tanh)).to(dtype)
            found["query"] = inner @ key * scale
            found["key"] = inner.transpose(2, 3) @ leaves["query"] * scale
            for name in ("key", "value"):
                found[name] = found[name].unflatten(1, (-1, groups)).sum(2)
            if "gain" in leaves:
                of_gain = parts.da_dg * dot0 + parts.db_dg * dot_u + grad_lse * parts.dlse_dg
                found["gain"] = self._to_gain(torch.where(seen.any(-1, keepdim=True), of_gain, 0.0))
            if "key_bias" in leaves:
                found["key_bias"] = self._to_bias(grad_scores)
            if "sinks" in leaves:
                sink = torch.exp(leaves["sinks"].view(1, heads, 1, 1) - dense.lse[..., None]) * parts.total
                sink = torch.where(seen.any(-1, keepdim=True), sink, 0.0)
                found["sinks"] = (sink * (grad_lse / parts.total - delta)).sum((0, 2, 3))
        return found

    def _to_gain(self, of_rows: Tensor) -> Tensor:
        """Sums over rows [B, H, M, 1], for each head or for all."""
        assert self.gain is not None
        of_heads = of_rows.sum((0, 2, 3))
        return of_heads if self.gain.shape == of_heads.shape else of_heads.sum(0, keepdim=True)

    def _to_bias(self, of_scores: Tensor) -> Tensor:
        """Sums over scores [B, H, M, N] as a bias gathers them, in its shape."""
        bias = torch.zeros_like(self.key_bias, dtype=of_scores.dtype, requires_grad=True)
        with torch.enable_grad():
            terms = self.bias_terms(bias)[0].expand(self._shape)
        return torch.autograd.grad(terms, bias, of_scores)[0]

    def magnitudes(self, dense: Dense) -> dict[str, Tensor]:
        """What roundings scale with: Note: [Earned tolerance of edits]; ``dense`` in float64."""
        groups, heads = self.query.shape[1] // self.key.shape[1], self.query.shape[1]
        held, weights, parts = self.held, dense.weights.detach(), _Rule(self, dense)
        scale = self.query.shape[3] ** -0.5 if self.options["scale"] is None else self.options["scale"]
        query, key, value, upstream = (x.double() for x in (self.query, self.key, self.value, self.upstream))
        slopes = upstream.abs() @ value.abs().repeat_interleave(groups, 1).transpose(2, 3)
        dot0 = (weights * slopes).sum(-1, keepdim=True)
        dot_u = (weights * slopes * held).sum(-1, keepdim=True)
        curve = parts.da.abs() * dot0 + parts.db.abs() * dot_u
        edited = slopes * (parts.size_a + parts.size_b * held) + curve * held
        means = (weights * edited).sum(-1, keepdim=True)
        if self.upstream_lse is not None:
            means = means + self.upstream_lse.double().abs()[..., None] * (1 + parts.gain.abs()) / parts.total
        size = weights * (edited + means)
        applied = weights * (parts.size_a + parts.size_b * held)

        def per_key_head(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, groups)).sum(2)

        found = {
            "query": abs(scale) * (size @ key.abs().repeat_interleave(groups, 1)).amax(-1, keepdim=True),
            "key": abs(scale) * per_key_head(size.transpose(2, 3) @ query.abs()).amax(-1, keepdim=True),
            "value": per_key_head(applied.transpose(2, 3) @ upstream.abs()).amax(-1, keepdim=True),
            "output": (applied @ value.abs().repeat_interleave(groups, 1)).amax(-1, keepdim=True),
            "sinks": means.sum((0, 2, 3)) * torch.ones(heads),
        }
        if self.gain is not None:
            of_gain = parts.da_dg.abs() * dot0 + parts.db_dg.abs() * dot_u + parts.dlse_dg.abs()
            found["gain"] = self._to_gain(of_gain + (size * held).sum(-1, keepdim=True))
        if self.key_bias is not None:
            found["key_bias"] = self._to_bias(size)
        return found


@dataclass
class Dense:
    """What `EditedProblem.eager` finds: all [B, H, M, ...]."""

    output: Tensor
    lse: Tensor
    weights: Tensor  # the softmax
    applied: Tensor  # after the rule
    mass: Tensor
    rest: Tensor


class _Rule:
    """a(m), b(m), their derivatives by m and by the gain, and what their roundings scale with; all [B, H, M, 1]."""

    def __init__(self, problem: EditedProblem, dense: Dense) -> None:
        mass, rest = dense.mass.detach(), dense.rest.detach()
        zero, one = torch.zeros_like(mass), torch.ones_like(mass)
        self.a, self.b, self.da, self.db, self.da_dg, self.db_dg = one, zero, zero, zero, zero, zero
        self.total, self.dlse_dg, self.gain, self.size_a, self.size_b = one, zero, zero, one, zero
        if problem.gain is None or problem.outliers is None:
            return
        gain = problem.gain.to(mass).view(1, -1, 1, 1)
        if problem.rule == "none":
            self.b, self.db_dg, self.size_b = gain + zero, one, gain.abs() + zero
        elif problem.rule == "row":
            total = rest + (1 + gain) * mass
            condition = (1 + gain.abs() * mass) / total
            self.a, self.b, self.total, self.gain = 1 / total, gain / total, total, gain
            self.da, self.db = -gain / total**2, -(gain**2) / total**2
            self.da_dg, self.db_dg = -mass / total**2, 1 / total**2
            self.db_dg = 1 / total - gain * mass / total**2
            self.dlse_dg = mass / total
            self.size_a, self.size_b = condition / total, condition * gain.abs() / total
        else:
            alone = rest == 0
            rest = torch.where(alone, 1.0, rest)
            self.a = torch.where(alone, 1.0, 1 - gain * mass / rest)
            self.b = torch.where(alone, 0.0, 1 + gain - self.a)
            self.da = torch.where(alone, 0.0, -gain / rest**2)
            self.db = -self.da
            self.da_dg = torch.where(alone, 0.0, -mass / rest)
            self.db_dg = torch.where(alone, 0.0, 1 + mass / rest)
            self.size_a = torch.where(alone, 1.0, 1 + gain.abs() * mass / rest)
            self.size_b = torch.where(alone, 0.0, (1 + gain).abs() + self.size_a)


# ------------------------------------------------------------------------------------------------------------ draws


def random_problem(seed: int, repeat: int = 0, dtype: torch.dtype | None = None) -> EditedProblem:
    """Every option is on in some problems and off in others. A `repeat` has other numbers in the same shapes."""
    draw = random.Random(seed)
    torch.manual_seed(seed + 10_000 * repeat)
    rule = RULES[seed % 3]
    dtype = DTYPES[seed // 3 % 3] if dtype is None else dtype
    batch, key_heads, groups = draw.randint(1, 3), draw.randint(1, 2), draw.choice((1, 2, 3))
    heads = key_heads * groups
    queries, keys = draw.choice(SIZES)
    width = draw.choice((8, 16, 24, 37, 64, 128))
    value_width = width if draw.random() < 0.6 else draw.choice((1, 16, 40, 72))
    lay_out = LAYOUTS[draw.choice(list(LAYOUTS))]
    scale = None if draw.random() < 0.7 else draw.choice((0.3, -0.2))
    spread = draw.choice((0.5, 1.0, 2.0, 4.0)) / (abs(scale or width**-0.5) * math.sqrt(width))
    problem = EditedProblem(
        lay_out((torch.randn(batch, heads, queries, width) * spread).to(dtype)),
        lay_out(torch.randn(batch, key_heads, keys, width).to(dtype)),
        lay_out(torch.randn(batch, key_heads, keys, value_width).to(dtype)),
        {
            "scale": scale,
            "visibility": _visibility(draw, batch, heads, queries, keys),
            "softcap": draw.choice((4.0, 30.0)) if draw.random() < 0.25 else None,
            "sinks": torch.randn(heads) if draw.random() < 0.3 else None,
        },
        rule=rule,
        emit=draw.choice((None, 0.01, 0.05)),
        upstream=lay_out(torch.randn(batch, heads, queries, value_width).to(dtype)),
        upstream_lse=torch.randn(batch, heads, queries) if draw.random() < 0.4 else None,
    )
    seeing = reference.resolve_visibility(queries, keys, problem.options["visibility"])
    if draw.random() < 0.8:
        problem.outliers = _lists(draw, (batch, heads, queries), seeing.key_offset, keys)
        choices = (-0.9, -0.5, 0.2, 1.0, 4.0) if rule == "row" else (-1.0, -0.5, 0.2, 1.0, 4.0)
        problem.gain = torch.tensor([draw.choice(choices) for _ in range(draw.choice((1, heads)))])
    if problem.gain is None or draw.random() < 0.6:
        problem.key_bias = _bias(draw, batch, heads, seeing.key_offset, keys)
        last = seeing.key_offset + keys
        first = torch.randint(seeing.key_offset, last + 1, (batch,))
        problem.first_query = draw.choice((None, None, int(first[0]), first, torch.zeros(batch, dtype=torch.int64)))
    return problem


def _visibility(draw: random.Random, batch: int, heads: int, queries: int, keys: int) -> Visibility | None:
    kinds = ("default", "default", "all", "window", "offset", "offsets", "start", "range", "mask", "both", "chunk")
    kind = draw.choice((*kinds, "chunk of padded rows"))
    if kind == "default":
        return None
    if kind == "all":
        return Visibility(causal=False)
    if kind == "window":
        return Visibility(window=draw.randint(1, keys + 3))
    if kind == "offset":
        first = draw.randint(0, 50)
        return Visibility(query_offset=first + draw.randint(-5, keys), key_offset=first)
    if kind == "offsets":
        first = draw.randint(0, 50)
        offsets = [first + draw.randint(0, keys) for _ in range(batch)]
        return Visibility(
            query_offset=torch.tensor(offsets), key_offset=first, window=draw.choice((None, keys // 2 + 1))
        )
    if kind == "start":
        return Visibility(key_start=torch.tensor([draw.randint(0, keys) for _ in range(batch)]))
    if kind == "range":
        start = [draw.randint(0, keys) for _ in range(batch)]
        end = torch.tensor([draw.randint(low, keys) for low in start])
        return Visibility(causal=False, key_start=torch.tensor(start), key_end=end)
    if kind.startswith("chunk"):
        start = torch.tensor([draw.randint(0, keys // 2) for _ in range(batch)]) if "padded" in kind else None
        return Visibility(chunk=draw.choice((1, 7, 16, 50)), key_start=start)
    mask = torch.rand(draw.choice(((batch, 1, queries, keys), (heads, queries, keys)))) < draw.choice((0.1, 0.5, 0.9))
    return Visibility(mask=mask, causal=True if kind == "both" else None)


def _lists(draw: random.Random, shape: tuple[int, int, int], key_offset: int, keys: int) -> Outliers:
    """Ascending slots, some not held, for each query or for all of a head; arbitrary beyond a row's count."""
    batch, heads, queries = shape
    rows = draw.choice((1, queries))
    capacity = draw.choice((1, 6, 24))
    low, high = max(0, key_offset - 5), key_offset + keys + 5
    capacity = min(capacity, high - low)
    picks = torch.randint(0, high - low - capacity + 1, (batch, heads, rows, capacity)).sort(-1).values
    indices = (low + picks + torch.arange(capacity)).to(torch.int32)
    counts = torch.randint(0, capacity + 1, (batch, heads, rows), dtype=torch.int32)
    return Outliers(indices, counts)


def _bias(draw: random.Random, batch: int, heads: int, key_offset: int, keys: int) -> Tensor:
    """Of any length; a few keys are removed; NaN at every slot that this layer does not hold."""
    slots = draw.choice((1, key_offset + keys // 2 + 1, key_offset + keys, key_offset + keys + 9))
    bias = torch.randn(draw.choice((1, batch)), draw.choice((1, heads)), slots) * draw.choice((0.5, 2.0))
    bias[torch.rand(bias.shape) < draw.choice((0.0, 0.1))] = -torch.inf
    bias[..., :key_offset] = torch.nan
    bias[..., key_offset + keys :] = torch.nan
    return bias
