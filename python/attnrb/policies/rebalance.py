"""What to re-balance and by how much: the method's options, checked when they are made."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["CONFIG_FILE", "RebalanceConfig"]

CONFIG_FILE = "rebalance_config.json"
"""Name of the file in a model's folder that `RebalanceConfig.save_pretrained` writes."""


@dataclass(frozen=True)
class RebalanceConfig:
    """The options of re-balancing (arXiv 2403.14932, section 3). Layers and heads are numbered from 0.

    Layer ℓ above the source layer strengthens the outliers of its heads by the gain ``g_ℓ = alpha · (1 - ℓ / depth)``;
    the source layer and those before it stay as they are. Sequences may be any iterable and are kept as tuples.

    Attributes:
        alpha: strength of the gains, any finite number. 0 leaves the model's output as it is.
        threshold: attention above which a key is an outlier, between 0 and 1, both excluded.
        source_layer: the layer whose attention decides what the outliers are. In a model that mixes attention with
            other layers, the default 0 means its first attention layer.
        depth: where the gain reaches 0, a positive number. The default, None, means L - 1 for a model of L layers. The
            published code uses 31 for every model. A depth below L - 1 makes the gains of the last layers negative.
        normalize: divide each row of attention by its new sum. The published method does not.
        boost_all: strengthen every entry and not only the outliers (the published code's ``boosting_self``).
        layers: the layers to re-balance, at least one of them above the source layer; those that are not stay as they
            are. The default, None, means all.
        heads: the heads to re-balance, as one list for all layers or as ``{layer: [heads]}``, where a layer that is not
            named stays as it is. The default, None, means all.
        gains: one gain for each of the model's L layers, in place of ``alpha`` and ``depth``. Those of the source layer
            and of layers before it are not used.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range.
    """

    alpha: float = 0.2
    threshold: float = 0.01
    source_layer: int = 0
    depth: float | None = None
    normalize: bool = False
    boost_all: bool = False
    layers: Sequence[int] | None = None
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    gains: Sequence[float] | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass is set through object: only here, before anyone else sees it.
        put = object.__setattr__
        put(self, "alpha", _number("alpha", self.alpha))
        put(self, "threshold", _number("threshold", self.threshold))
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold: expected a number between 0 and 1, both excluded, got {self.threshold}")
        put(self, "source_layer", _index("source_layer", self.source_layer))
        if self.depth is not None:
            put(self, "depth", _number("depth", self.depth))
            if self.depth <= 0:
                raise ValueError(f"depth: expected a positive number, got {self.depth}")
        for name in ("normalize", "boost_all"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.layers is not None:
            put(self, "layers", _indices("layers", self.layers))
            if all(layer <= self.source_layer for layer in self.layers):
                raise ValueError(
                    f"layers: expected at least one above the source layer {self.source_layer}, got {list(self.layers)}"
                )
        if isinstance(self.heads, Mapping):
            by_layer = {_index("heads", layer): _indices(f"heads[{layer}]", of) for layer, of in self.heads.items()}
            if all(layer <= self.source_layer for layer in by_layer):
                raise ValueError(
                    f"heads: expected a layer above the source layer {self.source_layer}, got {sorted(by_layer)}"
                )
            put(self, "heads", by_layer)
        elif self.heads is not None:
            put(self, "heads", _indices("heads", self.heads))
        if self.gains is not None:
            put(self, "gains", tuple(_number("gains", gain) for gain in _iterable("gains", self.gains)))

    def __hash__(self) -> int:
        heads = tuple(sorted(self.heads.items())) if isinstance(self.heads, Mapping) else self.heads
        return hash(tuple(heads if field.name == "heads" else getattr(self, field.name) for field in fields(self)))

    def layer_gains(self, layers: int, heads: int) -> tuple[tuple[float, ...] | None, ...]:
        """The gain of every head of every layer.

        Args:
            layers: L, the number of the model's decoder layers.
            heads: H, the number of query heads in each.

        Returns:
            For each of the L layers its H gains, or None where they are all 0 and the layer stays as it is.

        Raises:
            ValueError: an option names a layer or head that the model has not, or ``gains`` has not L entries.
        """
        self._check_range(layers, heads)
        depth = (layers - 1) if self.depth is None else self.depth
        result: list[tuple[float, ...] | None] = []
        for layer in range(layers):
            if layer <= self.source_layer or (self.layers is not None and layer not in self.layers):
                result.append(None)
                continue
            gain = self.alpha * (1 - layer / depth) if self.gains is None else self.gains[layer]
            chosen = self.heads.get(layer, ()) if isinstance(self.heads, Mapping) else self.heads
            gains = [0.0] * heads
            for head in range(heads) if chosen is None else chosen:
                gains[head] = gain
            result.append(tuple(gains) if any(gains) else None)
        return tuple(result)

    def _check_range(self, layers: int, heads: int) -> None:
        if self.source_layer >= layers:
            raise ValueError(f"source_layer: the model's layers are 0 to {layers - 1}, got {self.source_layer}")
        if self.gains is not None and len(self.gains) != layers:
            raise ValueError(f"gains: expected one for each of the model's {layers} layers, got {len(self.gains)}")
        by_layer = self.heads if isinstance(self.heads, Mapping) else {}
        for name, named in (("layers", self.layers or ()), ("heads", by_layer)):
            if beyond := [layer for layer in named if layer >= layers]:
                raise ValueError(f"{name}: the model's layers are 0 to {layers - 1}, got {beyond}")
        for chosen in self.heads.values() if isinstance(self.heads, Mapping) else (self.heads or (),):
            if beyond := [head for head in chosen if head >= heads]:
                raise ValueError(f"heads: the model's heads are 0 to {heads - 1}, got {beyond}")

    def to_dict(self) -> dict[str, Any]:
        """Every option, JSON-ready: sequences as lists, layers of ``heads`` as strings."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.heads, Mapping):
            options["heads"] = {str(layer): list(heads) for layer, heads in self.heads.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> RebalanceConfig:
        """The configuration that ``to_dict`` described; an option left out has its default.

        Raises:
            TypeError: ``options`` is no mapping, or an option has the wrong type.
            ValueError: an option is unknown or out of range.
        """
        if not isinstance(options, Mapping):
            raise TypeError(f"options: expected a mapping, got {type(options).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(f"options: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        options = dict(options)
        if isinstance(options.get("heads"), Mapping):
            # JSON has no integer keys.
            options["heads"] = {
                int(layer) if isinstance(layer, str) and layer.isdecimal() else layer: heads
                for layer, heads in options["heads"].items()
            }
        return cls(**options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the options beside a model, as ``rebalance_config.json``; `from_pretrained` reads them.

        Args:
            folder: of the model; made if it is not there.

        Returns:
            The file.
        """
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> RebalanceConfig:
        """The options that `save_pretrained` wrote beside a model.

        Args:
            model: its folder, or its id on the Hugging Face hub, which needs the package huggingface_hub.

        Raises:
            FileNotFoundError: there is no ``rebalance_config.json``.
            TypeError, ValueError: it is no JSON object, or an option in it is unknown or out of range.
        """
        path = Path(model) / CONFIG_FILE
        if not Path(model).is_dir():
            path = _from_hub(str(model))
        if not path.is_file():
            raise FileNotFoundError(f"model: there is no {CONFIG_FILE} in {str(model)!r}")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from error
        except ValueError as error:  # that of JSON has arguments of its own
            raise ValueError(f"{path}: {error}") from error


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, CONFIG_FILE))
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise FileNotFoundError(
            f"model: {name!r} is no folder here, and no {CONFIG_FILE} could be had from the Hugging Face hub: {reason}"
        ) from error


def _number(name: str, value: Any) -> float:
    """As a float; numbers of NumPy and torch pass, text and truth values do not."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _index(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        index = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if index < 0:
        raise ValueError(f"{name}: expected 0 or above, got {index}")
    return index


def _indices(name: str, values: Any) -> tuple[int, ...]:
    """Ascending, without repeats, so that equal choices are equal configurations."""
    indices = {_index(name, value) for value in _iterable(name, values)}
    if not indices:
        raise ValueError(f"{name}: expected at least one, got none; leave it None to mean all")
    return tuple(sorted(indices))


def _iterable(name: str, values: Any) -> Iterable[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence, got {values!r}")
    return values
