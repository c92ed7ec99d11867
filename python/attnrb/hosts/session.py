"""One forward of a model whose attention is edited: what its layers tell each other, whichever host runs it."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch

from attnrb.hosts.stats import PatchStats
from attnrb.ops.edit import Edit
from attnrb.ops.outliers import Outliers
from attnrb.ops.shown import shown_fields
from attnrb.policies.base import LayerPlan, Mixture, Request, Session

if TYPE_CHECKING:
    from attnrb.hosts.transformers.attention import Alike
    from attnrb.hosts.transformers.continuous import ContinuousStep
    from attnrb.hosts.transformers.geometry import MadeMasks

__all__ = [
    "AttentionCall",
    "Forward",
    "Observer",
    "Running",
    "calls_anywhere",
    "calls_of",
    "current_forward",
    "enter_forward",
    "outer_forward",
]


@dataclass(frozen=True, repr=False)
class AttentionCall:
    """One layer's attention in one forward, as an observer sees it.

    What a hook of TransformerLens or a trace of nnsight reads at a layer's attention, for any model that `attnrb.patch`
    serves:

        queries = {}

        def observe(call: attnrb.AttentionCall) -> None:
            queries[call.layer] = call.query

        with attnrb.patch(model, observer=observe):
            model(**inputs)

    The tensors are those of the forward: to change a copy is safe, and to keep one is to ``clone`` it where the model
    writes in place. The weights themselves are never built; ``call.attention(values)`` applies them, and with the
    identity for values it returns them.
    """

    layer: int
    query: torch.Tensor
    """``[B, H, M, D]``"""
    key: torch.Tensor
    """``[B, Hk, N, D]``"""
    value: torch.Tensor
    """``[B, Hk, N, Dv]``"""
    attention: Callable[[torch.Tensor], torch.Tensor]
    """The attention that this layer applies, edited where it is, for any values ``[B, Hk, N, any]``: output
    ``[B, H, M, any]``. It runs the op again."""
    scores: Mapping[str, Any]
    """``scale``, ``visibility``, ``softcap`` and ``sinks`` of this layer, as `attnrb.functional` takes them."""
    edit: Edit | Mixture | None
    """How the weights of this layer are edited; None in a layer that stays as it is."""
    found: Outliers | None
    """The outliers that a layer of this forward reported last; None where none did."""

    def __repr__(self) -> str:
        return shown_fields(self, ("layer", "query", "key", "value", "edit", "found"))

    @property
    def gain(self) -> torch.Tensor | None:
        """float32 ``[H]``: the gain of each head; None in a layer without one."""
        return cast("torch.Tensor | None", self.edit.gain) if isinstance(self.edit, Edit) else None

    @property
    def outliers(self) -> Outliers | None:
        """The entries that the gain strengthens, or those found so far; None: every entry is strengthened, or none."""
        if isinstance(self.edit, Edit) and self.edit.gain is not None:
            return cast("Outliers | None", self.edit.outliers)
        return self.found

    @property
    def normalize(self) -> bool:
        """Whether the rows of this layer are divided by their new sums."""
        return isinstance(self.edit, Edit) and self.edit.rule == "row"


Observer = Callable[[AttentionCall], None]


class Forward:
    """One forward of a model whose attention is edited.

    Attributes:
        plan: what is done in which layer.
        steps: its `LayerPlan.steps`.
        session: the policy at work in this forward.
        stats: where it is counted.
        observer: called after the attention of every layer.
        first_slot: slot of the first query, where a mask of the user's own makes it needed. The mask function notes it
            where transformers asks for a mask.
        weights: whether the layers are to return their weights.
        packed: whether positions may tell that several texts share a row.
        unpadded: whether there is no padding, whatever mask transformers is given.
        left_out: what the host knows of layers that are left out; None: it leaves out none.
        request: what was said of the texts, and what is kept of them.
        outer: the forward within which this one runs, where a hook calls the model again.
        module: the decoder whose forward it is; None in a traced one.
        called: the layers that came by.
        found: the outliers that a layer reported last.
        settled: the layers that were left out and of which the session knows that they found nothing.
        made: the masks that the host made for it; None where the host makes none.
        alike: what layers that share a mask have in common, for each mask.
        continuous: where the texts of a step of continuous batching lie; None in any other forward.
    """

    __slots__ = (
        "__weakref__",
        "alike",
        "called",
        "continuous",
        "first_slot",
        "found",
        "left_out",
        "made",
        "module",
        "observer",
        "outer",
        "packed",
        "plan",
        "request",
        "session",
        "settled",
        "stats",
        "steps",
        "unpadded",
        "weights",
    )

    def __init__(
        self,
        plan: LayerPlan,
        session: Session,
        stats: PatchStats,
        *,
        observer: Observer | None = None,
        first_slot: int | torch.Tensor | None = None,
        weights: bool = False,
        packed: bool = False,
        unpadded: bool = False,
        left_out: Any = None,
        made: MadeMasks | None = None,
        request: Request | None = None,
        outer: Forward | None = None,
        module: torch.nn.Module | None = None,
        continuous: ContinuousStep | None = None,
    ) -> None:
        self.plan = plan
        self.steps = plan.steps
        self.session = session
        self.stats = stats
        self.observer = observer
        self.first_slot = first_slot
        self.weights = weights
        self.packed = packed
        self.unpadded = unpadded
        self.left_out = left_out
        self.made = made
        self.request = request
        self.outer = outer
        self.module = module
        self.continuous = continuous
        self.called: set[int] = set()
        self.settled: set[int] = set()
        self.found: Outliers | None = None
        self.alike: list[Alike] = []

    def emitted(self, layer: int, outliers: Outliers, tokens: torch.Tensor | None) -> None:
        """Pass on a layer's outliers; ``tokens`` bool ``[B, M]`` says which queries count, None: all."""
        self.found = outliers
        self.session.emitted(layer, outliers)
        # A graph counts nothing, and gradient checkpointing runs a layer again.
        if layer not in self.called and not torch.compiler.is_compiling():
            self.stats.add_counts(outliers.counts, tokens)


