"""What a user says of the texts in a call, and what a policy keeps of them from one forward to the next.

Note: [Requests and graphs]
A graph of torch.compile takes the tensors that it reads from a request as its inputs, and is made again for a request
whose Python numbers differ. So what spans come to is tensors (`SpanTables`), made before any forward, and their width
is a multiple of 64: a changed span is no new graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attnrb.policies.base import LayerView
    from attnrb.text.spans import Spans

__all__ = ["Request", "SpanTables"]

_MULTIPLE = 64


class SpanTables:
    """The spans of a batch as tensors on the CPU, by row and slot.

    Attributes:
        strengths: float32 ``[B, N']``: the sum of ln(strength) of the spans that cover a slot and have a strength.
        counts: float32 ``[B, N']``: how many spans without one cover it.
        union: bool ``[B, N']``: whether any span does.
        ends: int64 ``[B]``: the slot behind a row's last span.
    """

    __slots__ = ("counts", "ends", "strengths", "union")

    def __init__(self, spans: Spans, slots: int) -> None:
        """``slots``: the fewest that the tables must have."""
        width = -(-max(slots, spans.slots) // _MULTIPLE) * _MULTIPLE
        self.strengths = spans.log_strengths(1.0, width)
        self.counts = spans.default_counts(width)
        self.union = spans.union(width)
        self.ends = spans.ends()

    @property
    def rows(self) -> int:
        """B."""
        return self.union.shape[0]

    def log_strengths(self, default: float | torch.Tensor) -> torch.Tensor:
        """What is added to the scores of each slot.

        Args:
            default: ln(strength) of the spans without one of their own; a tensor ``[H]`` has one for each head.

        Returns:
            float32 ``[B, 1 or H, N']``.
        """
        each = default[None, :, None] if isinstance(default, torch.Tensor) else default
        # Not a plain product: 0 times ln(0) is NaN.
        counts = self.counts[:, None]
        return self.strengths[:, None] + torch.where(counts > 0, counts * each, 0.0)


class Request:
    """What a user says of the texts in a call: which spans matter, and where the prompts end.

    A generation is one request, with a forward for each token.

    Attributes:
        spans: of each row of the batch; None where there are none.
        tables: the same as tensors; None where no row has any.
        kept: what a `LayerPlan` worked out for this request, by the plan.
        sequence: what a `LayerPlan` keeps of the texts themselves, by the plan and layer. It lasts as long as their
            cached keys: a host that keeps keys hands each forward the one that belongs to them.
    """

    def __init__(self, spans: Spans | None = None, prompt: torch.Tensor | None = None) -> None:
        """``prompt``: int64 ``[B]``: one past the slot of each prompt's last token; None: as the first forward ends."""
        self.spans = spans
        self.kept: dict[Any, Any] = {}
        self.sequence: dict[Any, Any] = {}
        self.prompt = prompt
        end = 0 if prompt is None or not prompt.numel() else int(prompt.max())
        self.tables = SpanTables(spans, end) if spans else None

    def of_sequence(self, sequence: dict[Any, Any]) -> Request:
        """This request for texts of which ``sequence`` is kept."""
        mine = Request()
        mine.spans, mine.tables, mine.kept, mine.prompt = self.spans, self.tables, self.kept, self.prompt
        mine.sequence = sequence
        return mine

    def prompt_ends(self, view: LayerView) -> torch.Tensor:
        """One past the slot of each prompt's last token: int64, one for each row of ``spans``.

        Raises:
            ValueError: nobody said, and a graph is being traced.
        """
        if self.prompt is not None:
            return self.prompt
        if torch.compiler.is_compiling():
            raise ValueError(
                "prompt: expected one in a graph of torch.compile, which cannot remember where the first call ended: "
                "patched.spans(spans, prompt=input_ids.shape[1])"
            )
        if "prompt" not in self.kept:
            rows = 1 if self.tables is None else self.tables.rows
            ends = (view.query_slots()[:, -1] + 1).cpu()
            times = max(1, view.rows // rows)
            self.kept["prompt"] = ends.expand(rows).clone() if ends.shape[0] == 1 else ends[::times]
        prompt: torch.Tensor = self.kept["prompt"]
        return prompt
