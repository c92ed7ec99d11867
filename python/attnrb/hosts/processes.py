"""One run in several processes: who this one is, and how they wait for each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

__all__ = ["Processes", "accelerator"]


def accelerator() -> Any:
    """The accelerator of a process that ``accelerate launch`` or ``torchrun`` started with others; None alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    # Processes wait for each other at the end of a run, however long the longest takes.
    return Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=52))]
    )


@dataclass(frozen=True)
class Processes:
    """The processes of one run.

    Attributes:
        rank: of this one, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1
    _accelerator: Any = None

    @classmethod
    def found(cls) -> Processes:
        """Those that a launcher started this process with; it alone, if none did."""
        shared = accelerator()
        return cls() if shared is None else cls(shared.process_index, shared.num_processes, shared)

    @property
    def device(self) -> str | None:
        """Where this one of several computes; None for one alone, which may choose."""
        return None if self._accelerator is None else str(self._accelerator.device)

    def wait(self) -> None:
        """Go on when all have come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
