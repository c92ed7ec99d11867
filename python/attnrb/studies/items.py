"""Prompts of which a part is pointed at, and how they may go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from attnrb.text.mark import spans
from attnrb.text.marked import Marked

__all__ = ["TaskItem"]


@dataclass(frozen=True)
class TaskItem:
    """One prompt: ``before``, ``marked`` and ``behind``, joined by spaces.

    Attributes:
        before: what stands before the marked text; may be empty.
        marked: what is pointed at.
        behind: what stands behind it, the beginning of the answer's sentence included.
        candidates: how it may go on, the right one first.
    """

    before: str
    marked: str
    behind: str
    candidates: tuple[str, ...]

    markups: ClassVar[tuple[str, ...]] = ("span", "asterisks", "none")
    """What `prompt` may point with."""

    @property
    def answer(self) -> str:
        """The right candidate, with the space before it."""
        return " " + self.candidates[0]

    def prompt(self, tokenizer: Any, markup: str = "span") -> Marked:
        """The prompt's tokens, with a span where ``markup`` says so.

        Raises:
            ValueError: ``markup`` is none of `markups`.
        """
        if markup not in self.markups:
            raise ValueError(f"markup: expected one of {', '.join(self.markups)}, got {markup!r}")
        marked = f"**{self.marked}**" if markup == "asterisks" else self.marked
        start = len(self.before) + 1 if self.before else 0
        ranges = {"span": [(start, start + len(marked))], "older": [(0, len(self.before))]}.get(markup, [])
        return spans(tokenizer, " ".join(filter(None, (self.before, marked, self.behind))), ranges)
