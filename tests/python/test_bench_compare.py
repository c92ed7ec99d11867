"""The regression check between two results of the benches, on results made up for it."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

_FILE = REPOSITORY / "bench" / "python" / "compare.py"


@pytest.fixture(scope="module")
def compare() -> Any:
    # The benches are scripts, not a package: loaded from where they are.
    spec = spec_from_file_location("bench_compare", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def times(median: float, spread: float = 0.0) -> dict[str, Any]:
    return {"median": median, "low": median - spread, "high": median + spread, "rounds": 9}


def stored(**ratios: float) -> dict[str, Any]:
    """A result whose cases take so many times as long as SDPA's 10 ms."""
    cases = [
        {"name": name, "seconds": {"attnrb": times(0.01 * ratio), "sdpa": times(0.01)}}
        for name, ratio in ratios.items()
    ]
    return {"machine": {"processor": "P"}, "threads": 2, "instruction_set": {}, "quick": False, "cases": cases}


def test_names_what_got_slower(compare: Any) -> None:
    complaints = compare.compare(stored(prefill=0.5, decode=0.3), stored(prefill=0.6, decode=0.3), 0.1)
    assert complaints == ["prefill: slower by 20% (0.5 -> 0.6)"]


def test_faster_and_within_tolerance_pass(compare: Any) -> None:
    assert compare.compare(stored(prefill=0.5, decode=0.3), stored(prefill=0.54, decode=0.1), 0.1) == []


def test_a_slow_machine_is_no_regression(compare: Any) -> None:
    before, after = stored(prefill=0.5), stored(prefill=0.5)
    for contender in ("attnrb", "sdpa"):
        after["cases"][0]["seconds"][contender]["median"] *= 3
    assert compare.compare(before, after, 0.1) == []


def test_plain_time_where_nothing_ran_beside_it(compare: Any) -> None:
    before = stored(memory=1.0)
    del before["cases"][0]["seconds"]["sdpa"]
    after = deepcopy(before)
    after["cases"][0]["seconds"]["attnrb"]["median"] *= 1.5
    assert compare.compare(before, after, 0.1) == ["memory: slower by 50% (0.01 -> 0.015)"]


def test_noise_excuses(compare: Any) -> None:
    before, after = stored(prefill=0.5), stored(prefill=0.6)
    for result in (before, after):
        own = result["cases"][0]["seconds"]["attnrb"]
        own |= times(own["median"], own["median"] * 0.15)
    assert compare.compare(before, after, 0.1) == []


def test_a_missing_case_is_named(compare: Any) -> None:
    assert compare.compare(stored(prefill=0.5, decode=0.3), stored(prefill=0.5), 0.1) == [
        "decode: missing from the second file"
    ]


def test_command(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(stored(prefill=0.5)))
    after.write_text(json.dumps(stored(prefill=0.7) | {"threads": 4}))
    assert compare.main([str(before), str(after)]) == 1
    assert capsys.readouterr().out == "note: threads differs: 2 and 4\nprefill: slower by 40% (0.5 -> 0.7)\n"
    assert compare.main([str(before), str(after), "--tolerance", "0.5"]) == 0
    assert compare.main([str(before), str(before)]) == 0
