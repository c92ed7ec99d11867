"""Which heads to edit: a ranking of all heads of a model, and what it was made from."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnrb.policies.base import ModelShape
from attnrb.policies.checks import HeadChoice, beyond_the_model, choose_heads, head_choice
from attnrb.reports.files import write_whole
from attnrb.text.reading import parse_json

__all__ = ["HeadProfile", "bundled_profiles"]

_FORMAT = "attnrb.HeadProfile"
_VERSION = 1
_BUNDLED = Path(__file__).parents[1] / "studies" / "profiles"


def bundled_profiles() -> tuple[str, ...]:
    """The names of the profiles that come with attnrb, sorted: `HeadProfile.load` takes them."""
    return tuple(sorted(file.stem for file in _BUNDLED.glob("*.json")))


@dataclass(frozen=True)
class HeadProfile:
    """How much each head of a model helps when it is edited, and which of them to edit.

    `attnrb.profile_heads` makes one. It can be given wherever a policy takes heads.

    Attributes:
        scores: ``[L][H]``, larger is better: by how much the loss of the examples falls for each unit of a head's
            log-gain, to first order.
        keep: how many heads are chosen: those of the largest scores.
        about: what made it: model, policy, number of examples and so on.

    Raises:
        TypeError, ValueError: scores are no table of finite numbers, or ``keep`` is not between 1 and their number.
    """

    scores: Sequence[Sequence[float]]
    keep: int = 32
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = tuple(tuple(float(score) for score in row) for row in self.scores)
        if not table or not table[0] or len({len(row) for row in table}) != 1:
            raise ValueError("scores: expected a row of equally many heads for each layer")
        if not all(math.isfinite(score) for row in table for score in row):
            raise ValueError("scores: expected finite numbers")
        object.__setattr__(self, "scores", table)
        if not isinstance(self.about, Mapping):
            raise TypeError(f"about: expected a mapping, got {self.about!r}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, int):
            raise TypeError(f"keep: expected an integer, got {self.keep!r}")
        if not 1 <= self.keep <= len(table) * len(table[0]):
            raise ValueError(f"keep: expected 1 to {len(table) * len(table[0])}, the number of heads, got {self.keep}")

    def __hash__(self) -> int:
        return hash((self.scores, self.keep))

    @property
    def layers(self) -> int:
        """L, the number of layers."""
        return len(self.scores)

    @property
    def heads(self) -> int:
        """H, the number of heads in each."""
        return len(self.scores[0])

    @property
    def ranking(self) -> tuple[tuple[int, int], ...]:
        """All heads as (layer, head), the best first; of equal ones the lower layer and head first."""
        places = [(layer, head) for layer in range(self.layers) for head in range(self.heads)]
        return tuple(sorted(places, key=lambda place: (-self.scores[place[0]][place[1]], place)))

    @property
    def chosen(self) -> dict[int, tuple[int, ...]]:
        """The heads that are kept, as ``{layer: (heads)}``."""
        found: dict[int, list[int]] = {}
        for layer, head in self.ranking[: self.keep]:
            found.setdefault(layer, []).append(head)
        return {layer: tuple(sorted(heads)) for layer, heads in sorted(found.items())}

    def keeping(self, keep: int) -> HeadProfile:
        """The same ranking with another number of heads."""
        return HeadProfile(self.scores, keep, self.about)

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a model of another shape.

        Raises:
            ValueError: it has other numbers of layers or heads.
        """
        if (self.layers, self.heads) != (shape.layers, shape.heads):
            raise ValueError(
                f"heads: this profile is of a model with {self.layers} layers of {self.heads} heads, this one has "
                f"{shape.layers} of {shape.heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "keep": self.keep,
            "chosen": {str(layer): list(heads) for layer, heads in self.chosen.items()},
            "scores": [list(row) for row in self.scores],
            "about": dict(self.about),
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> HeadProfile:
        """What `to_dict` described.

        Raises:
            TypeError, ValueError: it is no profile, or one of a newer attnrb.
        """
        if not isinstance(options, Mapping) or options.get("format") != _FORMAT:
            raise ValueError(f"profile: expected a mapping with format {_FORMAT!r}, which attnrb.profile_heads makes")
        if options.get("version") != _VERSION:
            raise ValueError(f"profile: this attnrb reads version {_VERSION}, got {options.get('version')!r}")
        return cls(options["scores"], options.get("keep", 32), options.get("about", {}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; the file replaces an older one only when it is complete."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(self.to_dict(), indent=1) + "\n")
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """Read what `save` wrote.

        Args:
            path: the file, or the name of a profile that comes with attnrb, such as ``"smollm2-135m-instruct"``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no profile.
        """
        file = _BUNDLED / f"{path}.json" if str(path) in bundled_profiles() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"profile: there is no file {str(path)!r}, and attnrb comes with {', '.join(bundled_profiles())} only; "
                "attnrb.profile_heads(...).save(path) makes one"
            )
        try:
            return cls.from_dict(parse_json(file.read_text(encoding="utf-8-sig")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None

    def __repr__(self) -> str:
        return f"HeadProfile(keep={self.keep} of {self.layers}×{self.heads} heads)"

    def _repr_html_(self) -> str:
        from attnrb.reports.fragment import fragment, rows_table

        rows = [
            [str(layer), ", ".join(map(str, heads)), f"{max(self.scores[layer][head] for head in heads):+.3g}"]
            for layer, heads in sorted(self.chosen.items())
        ]
        lead = f"{self.keep} of {self.layers} × {self.heads} heads are kept. attnrb profile --html draws all of them."
        return fragment("Which heads to edit", lead, rows_table(["layer", "heads", "best score, nats"], rows))


def read_heads(heads: Any) -> HeadChoice | HeadProfile | None:
    """Heads as a policy keeps them: a profile, from itself, its dictionary or its name; or a choice; None: all.

    Raises:
        FileNotFoundError: there is no profile of this name.
        TypeError, ValueError: it is none of these.
    """
    if heads is None or isinstance(heads, HeadProfile):
        return heads
    if isinstance(heads, str) and not re.fullmatch(r"[0-9\s,+-]+", heads):
        return HeadProfile.load(heads)
    if isinstance(heads, Mapping) and "scores" in heads:
        return HeadProfile.from_dict(heads)
    return head_choice("heads", heads)


def heads_by_layer(heads: Any, layers: Any, shape: ModelShape) -> dict[int, tuple[int, ...]]:
    """Which heads of which layers a policy edits; a layer without attention only if it is named.

    Args:
        heads: as `read_heads` returns them.
        layers: the layers; None: all.
        shape: of the model.

    Raises:
        ValueError: the model has not all of them, or the profile is of another model.
    """
    if isinstance(heads, HeadProfile):
        heads.check_model(shape)
        heads = heads.chosen
    beyond_the_model(layers, heads, shape.layers, shape.heads)
    found = {}
    for layer in range(shape.layers) if layers is None else layers:
        chosen = tuple(choose_heads(heads, layer, shape.heads))
        if chosen and (shape.has_attention[layer] or layers is not None):
            found[layer] = chosen
    return found
