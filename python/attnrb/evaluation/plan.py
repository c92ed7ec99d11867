"""What to evaluate, and how: the options of ``attnrb eval``, and those that ``attnrb search`` shares with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from attnrb.evaluation.selection import Selected, cells_of, select
from attnrb.policies import Policy, Rebalance

__all__ = ["Plan", "TaskPlan", "plan_names"]


@dataclass(frozen=True)
class TaskPlan:
    """What is asked of any model.

    Attributes:
        tasks: names; see `attnrb.evaluation.selection.select`.
        data: folder of the items' files; None takes the items that lm-evaluation-harness has or downloads.
        include_path: folder of task files for the harness, beside its own.
        seed: of whatever is drawn: the order of items, splits, the bootstrap.
        shots: examples before each question of direct prompting.
        generated: generate the answers of direct prompting, rather than score the choices.
        chat: put prompts into the model's chat template.
    """

    command: ClassVar[str]
    """Whose options these are."""
    growing: ClassVar[tuple[str, ...]]
    """Options that may change between two starts of one run."""

    tasks: tuple[str, ...]
    data: Path | None = None
    include_path: Path | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    shots: int = field(default=0, kw_only=True)
    generated: bool = field(default=False, kw_only=True)
    chat: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._at_least(shots=0)

    def _at_least(self, **bounds: int) -> None:
        for name, least in bounds.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected {least} or above, got {value}")

    def select(self) -> tuple[Selected, ...]:
        """The tasks. Raises DataError where one does not exist, or its items cannot be had."""
        return select(
            self.tasks,
            self.data,
            include_path=self.include_path,
            shots=self.shots,
            generated=self.generated,
            chat=self.chat,
        )

    def run_file(self, model: str) -> Path:
        """Where a run goes that nobody named a file for: the same plan and model name the same file again."""
        settings = {name: value for name, value in self.to_dict().items() if name not in ("tasks", *self.growing)}
        digest = hashlib.sha256(json.dumps([model, settings], sort_keys=True).encode()).hexdigest()[:8]
        return Path(f"attnrb-{self.command}-{digest}.jsonl")

    def to_dict(self) -> dict[str, Any]:
        """Every option, JSON-ready."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Plan(TaskPlan):
    """A grid of models and ways of asking.

    Attributes:
        configs: the re-balancings to compare with the plain model.
        prompting: ``direct``, ``cot`` (chain of thought) or ``both``.
        budgets: numbers of computed tokens of the chain of thought, each asked for by itself.
        min_computed: computed tokens at least, without `budgets`.
        max_computed: computed tokens at most, without `budgets`.
        limit: items of each task, each subject of MMLU.
        shuffle: take the items in an order drawn with `seed`, rather than the file's.
    """

    command = "eval"
    growing = ("configs", "limit")

    configs: tuple[Policy, ...] = (Rebalance(),)
    prompting: str = "direct"
    budgets: tuple[int, ...] | None = None
    min_computed: int = 0
    max_computed: int = 256
    limit: int | None = None
    shuffle: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(limit=1)
        cells_of(self.prompting, self.budgets, self.min_computed, self.max_computed)


def plan_names(text: str | Sequence[str]) -> tuple[str, ...]:
    """Task names of a list with commas."""
    parts = [text] if isinstance(text, str) else text
    return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Policy):
        return value.to_dict()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
