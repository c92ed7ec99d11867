"""Layers that a forward leaves out: told apart from layers whose attention attnrb does not reach.

Note: [Layers that are left out]
A layer that was to be edited and did not call its attention function is an error, unless the model left it out. Models
do so in two ways. Early exit (LayerSkip, ``generate(assistant_early_exit=k)``) lowers ``num_hidden_layers`` in the
configuration, and layers from there on do not run. Layer dropping leaves out layers at random in training; there a hook
notes which layers begin. And people take layers out of a model, which then has no module of their numbers. What is left
out is left out: if it was to find outliers, it found none, and the layers above
it stay as they are in this forward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch

from attnrb.hosts.session import Forward, current_forward
from attnrb.hosts.transformers.interface import attribute, every_module, size
from attnrb.ops.outliers import Outliers

# Where transformers drafts tokens with the lower layers, and the local variable that holds their true number.
_DEPTH = "num_hidden_layers"
_EARLY_EXIT = ("EarlyExitCandidateGenerator", "get_candidates", "original_num_hidden_layers")

__all__ = ["LeftOut", "end_early_exit"]


class LeftOut:
    """Which layers of one decoder are left out; see `Note: [Layers that are left out]`."""

    def __init__(self, decoder: Any) -> None:
        """Look which modules are the decoder's layers, and whether it drops any."""
        self._decoder = decoder
        drops = any(attribute(module, "layerdrop") for module in every_module(decoder))
        self._layers = _layers(decoder) if drops else {}
        self._numbers = {id(module): layer for layer, module in self._layers.items()}
        self._full = size(decoder.config, _DEPTH)
        self._taken: tuple[Any, int] | None = None  # the depth of an early exit, and the true one
        self._begun: weakref.WeakKeyDictionary[Forward, set[int]] = weakref.WeakKeyDictionary()

    def register(self, wrap: Callable[[Callable[..., Any]], Any]) -> list[Any]:
        """Hook the layers of a decoder that drops some.

        Args:
            wrap: makes a hook of a function.

        Returns:
            The handles that take the hooks out again; none where no layer is ever dropped.
        """
        return [module.register_forward_pre_hook(wrap(self._begins)) for module in self._layers.values()]

    @property
    def at_random(self) -> bool:
        """Whether layers below an edited one may be left out of a forward that begins now."""
        return bool(self._layers) and self._decoder.training

    def give_back(self) -> None:
        """Give the decoder the layers back that an early exit took, where an interrupt ended it: Note: [Interrupts]."""
        if torch.compiler.is_compiling():
            return
        config = self._decoder.config
        depth = size(config, _DEPTH)
        if self._taken is None and depth == self._full:
            return
        true = _true_depth()
        if true is not None:
            self._taken = (depth, true)
            return
        if self._taken is not None and depth == self._taken[0]:
            setattr(config, _DEPTH, self._taken[1])
        self._taken = None

    def among(self, forward: Forward, layers: Collection[int]) -> set[int]:
        """Those of these layers, none of which came by, that the model leaves out of this forward."""
        depth = size(self._decoder.config.get_text_config(decoder=True), "decoder_layers", "num_hidden_layers")
        left_out = {layer for layer in layers if isinstance(depth, int) and layer >= depth}
        if self.at_random:
            begun = self._begun.get(forward, set())
            left_out |= {layer for layer in layers if layer in self._layers and layer not in begun}
        if left_out.issuperset(layers):
            return left_out
        there = {attribute(module, "layer_idx") for module in every_module(self._decoder)}
        return left_out | {layer for layer in layers if layer not in there}

    def settle(self, forward: Forward, layer: int, query: torch.Tensor) -> None:
        """Before a layer runs, pass on that those below it which were left out found no outliers.

        Args:
            forward: the forward.
            layer: the layer.
            query: its query ``[B, H, M, D]``.
        """
        waiting = {each for each in forward.plan.emits if each < layer} - forward.called - forward.settled
        for each in self.among(forward, waiting):
            counts = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
            forward.session.emitted(each, Outliers(counts.new_empty((*counts.shape, 0)), counts))
            forward.settled.add(each)

    def _begins(self, module: torch.nn.Module, _: Any) -> None:
        forward, layer = current_forward(), self._numbers.get(id(module))
        if forward is not None and layer is not None and not torch.compiler.is_compiling():
            self._begun.setdefault(forward, set()).add(layer)


def end_early_exit(decoder: Any) -> None:
    """Give a decoder whose forward failed the layers back that an early exit took.

    transformers lowers ``num_hidden_layers`` while it drafts tokens and puts it back only where nothing fails. The
    number is in a caller's variable, and nowhere else.
    """
    depth = _true_depth()
    if depth is not None:
        setattr(decoder.config, _DEPTH, depth)


def _true_depth() -> int | None:
    """The number of layers of a model that drafts tokens by an early exit further up the stack; None: none does."""
    kind, function, variable = _EARLY_EXIT
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and type(frame.f_locals.get("self")).__name__ == kind:
            depth = frame.f_locals.get(variable)
            if isinstance(depth, int):
                return depth
        frame = frame.f_back
    return None


def _layers(decoder: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The outermost module of each layer: the largest that holds attention modules of no other layer."""
    found: dict[int, torch.nn.Module] = {}

    def visit(module: torch.nn.Module) -> set[int]:
        number = getattr(module, "layer_idx", None)
        numbers = {number} if isinstance(number, int) else set()
        below = [(child, visit(child)) for child in module.children()]
        numbers = numbers.union(*(each for _, each in below))
        if len(numbers) > 1:
            found.update((next(iter(each)), child) for child, each in below if len(each) == 1)
        return numbers

    visit(decoder)
    return found
