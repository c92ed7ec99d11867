"""Paged attention: against strided attention of the same rows, the dense path, and the NumPy reference."""

from __future__ import annotations

import pytest
import torch
from attnrb import Paging, functional
from attnrb.ops.reference_paging import paged_attention
from paged_problems import DTYPES, gathered, random_problem
from torch import Tensor


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal, and NaN where the other is."""
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def test_dense_path_is_the_reference() -> None:
    """float64, which no kernel serves."""
    for seed in range(100):
        problem = random_problem(seed, longest=60, dtype=torch.float64)
        truth = paged_attention(
            problem.query,
            problem.key,
            problem.value,
            problem.paging,
            edit=problem.edit,
            emit=problem.emit,
            **problem.options,
        )
        result = problem.run()
        torch.testing.assert_close(result.output, torch.from_numpy(truth.output), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.lse, torch.from_numpy(truth.lse), rtol=1e-9, atol=1e-9)
        if result.outliers is not None:
            assert truth.outliers is not None
            assert torch.equal(result.outliers.indices, torch.from_numpy(truth.outliers.indices))
            assert torch.equal(result.outliers.counts, torch.from_numpy(truth.outliers.counts))


def test_without_out_skipped_rows_are_zeros() -> None:
    pool = torch.randn(2, 1, 8, 16)
    paging = Paging(torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([0, 2, 5]), torch.tensor([0, 7]))
    result = functional.attention(torch.randn(5, 2, 16), pool, pool, paging=paging, emit=0.1)
    assert not result.output[:2].any() and bool(result.output[2:].any())
    assert result.outliers is not None
    assert bool((result.outliers.indices[:2] == -1).all())


def test_no_sequences() -> None:
    pool = torch.randn(2, 1, 8, 16)
    paging = Paging(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(0).int())
    result = functional.attention(torch.randn(0, 2, 16), pool, pool, paging=paging, emit=0.1)
    assert result.output.shape == (0, 2, 16) and result.lse.shape == (0, 2)
    assert result.outliers is not None and result.outliers.indices.shape == (0, 2, 9)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_write_keys(dtype: torch.dtype) -> None:
    for seed in range(20):
        problem = random_problem(seed, dtype=dtype)
        blocks, heads, block_rows, width = problem.key.shape
        slots = torch.randperm(blocks * block_rows)[: min(37, blocks * block_rows)]
        slots[::5] = -1
        key = torch.randn(len(slots), 2 * heads, width).to(dtype)[:, ::2]
        value = torch.randn(len(slots), heads, problem.value.shape[3]).to(dtype)
        expected = [problem.key.clone(), problem.value.clone()]
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[0][slot // block_rows, :, slot % block_rows] = key[row]
                expected[1][slot // block_rows, :, slot % block_rows] = value[row]
        functional.write_keys(key, value, problem.key, problem.value, slots)
        assert same_bits(problem.key, expected[0]) and same_bits(problem.value, expected[1])


def test_written_keys_are_read_back() -> None:
    key, value = torch.randn(11, 2, 16), torch.randn(11, 2, 8)
    pools = torch.full((4, 2, 4, 24), torch.nan)
    key_pool, value_pool = pools.split([16, 8], 3)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    slots = torch.arange(11)
    functional.write_keys(key, value, key_pool, value_pool, table[0, slots // 4].long() * 4 + slots % 4)
    assert torch.equal(gathered(key_pool, table[0], 11)[0], key.transpose(0, 1))
    assert torch.equal(gathered(value_pool, table[0], 11)[0], value.transpose(0, 1))
    assert bool(pools[1].isnan().all())
