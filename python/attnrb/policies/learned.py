"""Gains that are learnt: one number for each layer and head, where `Rebalance` has a schedule."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from attnrb.policies.base import LayerView, ModelShape, Policy, model_shape, register_policy
from attnrb.policies.rebalance import Rebalance, RebalancePlan

__all__ = ["GAINS_FILE", "LearnedGains"]

GAINS_FILE = "learned_gains.safetensors"
"""Name of the file that `LearnedGains.save` writes to a folder."""

_FORMAT = "attnrb.LearnedGains"


@register_policy
class LearnedGains(torch.nn.Module, Policy):
    """One trainable gain for each re-balanced layer and head, beyond arXiv 2403.14932, where it follows a schedule.

        learned = attnrb.LearnedGains(model, attnrb.Rebalance())  # freezes the model
        with attnrb.patch(model, learned):
            optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-2)
            ...  # model(**batch).loss.backward(), optimizer.step()
        learned.save("gains")

        attnrb.patch(model, attnrb.LearnedGains.load("gains"))

    The model stays as it is; only the gains move. With ``transformers.Trainer`` pass ``optimizers=(optimizer, None)``
    and let the optimizer clear its own gradients, since Trainer clears those of the model only:

        optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-2)
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())

    Trainer's checkpoints hold the model and not the gains: ``examples/structured/training.py`` shows one that saves
    and resumes the gains. With re-entrant gradient checkpointing call
    ``model.enable_input_require_grads()`` first, since nothing else that goes into a layer requires a gradient.

    Attributes:
        config: the options; their schedule, or their ``gains``, is where the gains start.
        layers: the layers that have gains, ascending: those above the source layer, as far as ``config`` chooses them.
            The last is among them, though its scheduled gain is 0.
        gains: parameter, float32 ``[len(layers), H]``. Heads that ``config`` leaves out keep their 0.
    """

    name: ClassVar[str] = "learned_gains"

    gains: torch.nn.Parameter
    chosen: torch.Tensor

    def __init__(self, model: Any, config: Policy | None = None) -> None:
        """Start from the schedule, and freeze the model.

        Args:
            model: the ``transformers`` decoder to be patched, whose parameters are all frozen; or a
                `attnrb.policies.ModelShape`.
            config: the options. Default: ``Rebalance()``.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ``config`` names a layer or head that the model has not.
            NotImplementedError: `attnrb.patch` could not serve the model either.
        """
        if config is None:
            config = Rebalance()
        if not isinstance(config, Rebalance):
            raise TypeError(f"config: expected an attnrb.Rebalance or None, got {type(config).__name__}")
        if config.boost_all and config.normalize:
            raise ValueError("config: boost_all with normalize takes every gain back, so there is nothing to learn")
        shape = model_shape(model)
        schedule = config.gain_rows(shape)
        # A chosen gain may be 0, as the last layer's is in the schedule.
        rows = replace(config, gains=(1.0,) * shape.layers).gain_rows(shape)
        chosen = [[row is not None and row[head] != 0.0 for head in range(shape.heads)] for row in rows]
        layers = tuple(layer for layer, heads in enumerate(chosen) if any(heads))
        if not layers:
            raise ValueError("config: expected at least one layer and head to learn a gain for, got none")
        super().__init__()
        self._start(
            config,
            len(schedule),
            layers,
            torch.tensor([schedule[layer] or (0.0,) * shape.heads for layer in layers]),
            torch.tensor([chosen[layer] for layer in layers]),
        )
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False)  # only now, when nothing can fail any more

    def _start(
        self, config: Rebalance, depth: int, layers: tuple[int, ...], gains: torch.Tensor, chosen: torch.Tensor
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

    def resolve(self, shape: ModelShape) -> RebalancePlan:
        """See `Policy.resolve`.

        Raises:
            ValueError: the model has other numbers of layers or heads than the one that these gains are of.
        """
        if (shape.layers, shape.heads) != (self.model_layers, self.heads):
            raise ValueError(
                f"config: these gains are of a model with {self.model_layers} layers of {self.heads} heads, this one "
                f"has {shape.layers} of {shape.heads}"
            )
        return _LearnedPlan(self, shape)

    def matrix(self) -> torch.Tensor:
        """All gains as float32 ``[L, H]``, 0 where a layer or head has none; without gradient."""
        matrix = torch.zeros(self.model_layers, self.heads)
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
    def _from_options(cls, options: dict[str, Any]) -> LearnedGains:
        if set(options) == {"path"}:  # as a command line names them
            return cls.load(options["path"])
        try:
            tensors = {
                "gains": torch.tensor(options["gains"], dtype=torch.float32),
                "chosen": torch.tensor(options["chosen"], dtype=torch.bool),
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
        """Write the gains beside a model, as `save` does."""
        return self.save(folder)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> LearnedGains:
        """Read what `save_pretrained` wrote, as `load` does."""
        return cls.load(model)

    def forward(self, *_: Any) -> Any:
        """Not a layer of its own."""
        raise NotImplementedError("LearnedGains computes nothing by itself: give it to attnrb.patch(model, learned)")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write gains and configuration as safetensors.

        Args:
            path: a file that ends in ``.safetensors``, or a folder, which is made if need be and gets
                ``learned_gains.safetensors``.

        Returns:
            The file. It replaces an older one only when it is complete.
        """
        from safetensors.torch import save_file

        file = Path(path)
        if file.suffix != ".safetensors":
            file = file / GAINS_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": _FORMAT,
            "config": json.dumps(self.config.to_dict()),
            "layers": json.dumps(self.layers),
            "model_layers": str(self.model_layers),
        }
        unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            tensors = {"gains": self.gains.detach().cpu().contiguous(), "chosen": self.chosen.cpu().contiguous()}
            save_file(tensors, unfinished, metadata=about)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trainable: bool = False) -> LearnedGains:
        """Read what `save` wrote.

        Args:
            path: the file, or the folder it is in.
            trainable: whether the gains require a gradient, for training on. The model is not frozen again.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no learnt gains, or damaged ones.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        if file.is_dir() or (not file.exists() and file.suffix != ".safetensors"):
            file = file / GAINS_FILE
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; LearnedGains.save(path) writes one")
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{file}: no safetensors file, or a damaged one: {error}") from None
        if about.get("format") != _FORMAT:
            raise ValueError(f"{file}: expected learnt gains ({_FORMAT}), got {about.get('format', 'other tensors')}")
        try:
            read = {name: json.loads(about[name]) for name in ("config", "layers", "model_layers")}
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}: damaged: {error}") from None
        return cls._restore(read, tensors, str(file)).requires_grad_(trainable)

    @classmethod
    def _restore(cls, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str) -> LearnedGains:
        """Gains as they were; ``origin`` names where they come from in errors."""
        try:
            config = Rebalance.from_dict(about["config"])
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


class _LearnedPlan(RebalancePlan):
    """Re-balancing whose gains are read in every forward, with their gradient."""

    def __init__(self, learned: LearnedGains, shape: ModelShape) -> None:
        super().__init__(learned.config, shape, {})
        self.learned = learned
        self.edited = frozenset(learned.layers)
        self.required |= self.edited

    def gain(self, view: LayerView) -> torch.Tensor | None:
        if view.layer not in self.edited:
            return None
        gain = self.learned.gain(view.layer)
        return (gain if view.query.shape[1] == self.shape.heads else self.shape.own(gain)).to(view.device)
