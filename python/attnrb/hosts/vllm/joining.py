"""Edits of single texts, put together to one for a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnrb.ops.edit import NO_EDIT, RULES, Edit, EditArguments, gain_tensor
from attnrb.ops.outliers import Outliers

__all__ = ["RowEdit", "alike", "join_edits"]


class RowEdit(NamedTuple):
    """What is edited in one row of a batch.

    Attributes:
        row: which one.
        queries: its first query among the T of the batch, and one past its last.
        edit: of the row as a batch of one; None leaves it as it is.
    """

    row: int
    queries: tuple[int, int]
    edit: Edit | None


def alike(edits: Sequence[RowEdit]) -> list[list[RowEdit]]:
    """The edits parted into those that one call of the op can have."""
    parts: dict[tuple[object, ...], list[RowEdit]] = {}
    for each in edits:
        edit = each.edit
        kind = (None,) if edit is None else (edit.rule, edit.gain is not None, edit.outliers is not None)
        parts.setdefault(kind, []).append(each)
    return list(parts.values())


def join_edits(edits: Sequence[RowEdit], rows: int, tokens: int, heads: int, device: torch.device) -> EditArguments:
    """One edit of a batch whose other rows take no part.

    Args:
        edits: of some rows, `alike`.
        rows: B.
        tokens: T, the queries of all rows.
        heads: H.
        device: where the layer computes.

    Returns:
        Outliers ``[T, H, C]``, gain ``[B, H]``, key bias ``[B, H or 1, N']`` and first query ``[B]``, as the op takes
        them with a paging; None where nothing is edited.
    """
    given = [(each, each.edit) for each in edits if each.edit is not None]
    if not given:
        return NO_EDIT
    first = given[0][1]
    gain = outliers = None
    if first.gain is not None:
        gain = torch.zeros(rows, heads, dtype=torch.float32, device=device)
        for each, edit in given:
            gain[each.row] = gain_tensor(edit.gain, device)
    if first.outliers is not None:
        found = [(each.queries, Outliers(*edit.outliers)) for each, edit in given if edit.outliers is not None]
        outliers = _join_outliers(found, tokens, heads, device)
    bias, first_query = _join_biases(given, rows, device)
    indices, counts = (None, None) if outliers is None else outliers
    rule = RULES.index(first.rule)
    return EditArguments(indices, counts, gain, rule, bias, first_query)


def _join_outliers(
    found: Sequence[tuple[tuple[int, int], Outliers]], tokens: int, heads: int, device: torch.device
) -> Outliers:
    """``[T, H, C]``, from ``[1, H, M or 1, C]`` of each row."""
    most = max(each.indices.shape[3] for _, each in found)
    indices = torch.full((tokens, heads, most), -1, dtype=torch.int32, device=device)
    counts = torch.zeros(tokens, heads, dtype=torch.int32, device=device)
    for (start, end), each in found:
        indices[start:end, :, : each.indices.shape[3]] = each.indices[0].transpose(0, 1)
        counts[start:end] = each.counts[0].transpose(0, 1)
    return Outliers(indices, counts)


def _join_biases(
    given: Sequence[tuple[RowEdit, Edit]], rows: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """``[B, H or 1, N']`` and ``[B]``; None where no row has any."""
    biased = [(each, edit, edit.key_bias) for each, edit in given if edit.key_bias is not None]
    if not biased:
        return None, None
    heads, slots = (max(bias.shape[axis] for _, _, bias in biased) for axis in (1, 2))
    joined = torch.zeros(rows, heads, slots, dtype=torch.float32, device=device)
    first_query = torch.zeros(rows, dtype=torch.int64, device=device)
    for each, edit, bias in biased:
        joined[each.row, :, : bias.shape[2]] = bias[0]
        if edit.first_query is not None:
            first_query[each.row] = edit.first_query if isinstance(edit.first_query, int) else edit.first_query[0]
    return joined, first_query
