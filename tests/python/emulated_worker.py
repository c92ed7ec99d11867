"""Runs the attention ops on cases of the table and stores what they give: the CPU's ops, or a library's in their place.

    python emulated_worker.py ONE_IN FILE.npz [LIBRARY]

A process of its own, because ops that a library has replaced stay so.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from attnrb import functional
from cases import DTYPES, sample

torch.set_num_threads(1)


def main(one_in: str, path: str, *libraries: str) -> None:
    for library in libraries:
        torch.ops.load_library(library)
    results = {}
    for case in sample(int(one_in)):
        for dtype in DTYPES:
            inputs = case.build(dtype)
            output, lse, outliers = functional.source_attention(
                inputs.query, inputs.key, inputs.value, threshold=case.threshold, **inputs.options
            )
            below = functional.rebalanced_attention(
                inputs.query, inputs.key, inputs.value, outliers, 0.2, normalize=True, **inputs.options
            )
            received = functional.received_attention(inputs.query, inputs.key, **inputs.options)
            found = {"output": output, "lse": lse, "below": below, "received": received, **outliers._asdict()}
            for name, tensor in found.items():
                values = tensor.float() if tensor.is_floating_point() else tensor
                results[f"{case.name}|{str(dtype)[6:]}|{name}"] = values.numpy()
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
