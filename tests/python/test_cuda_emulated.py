"""The CUDA ops on the emulated device beside the CPU: that they agree, and what they say on a device that is too small.

Each side runs in a process of its own (emulated_worker.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attnrb import reference
from cases import DTYPES, Case, sample
from conftest import REPOSITORY, CloseCalls
from numpy.typing import NDArray
from test_accuracy_attention import FEW_ROWS, Truth, close_to_threshold
from tolerance import one_rounding

LIBRARY = REPOSITORY / "build" / "cuda-host" / "tests" / "cuda_host" / "libattnrb_cuda_host_ops.so"
WORKER = Path(__file__).parent / "emulated_worker.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY.is_file(), reason="the emulated device was not built: make test-cuda"),
]

ONE_IN = 24
CASES = [pytest.param((case, dtype), id=f"{case.name}-{str(dtype)[6:]}") for case in sample(ONE_IN) for dtype in DTYPES]
Results = dict[str, NDArray[np.generic]]


def run_worker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WORKER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """What the CPU's ops and the emulated device's give, by case, dtype and name."""
    found = []
    for name, libraries in (("cpu", ()), ("cuda", (str(LIBRARY),))):
        path = tmp_path_factory.mktemp(name) / "results.npz"
        ran = run_worker(str(ONE_IN), str(path), *libraries)
        assert ran.returncode == 0, ran.stderr[-3000:]
        with np.load(path) as file:
            found.append(dict(file))
    return found[0], found[1]


@pytest.mark.parametrize("drawn", CASES)
def test_the_cpu_and_the_emulated_device_agree(
    drawn: tuple[Case, torch.dtype], both: tuple[Results, Results], close_calls: CloseCalls
) -> None:
    """Within the tolerances of both (Note: [Earned tolerance]); outliers differ only next to the threshold."""
    case, dtype = drawn
    truth = Truth(case.build(dtype))
    if truth.lse.size < FEW_ROWS:
        truth.add_draws(4)
    cpu, cuda = (
        {key.rpartition("|")[2]: side[key] for key in side if key.startswith(f"{case.name}|{str(dtype)[6:]}|")}
        for side in both
    )
    assert len(cpu) == 6
    assert cpu.keys() == cuda.keys()

    keys = truth.key_offset + np.arange(truth.weights.shape[3])
    own = keys == truth.query_offset + np.arange(truth.weights.shape[2])[:, None]
    close = close_to_threshold(truth.weights, case.threshold, dtype) & truth.seen & ~own
    chosen = [
        reference.held_mask(side["indices"], side["counts"], np.ones_like(close), truth.key_offset)
        for side in (cpu, cuda)
    ]
    different = chosen[0] != chosen[1]
    assert not (different & ~close).any(), "outliers differ far from the threshold"
    close_calls.add(int((truth.seen & ~own).sum()), int(close.sum()), int(different.sum()))

    # Rows that were handed other outliers give another output below.
    same = ~different.any(axis=3)
    u = one_rounding(dtype)
    for name, rows, magnitude, earned, rounding in (
        ("output", np.ones_like(same), truth.magnitude, "output", u),
        ("below", same, truth.magnitude, "output", u),
        ("lse", truth.seeing, np.ones((*same.shape, 1)), "lse", one_rounding(torch.float32)),
    ):
        shape = (*same.shape, -1)
        first, second = (side[name].reshape(shape)[rows].astype(np.float64) for side in (cpu, cuda))
        allowed = 2.0 * (2.0 * truth.torch_errors[earned] + rounding) * magnitude[rows]
        if name == "lse":
            allowed = allowed * np.maximum(1.0, np.abs(first))
        assert (np.abs(first - second) <= allowed).all(), name
    allowed = 2.0 * (2.0 * truth.torch_errors["received"] + one_rounding(torch.float32)) * truth.received_magnitude
    assert (np.abs(cpu["received"].astype(np.float64) - cuda["received"]) <= allowed).all()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"ATTNRB_EMULATED_CAPABILITY": "75"},
            "query: expected on a device of compute capability 8.0 or newer, got one of 7.5",
        ),
        (
            {"ATTNRB_EMULATED_SHARED_BYTES": "20000"},
            "query: expected rows that fit shared memory, of which this device has 20000 bytes a block, got widths "
            "that need ",
        ),
    ],
    ids=["capability", "shared memory"],
)
def test_a_device_that_is_too_small_is_refused(limits: dict[str, str], message: str, tmp_path: Path) -> None:
    ran = run_worker(str(ONE_IN), str(tmp_path / "none.npz"), str(LIBRARY), **limits)
    assert ran.returncode != 0
    assert f"ValueError: {message}" in ran.stderr
