"""Paged attention drawn at random over every option: blocks shared and poisoned, sequences of every kind in one call.

Rows that no table names are NaN, and so are the entries of tables that nobody may read: what reaches a result shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from attnrb import Attended, Edit, Outliers, Paging, Visibility, functional
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = ((1, 1), (2, 1), (4, 2), (6, 2), (8, 1), (3, 3), (9, 3))
WIDTHS = ((8, 8), (16, 16), (24, 40), (33, 7), (64, 64), (80, 48), (128, 128))
BLOCK_ROWS = (8, 16, 32, 64, 128, 1, 3, 7, 24, 96)
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1))  # of blocks, heads and rows in memory


@dataclass
class PagedProblem:
    """One call of `functional.attention` with a paging."""

    query: Tensor
    key: Tensor
    value: Tensor
    paging: Paging
    edit: Edit | None
    emit: float | None
    options: dict[str, Any]  # visibility, scale, softcap, sinks

    def run(self, out: Tensor | None = None) -> Attended:
        return functional.attention(
            self.query,
            self.key,
            self.value,
            edit=self.edit,
            emit=self.emit,
            paging=self.paging,
            out=out,
            **self.options,
        )

    def sequences(self) -> list[tuple[int, slice, int]]:
        """Number, rows and keys of each sequence that is not skipped and has queries."""
        starts, lengths = self.paging.query_starts.tolist(), self.paging.seq_lens.tolist()
        each = ((b, slice(starts[b], starts[b + 1]), length) for b, length in enumerate(lengths))
        return [(b, rows, length) for b, rows, length in each if length and rows.stop > rows.start]

    def gathered(self, pool: Tensor, sequence: int, length: int) -> Tensor:
        """The rows of one sequence, ``[1, Hk, length, width]``."""
        return gathered(pool, self.paging.block_table[sequence], length)

    def strided(self, sequence: int, rows: slice, length: int) -> Attended:
        """The same of one sequence by a call that knows no blocks."""
        return functional.attention(
            self.query[rows].transpose(0, 1)[None],
            self.gathered(self.key, sequence, length),
            self.gathered(self.value, sequence, length),
            edit=self._edit_of(sequence, rows),
            emit=self.emit,
            **self.options,
        )

    def alone(self, sequence: int, rows: slice) -> PagedProblem:
        """One sequence in a call of its own."""
        mine, tables = slice(sequence, sequence + 1), self.paging
        starts = tables.query_starts[sequence : sequence + 2] - tables.query_starts[sequence]
        edit = self._edit_of(sequence, rows)
        if edit is not None and edit.outliers is not None:
            outliers = Outliers(*(each[0].transpose(0, 1) for each in edit.outliers))
            edit = Edit(outliers, edit.gain, edit.rule, edit.key_bias, edit.first_query)
        paging = Paging(tables.block_table[mine], starts, tables.seq_lens[mine])
        return PagedProblem(self.query[rows], self.key, self.value, paging, edit, self.emit, self.options)

    def _edit_of(self, sequence: int, rows: slice) -> Edit | None:
        edit = self.edit
        if edit is None:
            return None
        mine = slice(sequence, sequence + 1)
        outliers, gain, bias, first = edit.outliers, edit.gain, edit.key_bias, edit.first_query
        if outliers is not None:
            outliers = Outliers(*(each[rows].transpose(0, 1)[None].contiguous() for each in outliers))
        if isinstance(gain, Tensor) and gain.dim() == 2:
            gain = gain[sequence]
        if bias is not None and bias.shape[0] > 1:
            bias = bias[mine]
        if isinstance(first, Tensor):
            first = first[mine]
        return Edit(outliers, gain, edit.rule, bias, first)


def gathered(pool: Tensor, table: Tensor, length: int) -> Tensor:
    rows = torch.arange(length)
    block_rows = pool.shape[2]
    return pool[table[rows // block_rows].long(), :, rows % block_rows].transpose(0, 1)[None].contiguous()


def random_problem(seed: int, *, longest: int = 200, dtype: torch.dtype | None = None) -> PagedProblem:
    """Always the same one for the same arguments."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[seed % 3] if dtype is None else dtype
    heads, key_heads = draw.choice(HEADS)
    width, value_width = draw.choice(WIDTHS)
    block_rows = draw.choice(BLOCK_ROWS)
    pairs = [_lengths(draw, longest) for _ in range(draw.randint(1, 6))]
    queries, lengths = [m for m, _ in pairs], [n for _, n in pairs]
    table, blocks, used = _blocks(draw, generator, lengths, block_rows)
    key, value = _pools(draw, generator, (blocks, key_heads, block_rows), (width, value_width), used, dtype)
    starts = torch.tensor([0, *queries]).cumsum(0)
    paging = Paging(
        table,
        starts.to(draw.choice((torch.int32, torch.int64))),
        torch.tensor(lengths, dtype=draw.choice((torch.int32, torch.int64))),
    )
    rows = sum(queries)
    scale = draw.choice((None, None, None, 0.3, -0.2, 0.0))
    strength = draw.choice((0.5, 2.0, 2.0)) * (1.0 if scale is None else 3.0)
    fused = torch.randn(rows, heads * width + draw.choice((0, 5)), generator=generator) * strength
    query = fused.to(dtype)[:, : heads * width].unflatten(1, (heads, width))
    options = {
        "visibility": Visibility(
            causal=draw.random() < 0.9,
            window=draw.choice((None, None, 1, 9, 40)),
            chunk=draw.choice((None, None, None, 5, 32)),
        ),
        "scale": scale,
        "softcap": draw.choice((None, None, None, 4.0)),
        "sinks": torch.randn(heads, generator=generator) if draw.random() < 0.3 else None,
    }
    edit = _edit(draw, generator, rows, heads, lengths) if draw.random() < 0.8 else None
    emit = draw.choice((None, 0.01, 0.05, 0.3))
    return PagedProblem(query, key, value, paging, edit, emit, options)


