"""Spans: which tokens of each row of a batch matter, and how much."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Span", "SpanError", "Spans", "check_strength"]

_SHOWN_ROWS = 4
_SHOWN_SPANS = 4


class SpanError(ValueError):
    """A span that has no place among the tokens. The message names the text and the span."""


def check_strength(name: str, strength: Any) -> float:
    """The strength as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {strength!r}")
    value = float(strength)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {strength!r}")
    return value


@dataclass(frozen=True)
class Span:
    """Tokens ``start <= slot < end`` of one row.

    Attributes:
        start: slot of the first token, at least 0.
        end: slot behind the last, above `start`.
        strength: what the weights of the span are multiplied by before a row is normalised, finite and at least 0: 1
            changes nothing, 0 removes the span. It is absolute. None: the policy's strength.

    Raises:
        TypeError: `start` or `end` is no integer, or `strength` no number.
        ValueError: `start` is negative, the span is empty, or `strength` is negative or not finite.
    """

    start: int
    end: int
    strength: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            object.__setattr__(self, name, _check_slot(name, getattr(self, name)))
        if self.start < 0:
            raise ValueError(f"start: expected a slot of at least 0, got {self.start}")
        if self.end <= self.start:
            raise ValueError(f"end: expected a slot above start, which is {self.start}, got {self.end}")
        if self.strength is not None:
            object.__setattr__(self, "strength", check_strength("strength", self.strength))

    def __repr__(self) -> str:
        strength = "" if self.strength is None else f" ×{self.strength:g}"
        return f"Span({self.start}:{self.end}{strength})"


