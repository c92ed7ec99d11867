"""What a study is: its options, and which runs they ask for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from attnrb import Policy
from attnrb.reports.files import write_whole

Kind = Literal["lora", "full", "gains"]
ARMS = ("plain", "rebalanced")
LEARNING_RATES: dict[str, float] = {"lora": 5e-4, "full": 2e-5, "gains": 1e-2}


class Run(NamedTuple):
    """One training run: the same data, order and initial weights as the other arms with its seed."""

    arm: str
    """``plain``, ``rebalanced`` or, for learnt gains, ``gains``."""
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Settings:
    """Everything that the results of a study depend on, beside the versions of the libraries.

    Raises:
        ValueError: an option is unknown or out of range, or two do not go together.
    """

    train: str
    model: str | None
    data: Path
    config: Policy
    steps: int | None
    epochs: float | None
    limit: int | None
    held_out: int
    length: int
    batch_size: int
    accumulate: int
    learning_rate: float | None
    rank: int
    precision: str
    evaluations: int
    analysis_texts: int

    def __post_init__(self) -> None:
        if self.train not in LEARNING_RATES:
            raise ValueError(f"train: expected lora, full or gains, got {self.train!r}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision: expected bfloat16 or float32, got {self.precision!r}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps: give steps or epochs, not both")
        for name, value in (("epochs", self.epochs), ("learning_rate", self.learning_rate)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value}")

    @property
    def rate(self) -> float:
        """The learning rate, after a warm-up over the first tenth of the steps; it falls to 0 along a cosine."""
        return LEARNING_RATES[self.train] if self.learning_rate is None else self.learning_rate

    def step_count(self, blocks: int) -> int:
        """Steps of the optimizer, for so many training blocks: by default they are read once."""
        if self.steps is not None:
            return self.steps
        return math.ceil(blocks / (self.batch_size * self.accumulate) * (self.epochs or 1.0))

    def identity(self, digest: str) -> dict[str, Any]:
        """JSON-ready: what must be equal for a study to go on. `digest` is that of the data."""
        about = asdict(self)
        return {**about, "config": self.config.to_dict(), "data": self.data.name, "data_sha256": digest}


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Take a folder for a study, or go on with the same one.

    Raises:
        ValueError: another study, or something else, is in it, or it cannot be written.
    """
    file = folder / "study.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(each for each in folder.iterdir() if each.name != "lock"):
                raise ValueError(f"output: {str(folder)!r} holds something else; name a new folder")
            write_whole(file, json.dumps(identity, indent=2) + "\n")
            return
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"output: {str(folder)!r}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"output: {str(file)!r} is damaged: {error}") from error
    names = [name for name in (*identity, *found) if identity.get(name) != found.get(name)]
    if names:
        name = names[0]
        raise ValueError(
            f"output: {str(folder)!r} holds a study with another {name}, {found.get(name)!r} and not "
            f"{identity.get(name)!r}; name another folder, or give that option as it was"
        )


def arms_of(train: str, chosen: list[str] | None) -> list[str]:
    """The arms of a study, without repeats. Raises ValueError for one that there is not."""
    if train == "gains":
        if chosen:
            raise ValueError("arm: learnt gains have no arms; the report also has the plain model and fixed gains")
        return ["gains"]
    for arm in chosen or ():
        if arm not in ARMS:
            raise ValueError(f"arm: expected plain or rebalanced, got {arm!r}")
    return list(dict.fromkeys(chosen or ARMS))
