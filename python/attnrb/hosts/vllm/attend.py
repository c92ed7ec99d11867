"""Attention of one layer for a batch whose requests have policies of their own. Nothing here knows vLLM.

Note: [One call a policy]
The rows of a policy are served by one call of the op for the whole batch, in which the sequences of other rows have no
keys: the op skips them and leaves their output as it is. Rows that a layer leaves as they are share one call, whatever
their policies do elsewhere. Which sequences a call serves is a tensor of lengths, made once a step for all layers.

A policy whose plan looks at no keys (`LayerPlan.reads_keys`) has one session for all its rows, which sees a
`BatchView`: the edit that it gives is one for the batch. Any other policy has a session for each row, which sees the
row's queries and gathered keys as in a forward of its own, and the edits are put together. A `Mixture`, whose weights
depend on where each row's attention goes, is computed row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrb.hosts.vllm.batch import Batch, Group
from attnrb.hosts.vllm.joining import RowEdit, alike, join_edits
from attnrb.ops import functional
from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.ops.paging import Paging
from attnrb.ops.visibility import Visibility
from attnrb.policies.base import LayerPlan, LayerView, Mixture, Session

__all__ = ["BatchView", "Forward", "Layer", "RowView", "Step", "attend"]


class Layer(NamedTuple):
    """One layer's attention in one step: what the op is told.

    Attributes:
        number: which layer.
        query: ``[T, H, D]``.
        key: ``[blocks, Hk, P, D]``, new keys included.
        value: ``[blocks, Hk, P, Dv]``.
        scores: ``visibility``, ``scale``, ``softcap`` and ``sinks``, as `attnrb.functional.attention` takes them with a
            paging.
        out: ``[T, H, Dv]``.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Mapping[str, Any]
    out: Tensor


class Step:
    """Where the queries and keys of a step lie, for the layers that share a block table.

    Attributes:
        paging: of all sequences.
        starts: ``query_starts`` as numbers.
        lengths: ``seq_lens`` as numbers.
    """

    def __init__(self, paging: Paging) -> None:
        self.paging = paging
        self.starts: list[int] = paging.query_starts.tolist()
        self.lengths: list[int] = paging.seq_lens.tolist()
        self._served: dict[tuple[int, ...], Paging] = {}

    def of(self, rows: Sequence[int]) -> Paging:
        """The same for these rows: the others have no keys."""
        if len(rows) == len(self.lengths):
            return self.paging
        key = tuple(rows)
        if key not in self._served:
            lengths = torch.zeros_like(self.paging.seq_lens)
            index = torch.tensor(key, dtype=torch.int64, device="cpu")
            lengths[index] = self.paging.seq_lens[index]
            self._served[key] = Paging(self.paging.block_table, self.paging.query_starts, lengths)
        return self._served[key]

    def queries(self, row: int) -> tuple[int, int]:
        """The first query of a row, and one past its last."""
        return self.starts[row], self.starts[row + 1]


