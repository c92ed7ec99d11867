"""The regression check between two results of the benches, on results made up for it."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY


def script(path: Path) -> Any:
    """The benches are scripts, not a package: loaded from where they are."""
    spec = spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compare() -> Any:
    return script(REPOSITORY / "bench" / "python" / "compare.py")


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench" / "python"))  # it imports compare, as a script does
    return script(REPOSITORY / "bench" / "python" / "history.py")


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


# ------------------------------------------------------------------------------------------------------------- history


def measured(**ratios: float) -> dict[str, Any]:
    machine = {"processor": "Intel(R) Xeon(R) Gold 6530 CPU @ 2.10GHz", "extensions": ["avx2", "avx512_bf16"]}
    return stored(**ratios) | {"machine": machine, "versions": {"torch": "2.13.0"}}


def folder_with(folder: Path, **results: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def test_history_keeps_one_folder_a_kind_of_processor_and_names_what_got_slower(
    history: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = folder_with(tmp_path / "first", attention=measured(prefill=0.5), cpp={"context": {}})
    second = folder_with(tmp_path / "second", attention=measured(prefill=0.7))
    kept = tmp_path / "history"
    assert history.add(first, "aaa", "2026-01-01", 0.1, kept) == 0
    assert "the first result" in capsys.readouterr().out
    assert history.add(second, "bbb", "2026-01-02", 0.1, kept) == 1
    assert "prefill: slower by 40% (0.5 -> 0.7)" in capsys.readouterr().out
    (kind,) = kept.iterdir()
    assert kind.name == "intel-xeon-gold-6530-avx512-bf16-2-threads"
    assert sorted(path.name for path in kind.iterdir()) == [
        "2026-01-01-aaa-attention.json",
        "2026-01-02-bbb-attention.json",
    ]
    assert history.compare_newest(0.1, kept) == 1
    assert "2026-01-01 aaa → 2026-01-02 bbb" in capsys.readouterr().out
    assert history.compare_newest(0.5, kept) == 0


def test_the_newest_of_a_day_is_the_last_measured(history: Any, tmp_path: Path) -> None:
    kept = tmp_path / "history"
    for time, commit, ratio in (("0900", "bbb", 0.5), ("1400", "aaa", 0.7)):
        result = measured(prefill=ratio)
        history.add(folder_with(tmp_path / time, attention=result), commit, f"2026-01-01T{time}", 9.0, kept)
    (kind,) = kept.iterdir()
    assert [path.name[:19] for path in history.stored(kind, "attention")] == [
        "2026-01-01T0900-bbb",
        "2026-01-01T1400-aaa",
    ]


def test_history_takes_no_quick_look(history: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = folder_with(tmp_path / "quick", attention=measured(prefill=0.5) | {"quick": True})
    assert history.add(quick, "aaa", "2026-01-01", 0.1, tmp_path / "history") == 1
    assert "measured with --quick" in capsys.readouterr().out
    assert not (tmp_path / "history").exists()


def test_history_is_drawn(history: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = script(REPOSITORY / "docs" / "images" / "history.py")
    assert picture.draw(tmp_path / "none", tmp_path / "none.svg") == 0
    for day, ratio in (("01", 0.25), ("02", 1.0)):
        result = measured(prefill=ratio, decode=ratio * 4)
        history.add(folder_with(tmp_path / day, attention=result), "aaa", f"2026-01-{day}", 9.0, tmp_path / "history")
    (kind,) = (tmp_path / "history").iterdir()
    assert [ratio for _, ratio in picture.series(kind)["attention"]] == pytest.approx([0.5, 2.0])
    assert picture.draw(tmp_path / "history", tmp_path / "history.svg") == 1
    assert "2026-01-02" in (tmp_path / "history.svg").read_text(encoding="utf-8")
    hook = script(REPOSITORY / "docs" / "measured.py")
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "](images/history.svg)" in hook.on_page_markdown(page, None, None, None, tmp_path / "history.svg")
    assert "history.svg" not in hook.on_page_markdown(page, None, None, None, tmp_path / "none.svg")
