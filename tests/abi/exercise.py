"""Runs every op of the installed attnrb under the installed torch and compares it with the NumPy reference.

Exits with an error at the first difference. Uses nothing of the source tree.
"""

from __future__ import annotations

import hashlib

import attnrb
import numpy as np
import torch
from attnrb import functional, reference
from attnrb.ops import _native, library
from torch.library import opcheck

# Float32 sums of at most 60 products of numbers below 10: a few hundred units of 6e-8 in the last place.
TOLERANCE = 1e-5


def main() -> None:
    print(
        "libattnrb.so",
        hashlib.sha256(_native.library().read_bytes()).hexdigest()[:16],
        "under torch",
        torch.__version__,
    )
    print("built against torch", library.build_options()["torch_headers"], "on", library.instruction_set())

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 60, 16, generator=generator) for heads in (4, 2, 2))
    visibility = attnrb.Visibility(window=40, key_start=torch.tensor([0, 7]))
    output, lse, outliers = functional.source_attention(query, key, value, visibility=visibility)
    _compare(
        "source_attention", (output, lse), reference.source_attention(query, key, value, visibility=visibility)[:2]
    )
    rebalanced = functional.rebalanced_attention(query, key, value, outliers, 0.2, visibility=visibility)
    truth = reference.rebalanced_attention(query, key, value, outliers, 0.2, visibility=visibility)
    _compare("rebalanced_attention", (rebalanced,), (truth,))
    received = functional.received_attention(query, key, visibility=visibility)
    _compare("received_attention", (received,), (reference.received_attention(query, key, visibility=visibility),))

    weights = torch.softmax(torch.randn(2, 4, 10, 30, generator=generator), -1)
    mask = functional.outlier_mask(weights, 0.05)
    assert np.array_equal(mask.numpy(), reference.outlier_mask(weights, 0.05))
    changed = functional.rebalance(weights, mask, [0.1, 0.2, 0.3, 0.4], normalize=True)
    truth = reference.rebalance(weights, mask, [0.1, 0.2, 0.3, 0.4], normalize=True)
    _compare("rebalance", (changed,), (truth,))

    opcheck(torch.ops.attnrb.outlier_mask.default, (weights, 0.05, 20))
    opcheck(torch.ops.attnrb.rebalance.default, (weights, mask, 0.2, True))
    compiled = torch.compile(functional.rebalance, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weights, mask, 0.2), functional.rebalance(weights, mask, 0.2))

    for bad in (query.double(), query[0]):
        refusal = ""
        try:
            torch.ops.attnrb.received_attention(bad, key, True, 0, 0, 0, None, None, None, 1.0, 0.0, None)
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
        assert "query" in refusal, refusal
    print("all ops agree with the reference, opcheck and a compiled call pass, bad arguments are refused")


def _compare(name: str, got: tuple[torch.Tensor, ...], expected: tuple[np.ndarray, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.double().numpy(), other, rtol=0, atol=TOLERANCE, err_msg=name)
    print(f"{name}: within {TOLERANCE} of the reference")


if __name__ == "__main__":
    main()
