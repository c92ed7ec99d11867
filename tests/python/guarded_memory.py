"""Tensors between pages that nobody may touch: a read or write outside ends the process.

As a program it calls paged attention and its writer on such tensors, with tables that are right and with hostile ones.

    python tests/python/guarded_memory.py FIRST COUNT    # of the problems of paged_problems.py
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import replace

import torch
from attnrb import Edit, Outliers, Paging, functional
from paged_problems import PagedProblem, random_problem
from torch import Tensor

_PAGE = mmap.PAGESIZE
_MAPS: list[mmap.mmap] = []


def guarded(tensor: Tensor, *, at_end: bool) -> Tensor:
    """A copy with the same strides whose last byte, or else whose first, is next to such a page."""
    if tensor.numel() == 0:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = extent * tensor.element_size()
    room = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, room + 2 * _PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (address, address + _PAGE + room):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    _MAPS.append(memory)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=_PAGE + (room - size if at_end else 0))
    flat.copy_(tensor.as_strided((extent,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


def guarded_problem(problem: PagedProblem, *, at_end: bool) -> PagedProblem:
    def copy(each: Tensor) -> Tensor:
        return guarded(each, at_end=at_end)

    tables, edit, options = problem.paging, problem.edit, dict(problem.options)
    if options["sinks"] is not None:
        options["sinks"] = copy(options["sinks"])
    if edit is not None:
        outliers, gain, bias, first = edit.outliers, edit.gain, edit.key_bias, edit.first_query
        edit = Edit(
            None if outliers is None else Outliers(*map(copy, outliers)),
            copy(gain) if isinstance(gain, Tensor) else gain,
            edit.rule,
            None if bias is None else copy(bias),
            copy(first) if isinstance(first, Tensor) else first,
        )
    paging = Paging(copy(tables.block_table), copy(tables.query_starts), copy(tables.seq_lens))
    return PagedProblem(
        copy(problem.query), copy(problem.key), copy(problem.value), paging, edit, problem.emit, options
    )


def same(found: Tensor, expected: Tensor) -> bool:
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def hostile(problem: PagedProblem) -> list[Paging]:
    """Tables that lead outside, one thing wrong in each."""
    tables = problem.paging
    blocks, rows = problem.key.shape[0], problem.key.shape[2]
    found = []
    for number in (-1, -(2**31), blocks, 2**31 - 1):
        found.append(replace(tables, block_table=torch.full_like(tables.block_table, number)))
    beyond = tables.block_table.shape[1] * rows + 1
    for length in (-1, beyond, 2**31 - 1):
        found.append(replace(tables, seq_lens=torch.full_like(tables.seq_lens, length)))
    starts = tables.query_starts
    for wrong in (starts + 1, starts * 2 + 1, -starts - 1, starts[:-1], torch.cat([starts, starts[-1:]])):
        found.append(replace(tables, query_starts=wrong))
    found.append(replace(tables, block_table=tables.block_table[:, :0]))
    return found


def check(seed: int, *, at_end: bool) -> None:
    problem = random_problem(seed, longest=150)
    own = guarded_problem(problem, at_end=at_end)
    expected, out = problem.run(), torch.zeros_like(problem.run().output)
    result = own.run(guarded(out, at_end=at_end))
    assert same(result.output, expected.output), f"problem {seed}"
    assert same(result.lse, expected.lse), f"problem {seed}"
    if problem.sequences():
        for tables in hostile(problem):
            wrong = Paging(*(guarded(each, at_end=at_end) for each in vars(tables).values()))
            try:
                replace(own, paging=wrong).run()
            except ValueError:
                continue
            raise AssertionError(f"problem {seed}: hostile tables were taken: {tables}")
    rows = problem.key.shape[0] * problem.key.shape[2]
    slots = torch.randperm(rows)[:7]
    key, value = (torch.ones(len(slots), each.shape[1], each.shape[3]).to(each.dtype) for each in (own.key, own.value))
    written = [guarded(each, at_end=at_end) for each in (key, value, own.key, own.value, slots)]
    functional.write_keys(*written)
    for number in (-2, rows, 2**62):
        written[4][-1] = number
        try:
            functional.write_keys(*written)
        except ValueError:
            continue
        raise AssertionError(f"problem {seed}: the slot {number} was taken")


def main() -> None:
    """Exit status 0 when all went well."""
    first, count = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        check(seed, at_end=seed % 4 != 0)
    # The pages go with the process: freeing them while tensors live on would be the test's own fault.
    os._exit(0)


if __name__ == "__main__":
    main()
