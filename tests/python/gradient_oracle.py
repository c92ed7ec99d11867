"""Gradients of attention through dense PyTorch autograd: the truth in float64, and what lower dtypes earn as tolerance.

It shares no code with attnrb's own paths: every matrix stands in memory, and what a query sees comes from the NumPy
reference.

Note: [Earned tolerance of gradients]
As in Note: [Earned tolerance] (tolerance.py), with the magnitude of a gradient what its own rounding errors scale with:
for P the weights, w the factors of re-balancing, dW the weights' gradients and delta the rows' means of them,

    dQ: scale · max_d Σ_j P_ij (w_ij |dW_ij| + |delta_i|) |k_jd|     dK: likewise over i with |q_id|
    dV: max_d Σ_i w_ij P_ij |dy_id|       dgain, dsink: the same sums over whole heads

and e(PyTorch) the largest error among the gradients that PyTorch computes for such cases in the same dtype, in two
ways: by eager autograd, and as every fused attention does it, PyTorch's own included, which keeps no weights: these
come from the log-sum-exp and delta from the output, both as they were stored. A stored output is rounded to the dtype,
which shows where a row is all but one-hot and its gradients all but cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from attnrb import reference
from torch import Tensor


@dataclass
class Problem:
    """One differentiable call: ``kind`` is source, rebalanced or received."""

    kind: str
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    upstream: Tensor  # of the output, or of what keys receive
    upstream_lse: Tensor | None = None
    held: Tensor | None = None  # bool [B, H, M, N], the outliers that count here
    gain: Tensor | None = None  # [H]
    normalize: bool = False

    @property
    def seen(self) -> Tensor:
        batch, heads, queries, _ = self.query.shape
        return torch.from_numpy(reference.visible(batch, heads, queries, self.key.shape[2], self.options["visibility"]))

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh leaves in that dtype; gain and sinks are float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        found = {"query": self.query.to(dtype), "key": self.key.to(dtype)}
        if self.kind != "received":
            found["value"] = self.value.to(dtype)
        if self.gain is not None:
            found["gain"] = self.gain.to(wide)
        if self.options["sinks"] is not None:
            found["sinks"] = self.options["sinks"].to(wide)
        return {name: leaf.detach().clone().requires_grad_() for name, leaf in found.items()}

    def dense(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients by dense autograd in ``dtype``, and (meaningful in float64) their magnitudes."""
        leaves, seen, wide = self.leaves(dtype), self.seen, torch.promote_types(dtype, torch.float32)
        heads, groups = self.query.shape[1], self.query.shape[1] // self.key.shape[1]
        scale = self.query.shape[3] ** -0.5 if self.options["scale"] is None else self.options["scale"]
        key = leaves["key"].repeat_interleave(groups, 1)
        products = (leaves["query"] @ key.transpose(2, 3)) * scale
        cap = self.options["softcap"]
        scores = cap * torch.tanh(products / cap) if cap else products
        scores = scores.to(wide).masked_fill(~seen, -torch.inf)
        any_seen = seen.any(-1, keepdim=True)
        # Rows that see nothing are hidden behind rows of zeros, whose softmax has a gradient.
        scores = torch.where(any_seen, scores, 0.0)
        if "sinks" in leaves:
            sink = leaves["sinks"].view(1, heads, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, torch.where(any_seen, sink, 0.0)], -1)
        lse = torch.where(any_seen[..., 0], torch.logsumexp(scores, -1), 0.0)
        weights = torch.where(any_seen, torch.softmax(scores, -1)[..., : seen.shape[3]], 0.0)
        if self.held is not None:
            extra = weights * self.held * leaves["gain"].view(1, heads, 1, 1)
            total = 1 + extra.sum(-1, keepdim=True) if self.normalize else 1.0
            weights = (weights + extra) / total
        if self.kind == "received":
            received = weights.sum(2) / seen.sum(2).clamp(min=1)
            loss = (received * self.upstream.to(wide)).sum()
        else:
            output = weights.to(dtype) @ leaves["value"].repeat_interleave(groups, 1)
            loss = (output.to(wide) * self.upstream.to(wide)).sum()
        if self.upstream_lse is not None:
            loss = loss + (lse * self.upstream_lse.to(wide)).sum()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        return gradients, self._magnitudes(weights.detach(), leaves, scale) if dtype == torch.float64 else {}

    def from_stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Gradients in ``dtype`` from a stored log-sum-exp and output, every matrix in memory."""
        with torch.no_grad():
            return self._from_stored(dtype)

    def _from_stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves, seen, wide = self.leaves(dtype), self.seen, torch.promote_types(dtype, torch.float32)
        heads, groups = self.query.shape[1], self.query.shape[1] // self.key.shape[1]
        scale = self.query.shape[3] ** -0.5 if self.options["scale"] is None else self.options["scale"]
        query, key = leaves["query"], leaves["key"].repeat_interleave(groups, 1)
        any_seen, cap = seen.any(-1, keepdim=True), self.options["softcap"]
        scores = (query @ key.transpose(2, 3)).to(wide) * scale
        tanh = torch.tanh(scores / cap) if cap else torch.zeros(())
        scores = (cap * tanh if cap else scores).masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        if "sinks" in leaves:
            lse = torch.logaddexp(lse, leaves["sinks"].view(1, heads, 1, 1))
        factor = torch.ones_like(scores)
        if self.held is not None:
            factor = 1 + self.held * leaves["gain"].view(1, heads, 1, 1)
            if self.normalize:
                extra = (factor - 1) * torch.where(any_seen, torch.exp(scores - lse), 0.0)
                lse = lse + torch.log1p(extra.sum(-1, keepdim=True))
        weights = torch.where(any_seen, torch.exp(scores - lse), 0.0)
        found = {}
        if self.kind == "received":
            slopes = (self.upstream.to(wide) / seen.sum(2).clamp(min=1))[:, :, None]
            delta = (weights * slopes).sum(-1, keepdim=True)
        else:
            value = leaves["value"].repeat_interleave(groups, 1)
            output = (factor * weights).to(dtype) @ value
            upstream = self.upstream.to(dtype)
            slopes = (upstream @ value.transpose(2, 3)).to(wide)
            delta = (upstream.to(wide) * output.to(wide)).sum(-1, keepdim=True)
            found["value"] = (factor * weights).to(dtype).transpose(2, 3) @ upstream
        if self.upstream_lse is not None:
            delta = delta - self.upstream_lse.to(wide)[..., None]
        gradient = factor * (slopes - delta) if self.normalize else factor * slopes - delta
        gradient = (weights * gradient * (1 - tanh * tanh)).to(dtype)
        found["query"] = gradient @ key * scale
        found["key"] = gradient.transpose(2, 3) @ query * scale
        for name in ("key", "value"):
            if name in found:
                found[name] = found[name].unflatten(1, (-1, groups)).sum(2)
        if "gain" in leaves:
            found["gain"] = (weights * (slopes - delta if self.normalize else slopes) * self.held).sum((0, 2, 3))
        if "sinks" in leaves:
            sink = torch.where(any_seen, torch.exp(leaves["sinks"].view(1, heads, 1, 1) - lse), 0.0)
            found["sinks"] = -(sink * delta).sum((0, 2, 3))
        return found

    def _magnitudes(self, weights: Tensor, leaves: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        groups, heads = self.query.shape[1] // self.key.shape[1], self.query.shape[1]

        def per_key_head(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, groups)).sum(2)

        upstream = self.upstream.double()
        if self.kind == "received":
            slopes = (upstream.abs() / self.seen.sum(2).clamp(min=1))[:, :, None]
        else:
            slopes = (upstream @ leaves["value"].detach().repeat_interleave(groups, 1).transpose(2, 3)).abs()
        means = (weights * slopes).sum(-1, keepdim=True)
        if self.upstream_lse is not None:
            means = means + self.upstream_lse.double().abs()[..., None]
        size = weights * (slopes + means)
        query, key = leaves["query"].detach().abs(), leaves["key"].detach().abs()
        found = {
            "query": abs(scale) * (size @ key.repeat_interleave(groups, 1)).amax(-1, keepdim=True),
            "key": abs(scale) * per_key_head(size.transpose(2, 3) @ query).amax(-1, keepdim=True),
        }
        if self.kind != "received":
            found["value"] = per_key_head(weights.transpose(2, 3) @ upstream.abs()).amax(-1, keepdim=True)
        if "gain" in leaves:
            found["gain"] = (size * self.held).sum((0, 2, 3))
        if "sinks" in leaves:
            found["sinks"] = means.sum((0, 2, 3)) * torch.ones(heads)
        return found
