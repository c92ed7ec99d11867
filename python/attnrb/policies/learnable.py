"""Numbers that are learnt, one for each layer and head: what all policies that have them share, files included."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from attnrb.policies.base import LayerView, ModelShape, Policy
from attnrb.reports.files import write_whole

__all__ = ["LearnedPerHead", "learned_file", "load_learned"]


class LearnedPerHead(torch.nn.Module, Policy):
    """A policy with one trainable number for each layer and head, its gain. What it means is the policy's matter.

    Attributes:
        config: the options besides.
        layers: the layers that have gains, ascending.
        model_layers: L, of the model that they are of.
        gains: parameter, float32 ``[len(layers), H]``. Heads that are not ``chosen`` have none.
        chosen: bool ``[len(layers), H]``.
    """

    config_class: ClassVar[type[Policy]]
    gains_file: ClassVar[str]
    """Name of the file that `save` writes to a folder."""
    gains_format: ClassVar[str]
    """What its head says that it is."""

    gains: torch.nn.Parameter
    chosen: torch.Tensor

    def _start(
        self, config: Any, depth: int, layers: tuple[int, ...], gains: torch.Tensor, chosen: torch.Tensor
    ) -> None:
        self.config = config
        self.layers = layers
        self.model_layers = depth
        self.gains = torch.nn.Parameter(gains)
        self.register_buffer("chosen", chosen)
        self._row = {layer: row for row, layer in enumerate(layers)}

    @property
    def heads(self) -> int:
        """H, the number of query heads in each layer."""
        return self.gains.shape[1]

    def gain(self, layer: int) -> torch.Tensor:
        """The gains of the heads of one of ``layers``, float32 ``[H]``, with their gradient."""
        row = self._row[layer]
        return torch.where(self.chosen[row], self.gains[row], 0.0)

    def check_model(self, shape: ModelShape) -> None:
        """Refuse a model of another shape.

        Raises:
            ValueError: the model has other numbers of layers or heads than the one that these gains are of.
        """
        if (shape.layers, shape.heads) != (self.model_layers, self.heads):
            raise ValueError(
                f"config: these gains are of a model with {self.model_layers} layers of {self.heads} heads, this one "
                f"has {shape.layers} of {shape.heads}"
            )

    def gain_of(self, view: LayerView, shape: ModelShape) -> torch.Tensor:
        """`gain` of a layer, for the heads that it has on this rank, on its device."""
        gain = self.gain(view.layer)
        return (gain if view.heads == shape.heads else shape.own(gain)).to(view.device)

    def matrix(self) -> torch.Tensor:
        """All gains as float32 ``[L, H]``, 0 where a layer or head has none; without gradient."""
        matrix = torch.zeros(self.model_layers, self.heads, dtype=torch.float32, device="cpu")
        matrix[list(self.layers)] = torch.where(self.chosen, self.gains, 0.0).detach().cpu()
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """Options and gains, JSON-ready: what `from_dict` reads."""
        return {
            "policy": self.name,
            "version": self.version,
            "config": self.config.to_dict(),
            "layers": list(self.layers),
            "model_layers": self.model_layers,
            "gains": self.gains.detach().cpu().tolist(),
            "chosen": self.chosen.cpu().tolist(),
        }

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> Self:
        if set(options) == {"path"}:  # as a command line names them
            return cls.load(options["path"])
        try:
            tensors = {
                "gains": torch.tensor(options["gains"], dtype=torch.float32, device="cpu"),
                "chosen": torch.tensor(options["chosen"], dtype=torch.bool, device="cpu"),
            }
            about = {"config": options["config"], "layers": options["layers"], "model_layers": options["model_layers"]}
        except KeyError as error:
            raise ValueError(f"options: learnt gains without {error}; known are path, or what to_dict gives") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"options: damaged gains: {error}") from None
        return cls._restore(about, tensors, "options")

    def label(self) -> str:
        """``learned_gains(`` and what tells these gains from others ``)``."""
        digest = hashlib.sha256(self.gains.detach().cpu().numpy().tobytes()).hexdigest()[:8]
        return f"{self.name}({digest})"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write them beside a model, as `save` does."""
        return self.save(folder)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote, as `load` does."""
        return cls.load(model)

    def forward(self, *_: Any) -> Any:
        """Not a layer of its own."""
        raise NotImplementedError(
            f"{type(self).__name__} computes nothing by itself: give it to attnrb.patch(model, learned)"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write gains and configuration as safetensors.

        Args:
            path: a file that ends in ``.safetensors``, or a folder, which is made if need be and gets
                the one that ``gains_file`` names.

        Returns:
            The file. It replaces an older one only when it is complete.
        """
        from safetensors.torch import save

        file = Path(path)
        if file.suffix != ".safetensors":
            file = file / self.gains_file
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": self.gains_format,
            "config": json.dumps(self.config.to_dict()),
            "layers": json.dumps(self.layers),
            "model_layers": str(self.model_layers),
        }
        tensors = {"gains": self.gains.detach().cpu().contiguous(), "chosen": self.chosen.cpu().contiguous()}
        write_whole(file, save(tensors, metadata=about))
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trainable: bool = False) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file, or the folder it is in.
            trainable: whether the gains require a gradient, for training on. The model is not frozen again.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no learnt gains of this kind, or damaged ones.
        """
        file = Path(path)
        if file.is_dir() or (not file.exists() and file.suffix != ".safetensors"):
            file = file / cls.gains_file
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; {cls.__name__}.save(path) writes one")
        about, tensors = _read(file)
        if about.get("format") != cls.gains_format:
            raise ValueError(
                f"{file}: expected learnt gains ({cls.gains_format}), got {about.get('format', 'other tensors')}"
            )
        try:
            read = {name: json.loads(about[name]) for name in ("config", "layers", "model_layers")}
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}: damaged: {error}") from None
        return cls._restore(read, tensors, str(file)).requires_grad_(trainable)

    @classmethod
    def _restore(cls, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str) -> Self:
        """Gains as they were; ``origin`` names where they come from in errors."""
        try:
            config = cls.config_class.from_dict(about["config"])
            layers, depth = tuple(about["layers"]), int(about["model_layers"])
            gains, chosen = tensors["gains"], tensors["chosen"]
            fits = (
                gains.dtype == torch.float32
                and chosen.dtype == torch.bool
                and gains.dim() == 2
                and gains.shape == chosen.shape
                and len(layers) == gains.shape[0]
                and all(isinstance(layer, int) and 0 <= layer < depth for layer in layers)
                and bool(torch.isfinite(gains).all())
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{origin}: damaged: {error}") from None
        if not fits:
            raise ValueError(f"{origin}: damaged: gains, heads and layers do not fit together")
        learned = cls.__new__(cls)
        torch.nn.Module.__init__(learned)
        learned._start(config, depth, layers, gains, chosen)
        return learned.requires_grad_(False)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"layers={list(self.layers)}, heads={self.heads}, {self.config}"


def _read(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a file of safetensors says of itself, and its tensors.

    Raises:
        ValueError: it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file, or a damaged one: {error}") from None


def learned_file(path: str | os.PathLike[str]) -> Path | None:
    """The file of learnt gains that a path names: itself, or the one in the folder. None: there is none.

    Raises:
        ValueError: the folder has several.
    """
    if Path(path).suffix == ".safetensors":
        return Path(path)
    found = [Path(path) / kind.gains_file for kind in LearnedPerHead.__subclasses__()]
    found = [file for file in found if file.is_file()]
    if len(found) > 1:
        raise ValueError(f"{path}: expected one file of learnt gains, got {', '.join(file.name for file in found)}")
    return found[0] if found else None


def load_learned(file: Path) -> LearnedPerHead:
    """The learnt gains in a file, of whichever policy.

    Raises:
        FileNotFoundError, ValueError: as `LearnedPerHead.load`.
    """
    kinds = {kind.gains_format: kind for kind in LearnedPerHead.__subclasses__()}
    about = _read(file)[0] if file.is_file() else {}
    # The first one says what is wrong with a file that is nobody's.
    return kinds.get(about.get("format", ""), next(iter(kinds.values()))).load(file)