class Forward:
    """One forward of the model: the batch, and a session for each policy, or for each of its rows."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
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


class BatchView(LayerView):
    """What a session may see that serves many sequences at once: which layer, how many heads and rows, and where."""

    __slots__ = ("_rows",)

    def __init__(self, layer: Layer, rows: int) -> None:
        super().__init__(layer.number, layer.query, layer.key, _no_scores, layer.query.shape[1], layer.query.device)
        self._rows = rows

    @property
    def rows(self) -> int:
        """B."""
        return self._rows


def _no_scores() -> Mapping[str, Any]:
    raise RuntimeError("a policy whose plan says that it reads no keys looked at them: give its plan reads_keys=True")


class RowView(LayerView):
    """One row of a batch, as in a forward of its own; its keys are gathered where someone looks at them."""

    __slots__ = ("_gathered", "_pool", "_step", "row")

    def __init__(self, layer: Layer, step: Step, row: int) -> None:
        first, end = step.queries(row)
        self.layer = layer.number
        self.query = layer.query[first:end].transpose(0, 1)[None]
        self.heads = self.query.shape[1]
        self.device = self.query.device
        seen = Visibility(query_offset=step.lengths[row] - (end - first), window=layer.scores["visibility"].window)
        scores = {**layer.scores, "visibility": seen}
        self._scores = lambda: scores
        self._pool, self._step, self.row = layer.key, step, row
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
    """Write a layer's attention into ``layer.out``, each row under its policy: see Note: [One call a policy]."""
    batch = forward.batch
    taking, left = batch.roles(layer.number)
    if left:
        _call(layer, step.of(left), None, None)
    for number in taking:
        group, sessions = batch.groups[number], forward.sessions[number]
        plan = group.plan
        assert plan is not None
        if isinstance(sessions, list):
            _attend_each(layer, step, group, plan, sessions)
            continue
        edit = sessions.edit(BatchView(layer, batch.rows)) if layer.number in plan.edited else None
        emit = plan.emits.get(layer.number)
        found = None
        if not isinstance(edit, Mixture):
            found = _call(layer, step.of(group.rows), edit, emit)
        else:
            if emit is not None:  # a mixture has no one softmax: its outliers are those of the layer as it is
                found = _call(layer, step.of(group.rows), None, emit)
            _attend_each(layer, step, group, plan, forward.alone(number), emitting=False)
        if found is not None:
            sessions.emitted(layer.number, found)


def _call(layer: Layer, paging: Paging, edit: Edit | None, emit: float | None) -> Outliers | None:
    attended = functional.attention(
        layer.query,
        layer.key,
        layer.value,
        edit=edit,
        emit=emit,
        paging=paging,
        out=layer.out,
        **layer.scores,
    )
    return attended.outliers


def _attend_each(
    layer: Layer, step: Step, group: Group, plan: LayerPlan, sessions: Sequence[Session], *, emitting: bool = True
) -> None:
    """The rows of a group, each with a session of its own."""
    emit = plan.emits.get(layer.number) if emitting else None
    edits: list[RowEdit] = []
    of_row: dict[int, Session] = dict(zip(group.rows, sessions, strict=True))
    for row, session in of_row.items():
        if step.starts[row] == step.starts[row + 1]:
            continue
        view = RowView(layer, step, row)
        edit = session.edit(view) if layer.number in plan.edited else None
        if isinstance(edit, Mixture):
            if emit is not None:
                _emitted(session, layer, step, row, _call(layer, step.of([row]), None, emit))
            _mix(layer, step, view, edit)
        else:
            edits.append(RowEdit(row, step.queries(row), edit))
    for part in alike(edits):
        rows = [each.row for each in part]
        tokens, heads = layer.query.shape[:2]
        joined = join_edits(part, len(step.lengths), tokens, heads, layer.query.device)
        found = _call(layer, step.of(rows), joined, emit)
        for row in rows:
            _emitted(of_row[row], layer, step, row, found)


def _emitted(session: Session, layer: Layer, step: Step, row: int, found: Outliers | None) -> None:
    """Hand a session the outliers of its row, ``[1, H, M, C]`` of ``[T, H, C]``."""
    if found is not None:
        first, end = step.queries(row)
        own = (each[first:end].transpose(0, 1)[None].contiguous() for each in found)
        session.emitted(layer.number, Outliers(*own))


def _mix(layer: Layer, step: Step, view: RowView, mixture: Mixture) -> None:
    """One row of a layer under several edits whose outputs are weighed."""
    value = view.gather(layer.value)
    parts = [
        functional.attention(view.query, view.key, value, edit=edit, **scores) for edit, scores in mixture.parts(view)
    ]
    shares = mixture.weigh([part.lse for part in parts], view)
    mixed = sum(share[..., None] * part.output for share, part in zip(shares, parts, strict=True))
    assert isinstance(mixed, Tensor)
    first, end = step.queries(view.row)
    layer.out[first:end] = mixed[0].transpose(0, 1)
