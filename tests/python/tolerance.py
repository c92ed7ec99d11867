"""The tolerance of the accuracy tests, earned rather than chosen, and the eager attention that earns it.

Note: [Earned tolerance]
Let truth be the float64 reference on the same inputs (upcast exactly), and let the error of a result be

    e(x) = max over rows of  max_d |x - truth| / magnitude,

where a row's magnitude is what its own rounding errors scale with: for an output, max_d sum_j A'_ij |v_jd|. Then

    e(op) <= 2 e(PyTorch) + u

must hold, with u one rounding of the result's dtype, and e(PyTorch) the largest error among PyTorch's own ways to
compute the same at the same dtype: eager, as models write it; the sparse correction of docs/method.md in eager; and,
for what it can express, `scaled_dot_product_attention`, whose log-sum-exp counts where an op hands it on. Several ways,
and several draws of a case that has but a few rows, because the error of one way on one row is a matter of luck. A row
of magnitude 0 must be exactly 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from attnrb import reference
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Floats = NDArray[np.float64]


def one_rounding(dtype: torch.dtype) -> float:
    """The u of Note: [Earned tolerance]: half the spacing of numbers at 1, and the whole of it for float32.

    A 16-bit result is computed in float32 and rounded once. A float32 result is computed and kept in float32, where
    even one key alone takes two roundings, p * v and its division by p; PyTorch's softmax happens to be exact there.
    """
    spacing = torch.finfo(dtype).eps
    return spacing if dtype == torch.float32 else spacing / 2


def error(actual: Tensor, truth: Floats, magnitude: Floats) -> float:
    """e(x) of Note: [Earned tolerance]; `magnitude` broadcasts against `truth`. NaN where either is not finite."""
    difference = np.abs(actual.double().numpy() - truth)
    magnitude = np.broadcast_to(magnitude, truth.shape)
    zero = magnitude == 0.0
    if (difference[zero] != 0.0).any():
        return math.inf
    return float((difference[~zero] / magnitude[~zero]).max(initial=0.0))


def assert_as_accurate(
    actual: Tensor, torch_own: list[Tensor], truth: Floats, magnitude: Floats, *, also: float = 0.0
) -> None:
    """Asserts that `actual` is within the tolerance of Note: [Earned tolerance].

    `torch_own` are PyTorch's results for the same; `also` is an error of PyTorch's known from elsewhere.
    """
    assert tuple(actual.shape) == truth.shape
    assert np.isfinite(actual.double().numpy()).all(), "not finite"
    earned = max([also, *(error(result, truth, magnitude) for result in torch_own)])
    assert math.isfinite(earned), "PyTorch overflowed: this case earns no tolerance"
    found, allowed = error(actual, truth, magnitude), 2.0 * earned + one_rounding(actual.dtype)
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g} (PyTorch's own {earned:.3g})"


def row_magnitude(weights: Floats, value: Tensor) -> Floats:
    """max_d sum_j A'_ij |v_jd|, [B,H,M,1]."""
    v = np.abs(value.double().numpy())
    sums = weights @ np.repeat(v, weights.shape[1] // max(v.shape[1], 1), axis=1)
    return np.asarray(sums.max(axis=3, keepdims=True, initial=0.0))


class Eager:
    """Attention as models write it in eager PyTorch: products in the dtype of the inputs, softmax in float32."""

    def __init__(self, query: Tensor, key: Tensor, **options: Any) -> None:
        batch, heads, queries, width = query.shape
        keys, groups = key.shape[2], heads // key.shape[1]
        self.groups, self.dtype = groups, query.dtype
        self.inputs, self.options = (query, key), options
        self.seen = torch.from_numpy(reference.visible(batch, heads, queries, keys, options["visibility"]))
        scale = 1.0 / math.sqrt(width) if options["scale"] is None else options["scale"]
        scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)) * scale
        if options["softcap"]:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        scores = scores.float().masked_fill(~self.seen, -math.inf)
        if options["sinks"] is not None:
            sinks = options["sinks"].float().view(1, heads, 1, 1).expand(batch, heads, queries, 1)
            scores = torch.cat([scores, sinks], -1)
        any_seen = self.seen.any(-1, keepdim=True)
        weights = torch.softmax(scores, -1)[..., :keys] if scores.shape[-1] else scores
        # Weights in float32; rows without a key are NaN in a softmax and 0 by this library's convention.
        self.weights = torch.where(any_seen, weights, 0.0)
        lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1)
        self.lse = torch.where(any_seen[..., 0], lse, -math.inf)

    def sdpa(self, value: Tensor) -> list[Tensor]:
        """PyTorch's fused kernels on the same inputs, one result a backend; none where they cannot say the case."""
        query, key = self.inputs
        if self.options["softcap"] or self.options["sinks"] is not None or 0 in (*self.seen.shape, value.shape[3]):
            return []
        key, value = (x.repeat_interleave(self.groups, 1).contiguous() for x in (key, value))
        results = []
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            if backend == SDPBackend.FLASH_ATTENTION and value.shape[3] != key.shape[3]:
                continue
            with sdpa_kernel(backend):
                output = torch.nn.functional.scaled_dot_product_attention(
                    query.contiguous(), key, value, attn_mask=self.seen, scale=self.options["scale"]
                )
            results.append(torch.where(self.seen.any(-1, keepdim=True), output, 0.0))
        return results

    def output(self, value: Tensor) -> Tensor:
        return self._weigh(self.weights, value)

    def boosted(self, value: Tensor, mask: Tensor, gain: Tensor, normalize: bool) -> list[Tensor]:
        """Re-balanced output: by a second matrix of weights, as the published code does, and as a sparse correction."""
        gains = gain.view(1, -1, 1, 1)
        extra = gains * self.weights * mask
        z = 1.0 + extra.sum(-1, keepdim=True) if normalize else torch.ones(())
        correction = self._weigh(self.weights, value).float() + self._weigh(extra, value).float()
        return [self._weigh((self.weights + extra) / z, value), (correction / z).to(self.dtype)]

    def _weigh(self, weights: Tensor, value: Tensor) -> Tensor:
        return weights.to(self.dtype) @ value.repeat_interleave(self.groups, 1)

    def received(self) -> Tensor:
        return self.weights.to(self.dtype).float().sum(2) / self.seen.sum(2).clamp(min=1)
