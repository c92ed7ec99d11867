"""Emphasis whose strengths are learnt: one for each layer and head, where `Emphasis` has one for all."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from attnrb.policies.base import LayerView, ModelShape, model_shape, register_policy
from attnrb.policies.emphasis import Emphasis, EmphasisPlan
from attnrb.policies.learnable import LearnedPerHead
from attnrb.policies.profile import heads_by_layer
from attnrb.protocols import Model

__all__ = ["LearnedEmphasis"]


@register_policy
class LearnedEmphasis(LearnedPerHead):
    """One trainable strength for each layer and head of emphasis; the spans come with each call, as data.

        learned = attnrb.LearnedEmphasis(model, attnrb.Emphasis(strength=2))  # freezes the model
        optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-2)
        with attnrb.patch(model, learned) as patched:
            with patched.spans(marked.spans):
                model(**marked.inputs, labels=labels).loss.backward()
            optimizer.step()
        learned.save("strengths")

        attnrb.patch(model, attnrb.LearnedEmphasis.load("strengths"))

    The model stays as it is; only the gains move. A gain is the natural logarithm of a strength, so that 0 changes
    nothing and every step leads to a strength above 0. A span with a strength of its own keeps that. What
    `attnrb.LearnedGains` says of ``transformers.Trainer`` and gradient checkpointing holds here too.

    Attributes:
        config: the options; its ``strength`` is where all strengths start.
        layers: the layers that have gains, ascending.
        gains: parameter, float32 ``[len(layers), H]``: ln(strength). Heads that ``config`` leaves out do not count.
    """

    name: ClassVar[str] = "learned_emphasis"
    config_class = Emphasis
    gains_file = "learned_emphasis.safetensors"
    gains_format = "attnrb.LearnedEmphasis"

    def __init__(self, model: Model | ModelShape, config: Emphasis | None = None) -> None:
        """Start from one strength, and freeze the model.

        Args:
            model: the ``transformers`` decoder to be patched, whose parameters are all frozen; or a
                `attnrb.policies.ModelShape`.
            config: the options. Default: ``Emphasis(strength=1)``, which starts as the model is.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ``config`` has a share, or a strength of 0, or names a layer or head that the model has not.
            NotImplementedError: `attnrb.patch` could not serve the model either.
        """
        if config is None:
            config = Emphasis(strength=1.0)
        if not isinstance(config, Emphasis):
            raise TypeError(f"config: expected an attnrb.Emphasis or None, got {type(config).__name__}")
        if config.share is not None:
            raise ValueError("config: expected one without share, in whose place a strength is learnt")
        if config.strength == 0:
            raise ValueError("config: expected a strength above 0 to start from: what is removed has no gradient")
        shape = model_shape(model)
        found = heads_by_layer(config.heads, config.layers, shape)
        if not found:
            raise ValueError("config: expected at least one layer and head to learn a strength for, got none")
        super().__init__()
        chosen = torch.zeros(len(found), shape.heads, dtype=torch.bool, device="cpu")
        for row, heads in enumerate(found.values()):
            chosen[row, list(heads)] = True
        self._start(config, shape.layers, tuple(found), torch.where(chosen, math.log(config.strength), 0.0), chosen)
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False)  # only now, when nothing can fail any more

    def resolve(self, shape: ModelShape) -> EmphasisPlan:
        """See `Policy.resolve`.

        Raises:
            ValueError: the model has other numbers of layers or heads than the one that these gains are of.
        """
        self.check_model(shape)
        return _LearnedPlan(self, shape)


class _LearnedPlan(EmphasisPlan):
    """Emphasis whose strengths are read in every forward, with their gradient."""

    def __init__(self, learned: LearnedEmphasis, shape: ModelShape) -> None:
        chosen: dict[int, tuple[int, ...] | None] = {}
        for layer, heads in zip(learned.layers, learned.chosen.tolist(), strict=True):
            chosen[layer] = None if all(heads) else tuple(head for head, heeds in enumerate(heads) if heeds)
        super().__init__(learned.config, shape, chosen)
        self.learned = learned

    def log_strength(self, view: LayerView) -> torch.Tensor:
        return self.learned.gain_of(view, self.shape).to("cpu")

    def state(self, view: LayerView) -> Any:
        gains = self.learned.gains
        if gains.requires_grad and torch.is_grad_enabled():
            return None
        return view.layer, gains.data_ptr(), None if gains.is_inference() else gains._version
