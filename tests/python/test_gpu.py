"""What only a device can show: streams, graph capture, mixed devices. Skipped, with the reason, where there is none."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from attnrb import Outliers, Paging, functional
from torch import Tensor

REASON = "torch finds no CUDA device (ATTNRB_REQUIRE_CUDA=1 makes this a failure)"


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        if os.environ.get("ATTNRB_REQUIRE_CUDA") == "1":
            pytest.fail(REASON)
        pytest.skip(REASON)


def operands(queries: int, keys: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 8, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64))
    query, key, value = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in shapes)
    return query, key, value


def layers(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    output, lse, outliers = functional.source_attention(query, key, value)
    below = functional.rebalanced_attention(output, key, value, outliers, torch.full((1,), 0.2, device="cuda"))
    return output, lse, outliers.indices, outliers.counts, below, functional.received_attention(query, key)


# Decoding, rows of a chunk, and a prompt, whose dense part is PyTorch's.
@pytest.mark.parametrize("queries", [1, 300, 700])
def test_a_captured_graph_computes_the_same(queries: int) -> None:
    inputs = operands(queries, 700)
    expected = layers(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = layers(*inputs)
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def test_streams_do_not_wait_for_each_other_nor_share_memory() -> None:
    inputs = [operands(257, 513) for _ in range(4)]
    expected = [layers(*each) for each in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[tuple[Tensor, ...]] = []
    for stream, each in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(5):
                result = layers(*each)
            results.append(result)
    torch.cuda.synchronize()
    for got, right in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    """Blocks run in any order and at any time: what they add up must not depend on it."""
    leaves = [each.requires_grad_() for each in operands(700, 900, dtype)]
    gain = torch.full((8,), 0.3, device="cuda", requires_grad=True)
    first: tuple[Tensor, ...] | None = None
    for _ in range(20):
        output, lse, outliers = functional.source_attention(*leaves)
        below = functional.rebalanced_attention(*leaves, outliers, gain)
        received = functional.received_attention(*leaves[:2])
        loss = (output.float() ** 2).sum() + lse.sum() + (below.float() ** 2).sum() + (received**2).sum()
        found = torch.autograd.grad(loss, [*leaves, gain])
        first = first or found
        assert all(torch.equal(came, expected) for came, expected in zip(found, first, strict=True))


def test_mixed_devices_are_refused() -> None:
    query, key, value = operands(3, 5)
    with pytest.raises(ValueError, match=r"key: expected on cuda:0, where query is, got cpu"):
        functional.source_attention(query, key.cpu(), value)


@pytest.mark.parametrize("checks", [False, True])
def test_broken_outlier_rows_are_nan_or_refused(checks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands(4, 9)
    indices = torch.tensor([3, 2], dtype=torch.int32, device="cuda").expand(2, 8, 4, 2).contiguous()
    counts = torch.zeros(2, 8, 4, dtype=torch.int32, device="cuda")
    counts[1, 3, 2] = 2
    call: dict[str, Any] = {"outliers": Outliers(indices, counts), "gain": 0.5}
    if checks:
        monkeypatch.setenv("ATTNRB_CUDA_CHECKS", "1")
        with pytest.raises(ValueError, match="indices: expected each row to ascend strictly"):
            functional.rebalanced_attention(query, key, value, **call)
        return
    output = functional.rebalanced_attention(query, key, value, **call)
    broken = torch.zeros(2, 8, 4, dtype=torch.bool, device="cuda")
    broken[1, 3, 2] = True
    assert output[broken].isnan().all() and output[~broken].isfinite().all()


def paged(table: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Three sequences of 16-row blocks: a prompt, a token, and one that is skipped."""
    pool = torch.linspace(-1, 1, 6 * 2 * 16 * 64, device="cuda").view(6, 2, 16, 64).to(torch.bfloat16)
    paging = Paging(
        torch.tensor(table, dtype=torch.int32, device="cuda"),
        torch.tensor([0, 30, 31, 33], dtype=torch.int32, device="cuda"),
        torch.tensor([30, 40, 0], dtype=torch.int32, device="cuda"),
    )
    query = torch.linspace(-2, 2, 33 * 8 * 64, device="cuda").view(33, 8, 64).to(torch.bfloat16)

    def call() -> Tensor:
        return functional.attention(query, pool, pool, paging=paging).output

    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    output.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return output, expected


def test_keys_in_blocks_are_captured() -> None:
    output, expected = paged([[0, 1, 2], [5, 4, 3], [-9, 99, 7]])
    assert torch.equal(output, expected) and bool(output.isfinite().all())
    assert not output[31:].any()


@pytest.mark.parametrize("block", [-1, 6, 2**31 - 1])
def test_rows_of_broken_tables_are_nan_and_no_others(block: int) -> None:
    whole = paged([[0, 1, 2], [5, 4, 3], [-9, 99, 7]])[0]
    output = paged([[0, 1, 2], [5, block, 3], [-9, 99, 7]])[0]
    assert bool(output[30].isnan().all())
    assert torch.equal(output[:30], whole[:30]) and torch.equal(output[31:], whole[31:])
