"""Same inputs, same bits: with one thread or many, run to run, and from several Python threads at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attnrb
import pytest
import torch
from attnrb import Visibility, functional
from attnrb.ops import library
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# name: (batch, heads, key heads, queries, keys, width). Long enough that every one is split among threads.
SHAPES = {
    "prefill": (1, 4, 2, 300, 300, 64),
    "odd prefill": (2, 3, 1, 131, 197, 40),
    "decode": (1, 8, 2, 1, 3000, 64),
    "decode of a batch": (3, 4, 4, 1, 700, 32),
    "a few rows": (1, 2, 1, 5, 1500, 128),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, key_heads, queries, keys, width = SHAPES[shape]
    query = torch.randn(batch, heads, queries, width) * 2
    key, value = torch.randn(2, batch, key_heads, keys, width)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def everything(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> list[Tensor]:
    output, lse, outliers = functional.source_attention(query, key, value, **options)
    below = functional.rebalanced_attention(query, key, value, outliers, 0.3, **options)
    normalised = functional.rebalanced_attention(query, key, value, outliers, 0.3, normalize=True, **options)
    return [output, lse, *outliers, below, normalised, functional.received_attention(query, key, **options)]


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def test_the_inputs_have_outliers() -> None:
    """Else the tests below would compare little."""
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        assert functional.source_attention(*inputs(shape, dtype))[2].counts.sum() > 0


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_do_not_change_a_bit(shape: str, dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    queries, keys = SHAPES[shape][3:5]
    visions: list[Visibility | None] = [None, Visibility(window=37), Visibility(mask=torch.rand(queries, keys) > 0.2)]
    for visibility in visions:
        found = {}
        for count in (1, 2, 4, 3):
            torch.set_num_threads(count)
            found[count] = bits(everything(*tensors, visibility=visibility))
        assert found[1] == found[2] == found[4] == found[3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_do_not_differ(shape: str, dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    first = bits(everything(*tensors))
    everything(*(torch.full_like(tensor, torch.nan) for tensor in tensors))  # leaves NaN in the scratch
    for _ in range(3):
        assert bits(everything(*tensors)) == first
    attnrb.clear_scratch()
    assert bits(everything(*tensors)) == first


def test_dense_ops_do_not_differ(threads: None) -> None:
    weights = torch.rand(2, 3, 65, 129).softmax(-1)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        mask = functional.outlier_mask(weights, 0.008)
        found.append(bits([mask, functional.rebalance(weights, mask, [0.1, 0.2, 0.3], normalize=True)]))
    assert found[0] == found[1] == found[2]


def test_python_threads_do_not_disturb_each_other() -> None:
    """Concurrent calls of different sizes, which would trample a shared scratch."""
    work = [inputs(shape, dtype) for shape, dtype in itertools.product(SHAPES, DTYPES)]
    expected = [bits(everything(*tensors)) for tensors in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert [bits(each) for each in pool.map(lambda tensors: everything(*tensors), work)] == expected


def test_scratch_is_kept_and_freed() -> None:
    tensors = inputs("prefill", torch.bfloat16)
    attnrb.clear_scratch()
    assert library.scratch_bytes() == 0
    everything(*tensors)
    kept = library.scratch_bytes()
    assert kept > 0
    for _ in range(20):
        everything(*tensors)
    assert library.scratch_bytes() == kept  # neither grown nor leaked
    attnrb.clear_scratch()
    assert library.scratch_bytes() == 0


def test_scratch_does_not_grow_with_the_square_of_the_length() -> None:
    """No buffer of size M times N anywhere: four times the length, at most four times the scratch."""
    kept = []
    for length in (512, 2048):
        attnrb.clear_scratch()
        query, key, value = torch.randn(3, 1, 2, length, 32)
        everything(query, key, value)
        kept.append(library.scratch_bytes())
    assert kept[1] <= 4 * kept[0]
