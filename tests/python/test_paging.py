"""Paged attention: against strided attention of the same rows, the dense path, and the NumPy reference."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from attnrb import Attended, Edit, Paging, functional
from attnrb.ops.library import instruction_set
from attnrb.ops.reference_paging import paged_attention
from library_kernels import ON_CUDA
from paged_problems import DTYPES, PagedProblem, gathered, random_problem
from tolerance import one_rounding
from torch import Tensor

pytestmark = pytest.mark.emulated
CASES, PER_TEST = (480, 240) if ON_CUDA else (2400, 300)  # the emulated device takes its time
EVERY = 5 if ON_CUDA else 1  # one in so many of the other problems, prime to the dtypes
SAMPLE = int(os.environ.get("ATTNRB_TEST_GRADIENT_SAMPLE", "1"))  # one in so many, prime to the dtypes


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal, and NaN where the other is."""
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def adds_in_order(problem: PagedProblem, rows: slice, length: int) -> bool:
    """Whether the blocks of a sequence leave the order of additions as a strided call has it.

    Pair products of bfloat16 add two keys at a time, of one block; a long decode is cut into other spans. On CUDA the
    keys of a strided call are split otherwise, or its dense part is a kernel of PyTorch's.
    """
    if ON_CUDA:
        return False
    group = problem.query.shape[1] // problem.key.shape[1]
    queries = rows.stop - rows.start
    if queries > 1 and queries * group > 16:
        return True
    seeing = problem.options["visibility"]
    even = problem.key.shape[2] % 2 == 0 and seeing.window is None and seeing.chunk is None
    pairs = problem.query.dtype == torch.bfloat16 and instruction_set() in ("avx512_bf16", "neon_bf16")
    return length <= 512 and (even or not pairs)


def assert_close(found: Tensor, expected: Tensor, value: Tensor, edit: Edit | None, dtype: torch.dtype) -> None:
    """Two orders of additions of one kernel: each off by roundings of its products, of the size of the values."""
    strength = 1.0 if edit is None or edit.gain is None else 1 + float(torch.as_tensor(edit.gain).abs().max())
    size = float(value.float().abs().max()) * strength
    assert float((found.float() - expected.float()).abs().max()) <= 4 * one_rounding(dtype) * size


def assert_same_outliers(result: Attended, expected: Attended, rows: slice) -> None:
    assert result.outliers is not None and expected.outliers is not None
    indices, counts = (each[0].transpose(0, 1) for each in expected.outliers)
    found = result.outliers.indices[rows]
    assert torch.equal(found[..., : indices.shape[2]], indices)
    assert bool((found[..., indices.shape[2] :] == -1).all())
    assert torch.equal(result.outliers.counts[rows], counts)


def compare(problem: PagedProblem, result: Attended) -> None:
    for b, rows, length in problem.sequences():
        expected = problem.strided(b, rows, length)
        output, lse = expected.output[0].transpose(0, 1), expected.lse[0].transpose(0, 1)
        if not adds_in_order(problem, rows, length):
            values = problem.gathered(problem.value, b, length)
            assert_close(result.output[rows], output, values, problem.edit, problem.query.dtype)
            torch.testing.assert_close(result.lse[rows], lse, rtol=1e-5, atol=1e-5)
            if problem.emit is not None:
                assert_same_outliers(result, expected, rows)
            continue
        assert same_bits(result.output[rows], output)
        assert same_bits(result.lse[rows], lse)
        if problem.emit is not None:
            assert_same_outliers(result, expected, rows)


@pytest.mark.parametrize("first", range(0, CASES, PER_TEST))
def test_as_strided(first: int) -> None:
    for seed in range(first, first + PER_TEST, SAMPLE):
        problem = random_problem(seed)
        heads, width = problem.query.shape[1], problem.value.shape[3]
        fill = 7.0
        out = torch.full((problem.query.shape[0], heads, width + 3), fill, dtype=problem.query.dtype)[..., :width]
        result = problem.run(out)
        assert result.output is out
        try:
            compare(problem, result)
        except AssertionError as error:
            raise AssertionError(f"problem {seed}") from error
        idle = torch.ones(problem.query.shape[0], dtype=torch.bool)
        for _, rows, _ in problem.sequences():
            idle[rows] = False
        assert bool((out[idle] == fill).all()), "rows of skipped sequences were touched"
        assert bool((result.lse[idle] == -torch.inf).all())
        if result.outliers is not None:
            assert not result.outliers.counts[idle].any() and bool((result.outliers.indices[idle] == -1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(dtype: torch.dtype) -> None:
    for seed in range(0, 60, EVERY):
        problem = random_problem(seed, longest=60, dtype=dtype)
        truth = paged_attention(
            problem.query, problem.key, problem.value, problem.paging, edit=problem.edit, **problem.options
        )
        found = problem.run().output
        strided = torch.zeros_like(found)
        for b, rows, length in problem.sequences():
            strided[rows] = problem.strided(b, rows, length).output[0].transpose(0, 1)
        size = max(1.0, float(np.abs(truth.output).max(initial=0.0)))
        off, earned = (
            float(np.abs(each.double().numpy() - truth.output).max(initial=0.0)) for each in (found, strided)
        )
        assert off <= 2 * earned + one_rounding(dtype) * size, f"problem {seed}"


def test_dense_path_is_the_reference() -> None:
    """float64, which no kernel serves."""
    for seed in range(0, 100, EVERY):
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


def test_long_decodes() -> None:
    """Cut into spans that several threads attend to, beside prompts; against strided calls of the same rows."""
    for seed in range(0, 8, EVERY):
        problem = random_problem(seed, longest=1300)
        result = problem.run()
        for b, rows, length in problem.sequences():
            expected = problem.strided(b, rows, length).output[0].transpose(0, 1)
            values = problem.gathered(problem.value, b, length)
            assert_close(result.output[rows], expected, values, problem.edit, problem.query.dtype)


def test_company_changes_nothing() -> None:
    """A sequence has the same bits alone as among others; on CUDA, the same within rounding."""
    for seed in range(0, 12, EVERY):
        problem = random_problem(seed, longest=900)
        together = problem.run()
        for b, rows, _ in problem.sequences():
            alone = problem.alone(b, rows).run()
            if ON_CUDA:  # which shares its keys among as many blocks as it leaves idle
                values = problem.gathered(problem.value, b, problem.paging.seq_lens[b].item())
                assert_close(alone.output, together.output[rows], values, problem.edit, problem.query.dtype)
                continue
            assert same_bits(alone.output, together.output[rows])
            assert same_bits(alone.lse, together.lse[rows])


def test_threads_change_nothing() -> None:
    problems = [random_problem(seed, longest=700) for seed in range(0, 12, EVERY)]
    torch.set_num_threads(2)
    several = [problem.run() for problem in problems]
    torch.set_num_threads(1)
    try:
        for problem, expected in zip(problems, several, strict=True):
            assert same_bits(problem.run().output, expected.output)
    finally:
        torch.set_num_threads(2)


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
