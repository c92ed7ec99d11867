"""The accuracy tests again for every instruction set below the best that this machine runs.

The core chooses once a process, so each set gets a pytest of its own; `pytest --attnrb-cpu avx2` runs one by hand.
"""

from __future__ import annotations

import os
import re

import pytest
from attnrb.ops import library
from conftest import CloseCalls
from own_process import passed

pytestmark = pytest.mark.slow

FILES = ("accuracy_attention", "accuracy_weights", "accuracy_not_finite", "attention_accuracy", "paging")
LOWER = [name for name in library.instruction_sets() if name != library.instruction_set()]

# A part of the table suffices: the C++ tests run every set on generated cases, and what differs between sets is the
# vectors under one template. Prime to the numbers of dtypes and options.
ONE_IN = {"portable": "17", "avx2": "13"}
EDITS_ONE_IN = "23"  # of the drawn edits, prime to rules times dtypes


@pytest.mark.skipif("ATTNRB_CPU" in os.environ, reason="one instruction set was asked for; it is the one under test")
@pytest.mark.parametrize("name", LOWER)
def test_accuracy(name: str, close_calls: CloseCalls) -> None:
    sample = {"ATTNRB_TEST_SAMPLE": ONE_IN.get(name, "11"), "ATTNRB_TEST_GRADIENT_SAMPLE": EDITS_ONE_IN}
    said = passed(FILES, {"ATTNRB_CPU": name, **sample})
    tally = re.search(r"outliers \((.*)\): ([\d,]+) entries compared, ([\d,]+) .* ([\d,]+) of those", said)
    assert tally is not None
    assert tally[1] == name, "the other process ran another instruction set"
    close_calls.add(*(int(count.replace(",", "")) for count in tally.groups()[1:]))
