"""The bench for a GPU, tried on the CPU: everyone runs, is verified and stored, and a wrong output is not timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attnrb import functional
from conftest import REPOSITORY

THREADS = str(torch.get_num_threads())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    # The benches are scripts, not a package: loaded from where they are.
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench" / "python"))
    return importlib.import_module("bench_gpu")


def run(bench: Any, *arguments: str) -> int:
    small = ("--device", "cpu", "--lengths", "40", "--batches", "1", "3", "--seconds", "0.01", "--threads", THREADS)
    return int(bench.main([*small, *arguments]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_kind_runs_is_verified_and_stored(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert run(bench, "--json", str(path)) == 0
    stored = json.loads(path.read_text())
    names = ["prefill batch 1 n40", "source batch 1 n40", "decode batch 1 n40", "decode batch 3 n40"]
    assert [case["name"] for case in stored["cases"]] == [*names, "training batch 1 n40"]
    by_kind = {case["name"].split()[0]: case for case in stored["cases"]}
    assert by_kind["prefill"]["seconds"].keys() == {"attnrb", "sdpa", "flex", "eager"}
    assert by_kind["decode"]["seconds"].keys() == {"attnrb", "sdpa", "flex", "eager"}
    assert by_kind["source"]["seconds"].keys() == {"attnrb", "sdpa", "eager"}
    # FlexAttention has no backward on a CPU, and the bench says so.
    assert by_kind["training"]["seconds"].keys() == {"attnrb", "sdpa", "eager"}
    assert "flex" in by_kind["training"]["missing"]
    printed = capsys.readouterr().out
    assert "flex: FlexAttention does not support backward on CPU" in printed
    assert "3 bars hold" in printed
    compare = importlib.import_module("compare")
    assert compare.compare(stored, stored, 0.1) == []


def test_a_profile_says_what_each_kernel_takes(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert run(bench, "--kinds", "prefill", "--contenders", "attnrb", "sdpa", "--profile", "--json", str(path)) == 0
    (case,) = json.loads(path.read_text())["cases"]
    (own,) = [each for each in case["kernels"] if each["name"] == "attention"]
    assert own["calls"] == 1
    assert 0 < own["share"] <= 1
    assert sum(each["share"] for each in case["kernels"]) == pytest.approx(1.0)
    assert f"{own['share']:.1%}  1 x {own['name']}" in capsys.readouterr().out
    short = importlib.import_module("kernel_profile").short
    assert short("void attnrb::cuda::select_kernel<__nv_bfloat16, 128>(attnrb::Select)") == (
        "select_kernel<__nv_bfloat16, 128>"
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("kind", "op"), [("prefill", "rebalanced"), ("source", "source"), ("training", "rebalanced")])
def test_a_wrong_output_is_not_timed(
    bench: Any, kind: str, op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(functional, f"{op}_attention")

    def wrong(query: torch.Tensor, *others: Any, **options: Any) -> Any:
        output = right(query, *others, **options)
        return (output[0] * 1.1, *output[1:]) if op == "source" else output * 1.1

    monkeypatch.setattr(functional, f"{op}_attention", wrong)
    assert run(bench, "--kinds", kind) == 1
    captured = capsys.readouterr()
    assert f"WRONG RESULT, not timed: {kind} batch 1 n40: attnrb is off" in captured.err
    assert "0 of 0 bars hold" in captured.out


def test_without_a_device_it_says_so_and_fails_where_one_is_required(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for required, status in (("0", 0), ("1", 1)):
        monkeypatch.setenv("ATTNRB_REQUIRE_CUDA", required)
        assert bench.main([]) == status
        assert "skipped: torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("bench")
def test_bits_and_bytes_say_which_keys_are_outliers() -> None:
    gpu_contenders = importlib.import_module("gpu_contenders")
    query, key, value = torch.randn(2, 4, 70, 16) * 2, torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 16)
    outliers = functional.source_attention(query, key, value)[2]
    expected = torch.zeros(2, 4, 70, 70, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(70)).tolist():
        expected[b, h, i, outliers.indices[b, h, i, : outliers.counts[b, h, i]].long()] = True
    assert expected[..., 31].any()  # the sign of the first word
    assert torch.equal(gpu_contenders.held_mask(outliers, 70), expected)
    bits, key_of = gpu_contenders.packed_bits(outliers, 70), torch.arange(70)
    assert bits.shape == (2, 4, 70, 3)
    assert torch.equal((bits[..., key_of // 32] >> (key_of % 32)) & 1 == 1, expected)


@pytest.mark.usefixtures("bench")
def test_the_limit_is_arithmetic() -> None:
    case = importlib.import_module("gpu_cases").Case
    assert case("prefill", 1, 4096).flops == 4 * 32 * 128 * 4096 * 4097 / 2
    assert case("training", 1, 4096).flops == 3.5 * case("prefill", 1, 4096).flops
    assert case("decode", 64, 4096).flops == 4 * 64 * 32 * 128 * 4096
    # One token: keys and values, then queries, output, LSE, counts and ten slots.
    assert case("decode", 1, 4096).bytes(10.0) == 2 * 8 * 4096 * 128 * 2 + 2 * 32 * 128 * 2 + 32 * 4 * 12
    assert [case("prefill", 1, n).at_most for n in (2048, 4096, 16384)] == [None, 1.5, 1.1]
