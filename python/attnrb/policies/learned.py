"""Gains that are learnt: one number for each layer and head, where `Rebalance` has a schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from attnrb.policies.base import LayerView, ModelShape, Policy, model_shape, register_policy
from attnrb.policies.checks import HeadChoice
from attnrb.policies.learnable import LearnedPerHead
from attnrb.policies.profile import HeadProfile, read_heads
from attnrb.policies.rebalance import Rebalance, RebalancePlan
from attnrb.protocols import Model

__all__ = ["GAINS_FILE", "LearnedGains"]

GAINS_FILE = "learned_gains.safetensors"
"""Name of the file that `LearnedGains.save` writes to a folder."""


@register_policy
class LearnedGains(LearnedPerHead):
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
    config_class = Rebalance
    gains_file = GAINS_FILE
    gains_format = "attnrb.LearnedGains"

    def __init__(
        self,
        model: Model | ModelShape,
        config: Policy | None = None,
        *,
        heads: HeadChoice | HeadProfile | str | None = None,
    ) -> None:
        """Start from the schedule, and freeze the model.

        Args:
            model: the ``transformers`` decoder to be patched, whose parameters are all frozen; or a
                `attnrb.policies.ModelShape`.
            config: the options. Default: ``Rebalance()``.
            heads: the heads that have a gain, in place of those of ``config``: a choice as it takes one, or a
                `attnrb.HeadProfile` or what `HeadProfile.load` takes. A profile's heads below the source layer and in
                it have none.

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
        if heads is not None:
            chosen_heads = read_heads(heads)
            if isinstance(chosen_heads, HeadProfile):
                chosen_heads.check_model(shape)
                chosen_heads = chosen_heads.chosen
            config = replace(config, heads=chosen_heads)
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
            torch.tensor(
                [schedule[layer] or (0.0,) * shape.heads for layer in layers], dtype=torch.float32, device="cpu"
            ),
            torch.tensor([chosen[layer] for layer in layers], dtype=torch.bool, device="cpu"),
        )
        self._follow(shape)
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False)  # only now, when nothing can fail any more

    def resolve(self, shape: ModelShape) -> RebalancePlan:
        """See `Policy.resolve`.

        Raises:
            ValueError: the model has other numbers of layers or heads than the one that these gains are of.
        """
        self.check_model(shape)
        self._follow(shape)
        return _LearnedPlan(self, shape)

    def _follow(self, shape: ModelShape) -> None:
        """Go where the model's layers are, if that is one device: else each would wait for a copy of its gains."""
        devices = set(shape.devices or ())
        if len(devices) == 1:
            self.to(devices.pop())


class _LearnedPlan(RebalancePlan):
    """Re-balancing whose gains are read in every forward, with their gradient."""

    def __init__(self, learned: LearnedGains, shape: ModelShape) -> None:
        super().__init__(learned.config, shape, {})
        self.learned = learned
        self.edited = frozenset(learned.layers)
        self.required |= self.edited

    def gain(self, view: LayerView) -> torch.Tensor | None:
        return self.learned.gain_of(view, self.shape) if view.layer in self.edited else None
