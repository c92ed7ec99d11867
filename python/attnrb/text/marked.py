"""A tokenised batch and the spans in it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TextIO

import torch

from attnrb.protocols import Tokenizer
from attnrb.text.show import Piece, as_html, as_text, pieces
from attnrb.text.spans import Spans

__all__ = ["BatchRow", "Marked", "batch_rows"]

_REPR_ROWS, _REPR_CONTEXT = 4, 24
_HTML_ROWS, _HTML_CHARACTERS = 16, 20_000


class BatchRow(NamedTuple):
    """The tokens of one row without its padding."""

    first: int
    """Slot of the first of them."""
    ids: list[int]


def batch_rows(inputs: Any) -> list[BatchRow]:
    """The rows of a batch, its padding left out.

    Args:
        inputs: a ``BatchEncoding`` or another mapping with ``input_ids`` and perhaps ``attention_mask``, or the ids
            alone: a tensor, array or list ``[n]`` or ``[B, n]``. Without a mask nothing counts as padding.

    Raises:
        TypeError: it is none of these.
    """
    mask = None
    ids = inputs
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        if "input_ids" not in inputs:
            raise TypeError(f"inputs: expected input_ids among {', '.join(map(str, inputs))}")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    listed = _lists(ids)
    masks = [[1] * len(row) for row in listed] if mask is None else _lists(mask)
    rows = []
    for row, kept in zip(listed, masks, strict=True):
        slots = [slot for slot, seen in enumerate(kept) if seen]
        first, end = (slots[0], slots[-1] + 1) if slots else (0, 0)
        rows.append(BatchRow(first, row[first:end]))
    return rows


def _lists(values: Any) -> list[list[int]]:
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, Sequence) and not isinstance(plain, str):
        rows = list(plain)
        if not any(isinstance(row, Sequence) or hasattr(row, "tolist") for row in rows):
            rows = [rows]
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        if all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
            return [[int(token) for token in row] for row in rows]
    raise TypeError(f"inputs: expected token ids [n] or [B, n], got {type(values).__name__}")


@dataclass(frozen=True, eq=False, repr=False)
class Marked:
    """A tokenised batch and the spans in it, made together so that they agree.

    Hand it to ``patched.generate(marked)``, or its parts on:
    ``with patched.spans(marked.spans): model.generate(**marked.inputs)``.

    Attributes:
        inputs: a ``BatchEncoding``, as the tokenizer returns it for the text without markup.
        spans: of each row, in slots of `inputs`.
        texts: of each row: what was tokenised, without markup; of a chat what the template wrote.
        tokenizer: the tokenizer that made it.
        cut: row and index in that row of every span of which truncation took a part.
    """

    inputs: Any
    spans: Spans
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = field(default=None)
    cut: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device | str) -> Marked:
        """The same with the tensors of `inputs` on a device."""
        moved = copy.copy(self.inputs)
        for key, value in self.inputs.items():
            if isinstance(value, torch.Tensor):
                moved[key] = value.to(device)
        return replace(self, inputs=moved)

    def show(self, file: TextIO | None = None) -> None:
        """Print every row with its marked tokens in ``⟦…⟧``, separated by ``·``, and their strength behind.

        Control characters and marks of direction are replaced by visible ones. A strength that is not shown is the
        policy's.

        Args:
            file: where to. Default: the standard output.
        """
        for index, row in enumerate(batch_rows(self.inputs)):
            print(f"{self._title(index, row)}\n{as_text(self._pieces(index, row))}", file=file or sys.stdout)

    def __repr__(self) -> str:
        shown = [
            f"  {self._title(index, row)}: " + as_text(self._pieces(index, row), _REPR_CONTEXT).replace("\n", "␊")
            for index, row in enumerate(batch_rows(self.inputs)[:_REPR_ROWS])
        ]
        if len(self.spans) > _REPR_ROWS:
            shown.append(f"  and {len(self.spans) - _REPR_ROWS} rows more")
        return "\n".join(["Marked(", *shown, ")"])

    def _repr_html_(self) -> str:
        shown = []
        for index, row in enumerate(batch_rows(self.inputs)[:_HTML_ROWS]):
            body = as_html(self._pieces(index, row), _HTML_CHARACTERS)
            shown.append(f"<p><small>{self._title(index, row)}</small><br>{body}</p>")
        if len(self.spans) > _HTML_ROWS:
            shown.append(f"<p><small>and {len(self.spans) - _HTML_ROWS} rows more</small></p>")
        return f'<div style="white-space: pre-wrap">{"".join(shown)}</div>'

    def _title(self, index: int, row: BatchRow) -> str:
        marked = int(self.spans.union()[index].sum())
        before = f", {row.first} of padding before" if row.first else ""
        return f"row {index} ({len(row.ids)} tokens, {marked} marked{before})"

    def _pieces(self, index: int, row: BatchRow) -> list[Piece]:
        return pieces(self.tokenizer, row.ids, row.first, self.spans[index])
