"""Where keys and values of a serving engine lie: in blocks, found through a table, for queries of many sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrb.ops.shown import shown_fields
from attnrb.ops.visibility import VisibilityArguments, describe

__all__ = ["Layout", "Paging", "PagingArguments", "check_paging", "check_seeing", "paging_arguments"]


@dataclass(frozen=True, eq=False, repr=False)
class Paging:
    """Sequences whose queries follow each other and whose keys and values lie in blocks of P rows.

    Key j of sequence b is row ``j mod P`` of block ``block_table[b, j // P]``. Sequence b has the query rows
    ``query_starts[b]`` to ``query_starts[b + 1]``, m of them, and query i of them stands at slot ``seq_lens[b] - m +
    i``: its last query is on its last key. Sequences may share blocks. Nothing but the rows that the tables name is
    read.

    Attributes:
        block_table: int32 ``[B, W]``. Entries behind the last block of a sequence may be anything.
        query_starts: int32 or int64 ``[B + 1]``: 0 first, ascending, T last.
        seq_lens: int32 or int64 ``[B]``: how many keys each sequence has, those of its queries included. A sequence
            with 0 is skipped, whatever queries it has.

    What stands in the tables is checked before anything is read through them. On CUDA nothing waits for the device:
    rows of a sequence whose tables break the rules become NaN there, or are refused where ``ATTNRB_CUDA_CHECKS=1`` is
    set.

    Raises:
        TypeError: an attribute has the wrong type or dtype.
        ValueError: a tensor has the wrong rank.
    """

    block_table: Tensor
    query_starts: Tensor
    seq_lens: Tensor

    def __post_init__(self) -> None:
        slots = (torch.int32, torch.int64)
        for name, dtypes, rank, expected in (
            ("block_table", (torch.int32,), 2, "an int32 tensor [B, W]"),
            ("query_starts", slots, 1, "an int32 or int64 tensor [B + 1]"),
            ("seq_lens", slots, 1, "an int32 or int64 tensor [B]"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype not in dtypes:
                raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
            if value.dim() != rank:
                raise ValueError(f"{name}: expected {expected}, got the shape {tuple(value.shape)}")

    def __repr__(self) -> str:
        return shown_fields(self, vars(self))


class PagingArguments(NamedTuple):
    """A paging as the ops take it, under the names of their arguments."""

    block_table: Tensor
    query_starts: Tensor
    seq_lens: Tensor


def paging_arguments(paging: Any) -> PagingArguments:
    """What an op is told.

    Raises:
        TypeError: ``paging`` is no `Paging`.
    """
    if not isinstance(paging, Paging):
        raise TypeError(f"paging: expected a Paging or None, got {describe(paging)}")
    return PagingArguments(paging.block_table, paging.query_starts, paging.seq_lens)


class Layout(NamedTuple):
    """A checked paging, on the host."""

    starts: list[int]
    lengths: list[int]


def check_paging(paging: PagingArguments, rows: int, blocks: int, block_rows: int) -> Layout:
    """Refuse tables that lead outside the ``blocks`` of ``block_rows`` rows, or that do not fit ``rows`` queries.

    Raises:
        ValueError: naming the table.
    """
    table, sequences = paging.block_table, paging.seq_lens.shape[0]
    if paging.query_starts.shape[0] != sequences + 1:
        raise ValueError(
            f"query_starts: expected the shape [B + 1] = [{sequences + 1}], got {tuple(paging.query_starts.shape)}"
        )
    if table.shape[0] != sequences:
        raise ValueError(f"block_table: expected [B, W] with B = {sequences}, got {tuple(table.shape)}")
    if block_rows < 1:
        raise ValueError("key: expected blocks of at least one row")
    starts, lengths = paging.query_starts.tolist(), paging.seq_lens.tolist()
    if starts[0] != 0 or starts[-1] != rows:
        raise ValueError(f"query_starts: expected 0 first and T = {rows} last, got {starts[0]} and {starts[-1]}")
    for b, length in enumerate(lengths):
        queries = starts[b + 1] - starts[b]
        if queries < 0:
            raise ValueError(f"query_starts: expected ascending numbers, got {starts[b + 1]} after {starts[b]}")
        if not 0 <= length <= table.shape[1] * block_rows:
            raise ValueError(
                f"seq_lens: expected numbers from 0 to W P = {table.shape[1] * block_rows}, got {length} for sequence "
                f"{b}"
            )
        if length and queries > length:
            raise ValueError(
                f"seq_lens: expected at least the queries of each sequence, got {length} for the {queries} of sequence "
                f"{b}"
            )
        needed = table[b, : -(-length // block_rows)]
        if needed.numel() and not bool(((needed >= 0) & (needed < blocks)).all()):
            raise ValueError(f"block_table: expected numbers from 0 to {blocks - 1}, got another for sequence {b}")
    return Layout(starts, lengths)


def check_seeing(visibility: VisibilityArguments) -> None:
    """Refuse what paging says itself.

    Raises:
        ValueError: naming the option.
    """
    for name in ("query_offset", "query_offsets", "key_offset", "key_start", "key_end", "mask"):
        value = getattr(visibility, name)
        if value is not None and not (name == "key_offset" and isinstance(value, int) and value == 0):
            shown = "query_offset" if name == "query_offsets" else name
            raise ValueError(f"{shown}: expected none with paging, which says where queries and keys are")