@dataclass(frozen=True)
class Spans:
    """The spans of every row of a batch.

    A slot is an index into the row of ``input_ids`` that the model gets, padding included: the place of the token's key
    in the cache. So with left padding the spans of a row lie as much farther right, and nothing else needs to travel
    with them: the same batch that goes into the model is the one they were made for. Slots behind the end of the
    prompt are those of generated tokens, and belong to no span.

    Spans of a row may overlap. In a slot that several cover their strengths multiply, the policy's once for every span
    that has none of its own.

    Attributes:
        rows: for each row of the batch a tuple of `Span`, in any order; an empty one for a row without spans.

    Raises:
        TypeError: a row holds something else than spans.
    """

    rows: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        rows = tuple(tuple(row) for row in self.rows)
        for index, row in enumerate(rows):
            for span in row:
                if not isinstance(span, Span):
                    raise TypeError(f"rows: expected Span objects in row {index}, got {span!r}")
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        """The number of rows, B."""
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Span, ...]]:
        return iter(self.rows)

    def __getitem__(self, row: int) -> tuple[Span, ...]:
        return self.rows[row]

    def __bool__(self) -> bool:
        """Whether any row has a span."""
        return any(self.rows)

    @property
    def slots(self) -> int:
        """The fewest slots that hold all spans, N'; 0 without spans. Behind them nothing is strengthened."""
        return max((span.end for row in self.rows for span in row), default=0)

    def log_strengths(
        self,
        default_strength: float,
        slots: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """What is added to the scores of each slot: the sum of ln(strength) over the spans that cover it.

        Args:
            default_strength: strength of spans that have none of their own: the policy's. Finite, at least 0.
            slots: N'. Default: `slots`.
            device: where the result goes. Default: the CPU.

        Returns:
            float32 ``[B, N']``; 0 where no span lies, and -inf where a strength is 0, whatever else covers the slot.
            Summed in float64.

        Raises:
            TypeError, ValueError: `default_strength` is no number, negative or not finite, or a span ends behind
                `slots`.
        """
        default = _log(check_strength("default_strength", default_strength))
        total = torch.zeros(len(self), self._check_slots(slots), dtype=torch.float64)
        for index, span in self._indexed():
            total[index, span.start : span.end] += default if span.strength is None else _log(span.strength)
        return total.to(device=device, dtype=torch.float32)

    def default_counts(self, slots: int | None = None, *, device: torch.device | str | None = None) -> torch.Tensor:
        """How many spans without a strength of their own cover each slot: float32 ``[B, N']``.

        So ``log_strengths(1, slots) + default_counts(slots) * log_strength`` takes a strength that is learnt, or one
        for each head. Arguments and errors are those of `log_strengths`.
        """
        counts = torch.zeros(len(self), self._check_slots(slots), dtype=torch.float32)
        for index, span in self._indexed():
            if span.strength is None:
                counts[index, span.start : span.end] += 1
        return counts.to(device)

    def union(self, slots: int | None = None, *, device: torch.device | str | None = None) -> torch.Tensor:
        """Which slots any span covers, whatever its strength: bool ``[B, N']``.

        Arguments and errors are those of `log_strengths`.
        """
        covered = torch.zeros(len(self), self._check_slots(slots), dtype=torch.bool)
        for index, span in self._indexed():
            covered[index, span.start : span.end] = True
        return covered.to(device)

    def ends(self, *, device: torch.device | str | None = None) -> torch.Tensor:
        """The slot behind the last span of each row: int64 ``[B]``; 0 for a row without spans.

        Queries from there on are those that `Emphasis` calls ``rows="after"``.
        """
        ends = [max((span.end for span in row), default=0) for row in self.rows]
        return torch.tensor(ends, dtype=torch.int64, device=device)

    def repeat(self, times: int) -> Spans:
        """Every row `times` in a row, as ``torch.repeat_interleave``, which is how ``generate`` makes beams of rows.

        Raises:
            TypeError, ValueError: `times` is no integer of at least 1.
        """
        times = _check_slot("times", times)
        if times < 1:
            raise ValueError(f"times: expected at least 1, got {times}")
        return Spans(tuple(row for row in self.rows for _ in range(times)))

    def select(self, rows: Sequence[int] | torch.Tensor) -> Spans:
        """The rows with these indices, in this order and as often as they are named, as beam search reorders them.

        Raises:
            TypeError: `rows` is no sequence of integers.
            IndexError: there is no such row.
        """
        indices = rows.tolist() if isinstance(rows, torch.Tensor) else list(rows)
        chosen = []
        for index in indices:
            index = _check_slot("rows", index)
            if not 0 <= index < len(self):
                raise IndexError(f"rows: expected indices from 0 to {len(self) - 1}, got {index}")
            chosen.append(self.rows[index])
        return Spans(tuple(chosen))

    def shift(self, by: int | Sequence[int]) -> Spans:
        """The same spans so many slots later: of tokens before which others were put, such as more left padding.

        Args:
            by: one number for all rows or one for each; below 0 for earlier.

        Raises:
            TypeError: `by` is no integer or sequence of them.
            ValueError: there is not one for each row, or a span would begin before slot 0.
        """
        if isinstance(by, Sequence):
            steps = [_check_slot("by", step) for step in by]
        else:
            steps = [_check_slot("by", by)] * len(self)
        if len(steps) != len(self):
            raise ValueError(f"by: expected one number or {len(self)}, one for each row, got {len(steps)}")
        return Spans(
            tuple(
                tuple(Span(span.start + step, span.end + step, span.strength) for span in row)
                for row, step in zip(self.rows, steps, strict=True)
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: ``{"rows": [[{"start": 0, "end": 5, "strength": None}, …], …]}``."""
        return {
            "rows": [
                [{"start": span.start, "end": span.end, "strength": span.strength} for span in row] for row in self.rows
            ]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spans:
        """What `to_dict` gave; ``strength`` may be missing.

        Raises:
            TypeError, ValueError: something is missing, unknown or of another type. The message says where.
        """
        rows = _field(data, "spans", {"rows"}, frozenset())["rows"]
        if not _is_list(rows) or not all(_is_list(row) for row in rows):
            raise TypeError(f"rows: expected a list of lists of spans, got {rows!r}")
        made = []
        for index, row in enumerate(rows):
            spans = []
            for number, item in enumerate(row):
                where = f"rows[{index}][{number}]"
                fields = _field(item, where, {"start", "end"}, frozenset({"strength"}))
                try:
                    spans.append(Span(fields["start"], fields["end"], fields.get("strength")))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}.{error}") from None
            made.append(tuple(spans))
        return cls(tuple(made))

    def __repr__(self) -> str:
        shown = [_row_repr(row) for row in self.rows[:_SHOWN_ROWS]]
        if len(self) > _SHOWN_ROWS:
            shown.append(f"and {len(self) - _SHOWN_ROWS} rows more")
        return f"Spans({' | '.join(shown)})"

    def _indexed(self) -> Iterator[tuple[int, Span]]:
        return ((index, span) for index, row in enumerate(self.rows) for span in row)

    def _check_slots(self, slots: int | None) -> int:
        if slots is None:
            return self.slots
        slots = _check_slot("slots", slots)
        if slots < self.slots:
            raise ValueError(f"slots: expected at least {self.slots}, where the last span ends, got {slots}")
        return slots


def _row_repr(row: tuple[Span, ...]) -> str:
    shown = [repr(span)[5:-1] for span in row[:_SHOWN_SPANS]]
    if len(row) > _SHOWN_SPANS:
        shown.append(f"and {len(row) - _SHOWN_SPANS} more")
    return ", ".join(shown) or "none"


def _log(strength: float) -> float:
    return math.log(strength) if strength else -math.inf


def _check_slot(name: str, slot: Any) -> int:
    if isinstance(slot, bool) or not isinstance(slot, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {slot!r}")
    return int(slot)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _field(data: Any, where: str, needed: set[str], optional: frozenset[str]) -> Mapping[str, Any]:
    """`data`, if it is a mapping with the needed keys and none beside them and the optional ones."""
    if not isinstance(data, Mapping):
        raise TypeError(f"{where}: expected a dictionary with {', '.join(sorted(needed))}, got {data!r}")
    missing, unknown = needed - set(data), set(data) - needed - optional
    if missing or unknown:
        what = f"misses {', '.join(sorted(missing))}" if missing else f"has unknown {', '.join(map(str, unknown))}"
        raise ValueError(f"{where}: the dictionary {what}")
    return data
