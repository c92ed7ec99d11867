"""The accuracy tests again for every instruction set below the best that this machine runs.

The core chooses once a process, so each set gets a pytest of its own; `pytest --attnrb-cpu avx2` runs one by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attnrb.ops import library
from conftest import CloseCalls

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LOWER = [name for name in library.instruction_sets() if name != library.instruction_set()]

# A part of the table suffices: the C++ tests run every set on generated cases, and what differs between sets is the
# vectors under one template. Prime to the numbers of dtypes and options.
ONE_IN = {"portable": "17", "avx2": "13"}
EDITS_ONE_IN = "23"  # of the drawn edits, prime to rules times dtypes


@pytest.mark.skipif("ATTNRB_CPU" in os.environ, reason="one instruction set was asked for; it is the one under test")
@pytest.mark.parametrize("name", LOWER)
def test_accuracy(name: str, close_calls: CloseCalls) -> None:
    environment = os.environ | {"ATTNRB_CPU": name, "ATTNRB_TEST_SAMPLE": ONE_IN.get(name, "11")}
    environment["ATTNRB_TEST_GRADIENT_SAMPLE"] = EDITS_ONE_IN
    files = [HERE / f"test_accuracy_{stem}.py" for stem in ("attention", "weights", "not_finite")]
    files += [HERE / "test_attention_accuracy.py", HERE / "test_paging.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
        *map(str, files),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    tally = re.search(r"outliers \((.*)\): ([\d,]+) entries compared, ([\d,]+) .* ([\d,]+) of those", result.stdout)
    assert tally is not None
    assert tally[1] == name, "the other process ran another instruction set"
    close_calls.add(*(int(count.replace(",", "")) for count in tally.groups()[1:]))
