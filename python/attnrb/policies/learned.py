"""Gains that are learnt: one number for each layer and head, where `RebalanceConfig` has a schedule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from attnrb.policies.rebalance import RebalanceConfig

__all__ = ["GAINS_FILE", "LearnedGains"]

GAINS_FILE = "learned_gains.safetensors"
"""Name of the file that `LearnedGains.save` writes to a folder."""

_FORMAT = "attnrb.LearnedGains"


class LearnedGains(torch.nn.Module):
    """One trainable gain for each re-balanced layer and head, beyond arXiv 2403.14932, where it follows a schedule.

        learned = attnrb.LearnedGains(model, attnrb.RebalanceConfig())  # freezes the model
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

    gains: torch.nn.Parameter
    chosen: torch.Tensor

    def __init__(self, model: Any, config: RebalanceConfig | None = None) -> None:
        """Start from the schedule, and freeze the model.

        Args:
            model: the ``transformers`` decoder to be patched. All its parameters are frozen.
            config: the options. Default: ``RebalanceConfig()``.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ``config`` names a layer or head that the model has not.
            NotImplementedError: `attnrb.patch` could not serve the model either.
        """
        from attnrb.hosts.transformers.patch import gain_layout  # which needs this module

        if config is None:
            config = RebalanceConfig()
        if not isinstance(config, RebalanceConfig):
            raise TypeError(f"config: expected an attnrb.RebalanceConfig or None, got {type(config).__name__}")
        if config.boost_all and config.normalize:
            raise ValueError("config: boost_all with normalize takes every gain back, so there is nothing to learn")
        schedule, chosen = gain_layout(model, config)
        layers = tuple(layer for layer, heads in enumerate(chosen) if any(heads))
        if not layers:
            raise ValueError("config: expected at least one layer and head to learn a gain for, got none")
        super().__init__()
        self._start(
            config,
            len(schedule),
            layers,
            torch.tensor([schedule[layer] for layer in layers]),
            torch.tensor([chosen[layer] for layer in layers]),
        )
        model.requires_grad_(False)  # only now, when nothing can fail any more

    def _start(
        self, config: RebalanceConfig, depth: int, layers: tuple[int, ...], gains: torch.Tensor, chosen: torch.Tensor
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

    def check_model(self, layers: int, heads: int) -> None:
        """Refuse a model of another shape.

        Raises:
            ValueError: it has other numbers of layers or heads than the model that these gains are of.
        """
        if (layers, heads) != (self.model_layers, self.heads):
            raise ValueError(
                f"config: these gains are of a model with {self.model_layers} layers of {self.heads} heads, this one "
                f"has {layers} of {heads}"
            )

    def matrix(self) -> torch.Tensor:
        """All gains as float32 ``[L, H]``, 0 where a layer or head has none; without gradient."""
        matrix = torch.zeros(self.model_layers, self.heads)
        matrix[list(self.layers)] = torch.where(self.chosen, self.gains, 0.0).detach().cpu()
        return matrix

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
            config = RebalanceConfig.from_dict(json.loads(about["config"]))
            layers, depth = tuple(json.loads(about["layers"])), int(about["model_layers"])
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
            raise ValueError(f"{file}: damaged: {error}") from None
        if not fits:
            raise ValueError(f"{file}: damaged: gains, heads and layers do not fit together")
        learned = cls.__new__(cls)
        torch.nn.Module.__init__(learned)
        learned._start(config, depth, layers, gains, chosen)
        return learned.requires_grad_(trainable)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"layers={list(self.layers)}, heads={self.heads}, {self.config}"
