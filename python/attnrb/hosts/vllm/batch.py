"""Which request sits in which row of a running batch, and what the policies of all rows come to together.

Nothing here knows vLLM. `Rows` is told of requests that come, go and move; `Rows.batch` gathers those of one policy in
a `Group`, once for as long as the batch stays the same. `attnrb.hosts.vllm.attend` takes it from there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnrb.hosts.vllm.asked import Ask, policy_text
from attnrb.policies import Plain
from attnrb.policies.base import LayerPlan, ModelShape, Policy, Request
from attnrb.text.spans import Span, Spans

__all__ = ["Batch", "Group", "Row", "Rows"]

# How many texts may be known of which a policy keeps something. A text of a request that waits, preempted, is one.
_MOST_SEQUENCES = 1024


class Row:
    """One request of the batch.

    Attributes:
        plan: its policy, fitted to the model; None where nothing is edited.
        spans: of its prompt.
        prompt: how many tokens its prompt has.
        sequence: what its policy keeps of the text.
    """

    __slots__ = ("plan", "prompt", "sequence", "spans")

    def __init__(
        self, plan: LayerPlan | None, spans: tuple[Span, ...] = (), prompt: int = 0, sequence: Any = None
    ) -> None:
        self.plan = plan
        self.spans = spans
        self.prompt = prompt
        self.sequence: dict[Any, Any] = {} if sequence is None else sequence

    def request(self) -> Request:
        """For a forward that has this row alone."""
        return _request([self], self.sequence)


_PLAIN = Row(None)


class Group:
    """The rows of a batch that have one policy.

    Attributes:
        plan: the policy, fitted to the model; None: these rows are left as they are.
        rows: their numbers, ascending.
        members: the rows themselves.
        request: of the whole batch, rows of other policies without spans: for a plan that looks at no keys.
        requests: of each row by itself: for one that does.
    """

    def __init__(self, plan: LayerPlan | None, rows: Sequence[int], everybody: Sequence[Row]) -> None:
        self.plan = plan
        self.rows = tuple(rows)
        self.members = [everybody[row] for row in rows]
        self.request: Request | None = None
        self._requests: list[Request] | None = None
        if plan is not None and not plan.reads_keys:
            mine = set(rows)
            self.request = _request([each if row in mine else _PLAIN for row, each in enumerate(everybody)])

    @property
    def requests(self) -> list[Request]:
        if self._requests is None:
            self._requests = [member.request() for member in self.members]
        return self._requests


class Batch:
    """What is done with a batch, as long as its rows stay the same.

    Attributes:
        rows: how many there are, B.
        groups: the rows by policy, those that are edited.
        plain: the rows that are not.
    """

    def __init__(self, everybody: Sequence[Row]) -> None:
        self.rows = len(everybody)
        by_plan: dict[int, list[int]] = {}
        for row, each in enumerate(everybody):
            by_plan.setdefault(id(each.plan), []).append(row)
        groups = [Group(everybody[rows[0]].plan, rows, everybody) for rows in by_plan.values()]
        self.groups = [group for group in groups if group.plan is not None]
        self.plain = [row for group in groups if group.plan is None for row in group.rows]
        self._roles: dict[int, tuple[list[int], tuple[int, ...]]] = {}

    def roles(self, layer: int) -> tuple[list[int], tuple[int, ...]]:
        """The groups that take part in a layer, by number, and all rows that are left as they are in it."""
        known = self._roles.get(layer)
        if known is None:
            taking, left = [], list(self.plain)
            for number, group in enumerate(self.groups):
                assert group.plan is not None
                if layer in group.plan.edited or layer in group.plan.emits:
                    taking.append(number)
                else:
                    left += group.rows
            known = self._roles[layer] = taking, tuple(sorted(left))
        return known


class Rows:
    """The rows of one engine's batch.

    Args:
        default: the engine's policy.
        shape: of the model, on this rank.
    """

    def __init__(self, default: Policy, shape: ModelShape) -> None:
        self.shape = shape
        self.default = None if isinstance(default, Plain) else policy_text(default)
        self._rows: dict[int, Row] = {}
        self._batch: Batch | None = None
        self._sequences: OrderedDict[str, dict[Any, Any]] = OrderedDict()

    def change(
        self,
        removed: Sequence[int] = (),
        added: Mapping[int, str | None] | None = None,
        moved: Sequence[tuple[int, int, bool]] = (),
    ) -> None:
        """Requests that went, came and moved, in this order.

        Args:
            removed: rows that are free now.
            added: for each new request its row, and the text of its `Ask`; None where it is left as it is.
            moved: from which row to which, and whether the two change places.
        """
        self._batch = None
        for row in removed:
            self._rows.pop(row, None)
        for row, text in (added or {}).items():
            self._rows[row] = _PLAIN if text is None else self._row(Ask.from_text(text))
        for one, other, swap in moved:
            moving, there = self._rows.pop(one, _PLAIN), self._rows.pop(other, _PLAIN)
            self._rows[other] = moving
            if swap:
                self._rows[one] = there

    def batch(self, rows: int) -> Batch:
        """The first ``rows`` rows, as a batch."""
        if self._batch is None or self._batch.rows != rows:
            self._batch = Batch([self._rows.get(row, _PLAIN) for row in range(rows)])
        return self._batch

    def _row(self, ask: Ask) -> Row:
        sequence = None
        if ask.sequence is not None:
            # A request that was preempted comes again: what was found in its text stays.
            sequence = self._sequences.pop(ask.sequence, {})
            self._sequences[ask.sequence] = sequence
            while len(self._sequences) > _MOST_SEQUENCES:
                self._sequences.popitem(last=False)
        return Row(ask.plan(self.shape), ask.spans, ask.prompt, sequence)


def _request(rows: Sequence[Row], sequence: dict[Any, Any] | None = None) -> Request:
    spans = Spans(tuple(row.spans for row in rows))
    request = Request(
        spans if spans else None, torch.tensor([row.prompt for row in rows], dtype=torch.int64, device="cpu")
    )
    return request if sequence is None else request.of_sequence(sequence)
