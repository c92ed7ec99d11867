"""Attention of one layer for a batch whose requests have policies of their own. Nothing here knows vLLM.

Note: [Shares of a batch]
Each policy of a batch says what it wants of a layer for its own rows: a `Share`. Rows that a layer leaves as they are
have one share, whatever their policies do elsewhere. `Merging` makes as few calls of the op of them as it can, mostly
one. A call that serves some rows only is told that the others have no keys: the op skips them and leaves their output
as it is. Which sequences a call serves is a tensor of lengths, made once a step for all layers.

A policy whose plan looks at no keys (`LayerPlan.reads_keys`) has one session for all its rows, which sees a
`BatchView`: the edit that it gives is one for the batch. Any other policy has a session for each row, which sees the
row's queries and gathered keys as in a forward of its own, and the edits are put together. A `Mixture`, whose weights
depend on where each row's attention goes, is computed row by row, behind the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrb.hosts.ragged import BatchView
from attnrb.hosts.vllm.batch import Batch, Group
from attnrb.hosts.vllm.joining import RowEdit, alike, join_edits
from attnrb.hosts.vllm.merging import Merging, Share
from attnrb.ops import functional
from attnrb.ops.edit import NO_EDIT, EditArguments, edit_arguments
from attnrb.ops.outliers import Outliers
from attnrb.ops.paged import attend_blocks
from attnrb.ops.paging import Paging, PagingArguments, paging_arguments
from attnrb.ops.scores import score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments
from attnrb.policies.base import LayerPlan, LayerView, Mixture, Session

__all__ = ["Forward", "Layer", "LayerScores", "RowView", "Step", "attend"]


class LayerScores:
    """How a layer's products become scores, and which of them count: the same in every step.

    Args:
        window: how many slots back a query sees, its own included; None: all.
        scale: factor on the products; None: ``1 / sqrt(D)``.
        softcap: bound of the scores; None or 0: none.
        sinks: ``[H]``, the model's own.

    Attributes:
        named: as `LayerView.scores` has it.
        visibility: as the op takes it.
        scoring: likewise.
    """

    def __init__(self, window: int | None, scale: float | None, softcap: float | None, sinks: Tensor | None) -> None:
        self.named: Mapping[str, Any] = {
            "visibility": Visibility(window=window),
            "scale": scale,
            "softcap": softcap or None,
            "sinks": sinks,
        }
        self.visibility = visibility_arguments(self.named["visibility"])
        self.scoring = score_arguments(scale, softcap, sinks)


class Layer(NamedTuple):
    """One layer's attention in one step: what the op is told.

    Attributes:
        number: which layer.
        query: ``[T, H, D]``.
        key: ``[blocks, Hk, P, D]``, new keys included.
        value: ``[blocks, Hk, P, Dv]``.
        scores: how products become scores.
        out: ``[T, H, Dv]``.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    scores: LayerScores
    out: Tensor


class Step:
    """Where the queries and keys of a step lie, for the layers that share a block table.

    Attributes:
        paging: of all sequences.
        starts: ``query_starts`` as numbers.
        lengths: ``seq_lens`` as numbers.
    """

    def __init__(self, paging: Paging) -> None:
        self.paging = paging_arguments(paging)
        self._served: dict[tuple[int, ...], PagingArguments] = {}

    @cached_property
    def starts(self) -> list[int]:
        found: list[int] = self.paging.query_starts.tolist()
        return found

    @cached_property
    def lengths(self) -> list[int]:
        found: list[int] = self.paging.seq_lens.tolist()
        return found

    def of(self, rows: tuple[int, ...]) -> PagingArguments:
        """The same for these rows: the others have no keys."""
        lengths = self.paging.seq_lens
        if len(rows) == lengths.shape[0]:
            return self.paging
        if rows not in self._served:
            index = torch.tensor(rows, dtype=torch.int64, device=lengths.device)
            own = torch.zeros_like(lengths)
            own[index] = lengths[index]
            self._served[rows] = self.paging._replace(seq_lens=own)
        return self._served[rows]

    def queries(self, row: int) -> tuple[int, int]:
        """The first query of a row, and one past its last."""
        return self.starts[row], self.starts[row + 1]


class Forward:
    """One forward of the model: the batch, and a session for each policy, or for each of its rows.

    Attributes:
        batch: what is asked for.
        merging: puts the shares of each layer together.
        sessions: for each group of the batch.
    """

    def __init__(self, batch: Batch, step: Step) -> None:
        self.batch = batch
        self.merging = Merging(step.paging.query_starts)
        self.sessions: list[Session | list[Session]] = []
        for group in batch.groups:
            assert group.plan is not None
            if group.plan.reads_keys:
                self.sessions.append([group.plan.begin(request) for request in group.requests])
            else:
                self.sessions.append(group.plan.begin(group.request))
        self._alone: dict[int, list[Session]] = {}

    def alone(self, number: int) -> list[Session]:
        """Sessions for each row of a group whose policy has one for all of them."""
        if number not in self._alone:
            group = self.batch.groups[number]
            assert group.plan is not None
            self._alone[number] = [group.plan.begin(request) for request in group.requests]
        return self._alone[number]