class _Traced:
    """The forward that torch.compile is tracing, which cannot see context variables."""

    def __init__(self) -> None:
        self.forward: Forward | None = None


_traced = _Traced()
# Weak: a forward that failed must not be found later by parts of the model that are called by themselves.
_running: ContextVar[weakref.ref[Forward] | None] = ContextVar("attnrb_forward", default=None)


# The method that runs a module and its hooks; what torch.compile could not trace goes on under the other name.
_CALLS = ("_call_impl", "torch_dynamo_resume_in__call_impl")


def calls_of(module: torch.nn.Module | None) -> int:
    """How many calls of a module run in this thread, each within the one before it.

    Note: [Interrupts]
    PyTorch calls hooks after a call that failed, but not after an interrupt. What such a hook would have put right is
    put right when it is looked at next, and only the stack tells whether a call is over. It is asked where something
    is said to run within which nothing should, or of which nothing else is known: not in an ordinary forward.
    """
    return 0 if module is None else _calls(module, inspect.currentframe())


def calls_anywhere(module: torch.nn.Module) -> int:
    """How many calls of a module run in all threads: see `calls_of`."""
    return sum(_calls(module, frame) for frame in sys._current_frames().values())


def _calls(module: torch.nn.Module, frame: FrameType | None) -> int:
    """How many calls of a module are in a frame and those around it."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_name.startswith(_CALLS) and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count


class Running:
    """The forwards of one module that run, in any thread; those of a traced graph are not among them."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        # Weak: one that an interrupt ended goes by itself, sooner or later.
        self._forwards: weakref.WeakSet[Forward] = weakref.WeakSet()

    def begins(self, forward: Forward) -> None:
        """Note that a forward begins."""
        if not torch.compiler.is_compiling():
            self._forwards.add(forward)

    def ends(self, forward: Forward) -> None:
        """Note that it is over."""
        if not torch.compiler.is_compiling():
            self._forwards.discard(forward)

    def any(self, *, ending: int = 0) -> bool:
        """Whether one runs: of those that are noted, an interrupt may have ended some (Note: [Interrupts]).

        Args:
            ending: calls of the module that still run but whose forward is over, or has not begun.
        """
        return bool(self._forwards) and calls_anywhere(self._module) > ending


def outer_forward(module: torch.nn.Module) -> Forward | None:
    """The forward within which one of a module begins in this thread, if any; one that was interrupted is over."""
    if torch.compiler.is_compiling():
        return None
    forward = current_forward()
    while forward is not None:
        around, of_its_module = forward.outer, 1 + (forward.module is module)  # the call that begins is one too
        while around is not None:
            of_its_module += around.module is forward.module
            around = around.outer
        if calls_of(forward.module) >= of_its_module:
            break
        forward = forward.outer
    return forward


def enter_forward(forward: Forward | None) -> None:
    """Make this the forward that runs in this thread; None when it is over."""
    if torch.compiler.is_compiling():
        _traced.forward = forward
    else:
        _running.set(None if forward is None else weakref.ref(forward))


def current_forward() -> Forward | None:
    """The forward of a patched model that runs in this thread, if any."""
    if torch.compiler.is_compiling():
        return _traced.forward
    running = _running.get()
    return None if running is None else running()