def _lengths(draw: random.Random, longest: int) -> tuple[int, int]:
    """Queries and keys of a sequence: decode, a few at once, a chunk, a whole prompt, one that is skipped or idle."""
    length = draw.randint(1, longest)
    kind = draw.random()
    if kind < 0.4:
        return 1, length
    if kind < 0.55:
        return min(draw.randint(2, 6), length), length
    if kind < 0.7:
        return draw.randint(1, length), length
    if kind < 0.85:
        return length, length
    if kind < 0.93:
        return draw.randint(0, 5), 0
    return 0, length


def _blocks(
    draw: random.Random, generator: torch.Generator, lengths: list[int], block_rows: int
) -> tuple[Tensor, int, Tensor]:
    """A table over blocks in a random order, how many there are, and which rows of them are used."""
    needed = [-(-length // block_rows) for length in lengths]
    spare = draw.randint(0, 3)
    blocks = max(sum(needed) + spare, 1)
    order = torch.randperm(blocks, generator=generator)
    width = max(needed) + draw.randint(0, 2)
    table = torch.randint(-(2**31), 2**31 - 1, (len(lengths), width), generator=generator).to(torch.int32)
    used = torch.zeros(blocks, block_rows, dtype=torch.bool)
    taken = 0
    for b, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        own = order[taken : taken + count]
        taken += count
        table[b, :count] = own.to(torch.int32)
        shared = draw.randint(0, min(count, needed[0])) if b and draw.random() < 0.3 else 0
        table[b, :shared] = table[0, :shared]  # a common prefix
        for j in range(count):
            used[int(table[b, j]), : length - j * block_rows] = True
    return table, blocks, used


def _pools(
    draw: random.Random,
    generator: torch.Generator,
    sizes: tuple[int, int, int],
    widths: tuple[int, int],
    used: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values: axes in any order in memory, in one tensor or two, NaN where nobody looks."""
    order = draw.choice(ORDERS)
    joined = draw.random() < 0.5
    stored = [sizes[axis] for axis in order]
    back = [order.index(axis) for axis in range(3)]
    columns = [sum(widths)] if joined else list(widths)
    pools = [torch.randn(*stored, each, generator=generator).to(dtype).permute(*back, 3) for each in columns]
    for pool in pools:
        pool.masked_fill_(~used[:, None, :, None], torch.nan)
    return tuple(pools[0].split(list(widths), 3)) if joined else (pools[0], pools[1])  # type: ignore[return-value]


def _edit(draw: random.Random, generator: torch.Generator, rows: int, heads: int, lengths: list[int]) -> Edit | None:
    sequences, most = len(lengths), max(*lengths, 1)
    fields: dict[str, Any] = {"rule": draw.choice(("none", "row", "rest"))}
    if draw.random() < 0.75:
        capacity = draw.choice((1, 4, 20))
        slots = torch.rand(rows, heads, most + capacity, generator=generator).argsort(-1)[..., :capacity]
        counts = torch.randint(0, capacity + 1, (rows, heads), generator=generator)
        indices = slots.sort(-1).values.masked_fill(torch.arange(capacity) >= counts[..., None], -1)
        fields["outliers"] = Outliers(indices.to(torch.int32), counts.to(torch.int32))
    if "outliers" in fields or draw.random() < 0.2:
        shape = draw.choice(((1,), (heads,), (sequences, heads)))
        fields["gain"] = torch.rand(*shape, generator=generator) * draw.choice((0.5, 4.0, -0.9))
    if draw.random() < 0.4:
        shape = (draw.choice((1, sequences)), draw.choice((1, heads)), draw.randint(0, most + 20))
        bias = torch.randn(*shape, generator=generator) * 2
        if draw.random() < 0.4:
            bias = bias.masked_fill(torch.rand(*shape, generator=generator) < 0.2, -torch.inf)
        fields["key_bias"] = bias
        first = torch.randint(0, most, (sequences,), generator=generator)
        fields["first_query"] = draw.choice((None, draw.randint(0, most), first))
    return Edit(**fields) if len(fields) > 1 else None