class RowView(LayerView):
    """One row of a batch, as in a forward of its own; its keys are gathered where someone looks at them."""

    __slots__ = ("_gathered", "_pool", "_step", "queries", "row")

    def __init__(self, layer: Layer, step: Step, row: int) -> None:
        first, end = step.queries(row)
        self.layer = layer.number
        self.query = layer.query[first:end].transpose(0, 1)[None]
        self.heads = self.query.shape[1]
        self.device = self.query.device
        seen = Visibility(
            query_offset=step.lengths[row] - (end - first), window=layer.scores.named["visibility"].window
        )
        scores = {**layer.scores.named, "visibility": seen}
        self._scores = lambda: scores
        self._pool, self._step, self.row, self.queries = layer.key, step, row, (first, end)
        self._gathered: Tensor | None = None

    @property
    def key(self) -> Tensor:  # type: ignore[override]
        """``[1, Hk, N, D]``, cached keys included."""
        if self._gathered is None:
            self._gathered = self.gather(self._pool)
        return self._gathered

    def gather(self, pool: Tensor) -> Tensor:
        """This row's keys or values ``[1, Hk, N, D]``, out of their blocks."""
        length, rows = self._step.lengths[self.row], pool.shape[2]
        blocks = self._step.paging.block_table[self.row, : -(-length // rows)].long()
        taken = pool[blocks].transpose(0, 1)
        return taken.reshape(pool.shape[1], -1, pool.shape[3])[None, :, :length]


def attend(layer: Layer, step: Step, forward: Forward) -> None:
    """Write a layer's attention into ``layer.out``, each row under its policy: see Note: [Shares of a batch]."""
    taking, left = forward.batch.roles(layer.number)
    if not taking:
        _call(layer, step.of(left), NO_EDIT, None)
        return
    shares = [Share(left)] if left else []
    mixed: list[Callable[[], None]] = []
    for number in taking:
        shares += _shares(layer, step, forward, number, mixed)
    for call in forward.merging.calls(shares):
        found = _call(layer, step.of(call.rows), call.edit, call.emit)
        if found is not None:
            for share in call.shares:
                if share.heard is not None:
                    share.heard(found)
    for mix in mixed:
        mix()


def _call(layer: Layer, paging: PagingArguments, edit: EditArguments, emit: float | None) -> Outliers | None:
    scores = layer.scores
    return attend_blocks(
        layer.query, layer.key, layer.value, paging, edit, emit, scores.visibility, scores.scoring, layer.out
    )


def _shares(
    layer: Layer, step: Step, forward: Forward, number: int, mixed: list[Callable[[], None]]
) -> Sequence[Share]:
    """What a group wants of a layer that it takes part in; what must be mixed afterwards is added to ``mixed``."""
    group, session = forward.batch.groups[number], forward.sessions[number]
    plan = group.plan
    assert plan is not None
    if isinstance(session, list):
        return _row_shares(layer, step, group, plan, session, mixed)
    emit, arguments = plan.emits.get(layer.number), NO_EDIT
    if layer.number in plan.edited:
        ready = session.ready.get(layer.number)
        edit = None
        if ready is None:
            edit = session.edit(BatchView(layer.number, layer.query, layer.key, forward.batch.rows))
        if ready is not None:
            arguments = ready
        elif isinstance(edit, Mixture):
            if emit is not None:  # it has no one softmax: outliers are those of the layer as it is
                found = _call(layer, step.of(group.rows), NO_EDIT, emit)
                assert found is not None
                session.emitted(layer.number, found)
            return _row_shares(layer, step, group, plan, forward.alone(number), mixed, emitting=False)
        else:
            arguments = edit_arguments(edit, layer.query, forward.batch.rows)
    heard = None if emit is None else partial(session.emitted, layer.number)
    return (Share(group.rows, arguments, emit, heard),)


def _row_shares(
    layer: Layer,
    step: Step,
    group: Group,
    plan: LayerPlan,
    sessions: Sequence[Session],
    mixed: list[Callable[[], None]],
    *,
    emitting: bool = True,
) -> list[Share]:
    """The shares of a group each of whose rows has a session of its own."""
    emit = plan.emits.get(layer.number) if emitting else None
    edits: list[RowEdit] = []
    of_row: dict[int, Session] = dict(zip(group.rows, sessions, strict=True))
    shares = []
    for row, session in of_row.items():
        if step.starts[row] == step.starts[row + 1]:
            continue
        view = RowView(layer, step, row)
        edit = session.edit(view) if layer.number in plan.edited else None
        if isinstance(edit, Mixture):
            mixed.append(partial(_mix, layer, view, edit))
            if emit is not None:
                shares.append(Share((row,), NO_EDIT, emit, partial(_tell_rows, {row: session}, layer, step)))
        else:
            edits.append(RowEdit(row, step.queries(row), edit))
    for part in alike(edits):
        tokens, heads = layer.query.shape[:2]
        joined = join_edits(part, len(step.lengths), tokens, heads, layer.query.device)
        rows = tuple(each.row for each in part)
        heard = partial(_tell_rows, {row: of_row[row] for row in rows}, layer, step)
        shares.append(Share(rows, joined, emit, None if emit is None else heard))
    return shares


def _tell_rows(sessions: Mapping[int, Session], layer: Layer, step: Step, found: Outliers) -> None:
    """Hand each session the outliers of its row, ``[1, H, M, C]`` of ``[T, H, C]``."""
    for row, session in sessions.items():
        first, end = step.queries(row)
        own = (each[first:end].transpose(0, 1)[None].contiguous() for each in found)
        session.emitted(layer.number, Outliers(*own))


def _mix(layer: Layer, view: RowView, mixture: Mixture) -> None:
    """One row of a layer under several edits whose outputs are weighed."""
    value = view.gather(layer.value)
    parts = [
        functional.attention(view.query, view.key, value, edit=edit, **scores) for edit, scores in mixture.parts(view)
    ]
    shares = mixture.weigh([part.lse for part in parts], view)
    mixed = sum(share[..., None] * part.output for share, part in zip(shares, parts, strict=True))
    assert isinstance(mixed, Tensor)
    first, end = view.queries
    layer.out[first:end] = mixed[0].transpose(0, 1)
