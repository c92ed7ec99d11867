"""Edit the attention of a Hugging Face model in place, and take it back.

Note: [How a model is patched]
transformers looks up its attention and its mask function by a name in the configuration that a module holds. A patch
registers attnrb's functions under a name of its own and gives the modules of one model a stand-in for their
configuration that says this name (`Note: [Who says attnrb's name]`); the configuration itself, which other models may
share, is not written to. A hook before the decoder adds one keyword argument, the `Forward`, which models hand down to
their attention. A hook after it checks that every layer that was to be edited did come by: what cannot be served
raises, and nothing runs plainly without a word. `Patch.remove` puts the configurations back and takes the hooks out,
but not in the middle of a forward, whose layers would then read masks that are not for them: it waits for its end.

A patch belongs to one model. Copies of a patched model, made with ``copy.deepcopy``, by pickling or by
``save_pretrained``, are not patched: when a hook is copied it leaves nothing but the original attention behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, cast

import torch

from attnrb.decisions import tell
from attnrb.deprecation import deprecated
from attnrb.hosts.requests import Requests
from attnrb.hosts.session import (
    AttentionCall,
    Forward,
    Observer,
    Running,
    calls_anywhere,
    enter_forward,
    outer_forward,
)
from attnrb.hosts.stats import PatchStats
from attnrb.hosts.transformers.attention import FORWARD, attention
from attnrb.hosts.transformers.caches import Caches, Sequences, cache_of
from attnrb.hosts.transformers.checkpointing import expect_backward
from attnrb.hosts.transformers.configurations import NAME, Configurations, Hook, begin_model, end_model
from attnrb.hosts.transformers.continuous import Continuous
from attnrb.hosts.transformers.decoder import decoder_of, decoder_shape, find_decoder, patch_of, shard_of, whole_model
from attnrb.hosts.transformers.geometry import MadeMasks
from attnrb.hosts.transformers.left_out import LeftOut, end_early_exit
from attnrb.ops import _native
from attnrb.policies.base import Policy, Request
from attnrb.policies.learned import LearnedGains
from attnrb.policies.rebalance import Rebalance
from attnrb.protocols import Model
from attnrb.text.marked import Marked
from attnrb.text.spans import Spans

__all__ = ["AttentionCall", "Patch", "patch", "patched", "unpatch"]


def patch(
    model: Model,
    policy: Policy | Mapping[str, Any] | None = None,
    *,
    observer: Observer | None = None,
    config: Policy | None = None,
    **options: Any,
) -> Patch:
    """Edit a model's attention from now on.

        with attnrb.patch(model, attnrb.Rebalance(alpha=0.2)):
            model.generate(**inputs)

    or, without ``with``, until ``remove()`` of the handle. Forward, ``generate`` with its caches, batches with padding,
    sampling and beam search work as before. A model that shares modules or its configuration with others may be
    patched: those that share a configuration do not notice, those that share modules share the patch.

    Args:
        model: a ``transformers`` decoder, with or without a head, in float32, bfloat16 or float16.
        policy: what to edit: an `attnrb.Policy`, such as `attnrb.Rebalance`, `attnrb.Emphasis` or
            `attnrb.LearnedGains`; or a mapping that `attnrb.Policy.from_dict` reads. Default: ``Rebalance()``.
        observer: called with an `AttentionCall` after the attention of every layer: a hook at which queries, keys and
            values, the edit, and the attention itself can be read.
        config: the name that attnrb 0.1 had for ``policy``.
        options: of re-balancing, in place of ``policy``: ``attnrb.patch(model, alpha=0.3)``.

    Returns:
        The patch, already in force: a handle and a context manager.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``policy`` names a layer or head that the model has not, or has gains of another model.
        RuntimeError: the model is patched already, or a forward of it runs.
        NotImplementedError: the model cannot be served; the message says why. What only a forward shows raises there.
        ImportError: transformers is missing or too old.
    """
    if observer is not None and not callable(observer):
        raise TypeError(f"observer: expected a function or None, got {type(observer).__name__}")
    return Patch(model, _policy(policy, config, options), observer)


def _policy(policy: Any, config: Any, options: dict[str, Any]) -> Policy:
    given = [each for each in (policy, config) if each is not None]
    if len(given) + bool(options) > 1:
        raise TypeError("policy: expected it once: as the second argument, or as options of re-balancing")
    if options:
        return Rebalance.from_dict(options)
    if not given:
        return Rebalance()
    if isinstance(given[0], Mapping):
        return Policy.from_dict(given[0])
    if not isinstance(given[0], Policy):
        raise TypeError(
            "policy: expected an attnrb.Policy (Rebalance, LearnedGains and so on), a mapping or None, got "
            f"{type(given[0]).__name__}{_hint(given[0])}"
        )
    return given[0]


def _hint(policy: Any) -> str:
    """What somebody may have meant who passed something else for a policy."""
    if isinstance(policy, str):
        return ": attnrb.policies.parse.parse_policy reads text, attnrb.Policy.from_pretrained a folder"
    if isinstance(policy, type) and issubclass(policy, Policy):
        return f": make one, as {policy.__name__}()"
    if isinstance(policy, (int, float)):
        return f": name the option, as alpha={policy}"
    return ""


def patched(model: Model) -> Patch | None:
    """The patch that is in force on a model; None where there is none.

    Raises:
        TypeError: ``model`` is no model of transformers.
    """
    found = patch_of(decoder_of(model))
    assert found is None or isinstance(found, Patch)
    return found


def unpatch(model: Model) -> bool:
    """Take the patch off a model, wherever its handle is.

    Returns:
        Whether there was one.

    Raises:
        TypeError: ``model`` is no model of transformers.
    """
    found = patched(model)
    if found is not None:
        found.remove()
    return found is not None


class Patch:
    """A model whose attention is being edited; made by `patch`.

    Attributes:
        policy: what is edited, as given.
        stats: what was done so far. It stays readable after `remove`. Forwards inside a graph of ``torch.compile`` are
            not counted.
        model: what was patched.
        leaving: whether the patch waits for the end of a forward, to be removed then: see `remove`.
        decoder: the part of the model that holds its layers. Called by itself, it computes no logits.
    """

    def __init__(self, model: Model, policy: Policy, observer: Observer | None = None) -> None:
        """See `patch`."""
        _register()
        self.model = cast("Any", model)
        decoder = find_decoder(self.model)
        if calls_anywhere(decoder):
            raise RuntimeError("model: a forward of it runs: patch it before or after, and not in between")
        self.stats = PatchStats()
        self.decoder = decoder
        self._observer = observer
        self._request = Requests()
        self._shape = decoder_shape(decoder, shard_of(self.model))
        self.update(policy)
        self._configurations = Configurations(whole_model(self.model), decoder)
        self._left_out, self._caches, self._sequences = LeftOut(decoder), Caches(), Sequences()
        self._continuous = Continuous()
        self._running = Running(decoder)
        self.leaving = False
        self._active = True
        self._hooks = [
            decoder.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
            decoder.register_forward_hook(Hook(self._after_forward), with_kwargs=True),
            # Also where the forward failed.
            decoder.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True),
            *self._left_out.register(Hook),
        ]
        for each in self._configurations.around:
            self._hooks.append(each.register_forward_pre_hook(Hook(begin_model)))
            self._hooks.append(each.register_forward_hook(Hook(end_model), always_call=True))

    def update(self, policy: Policy | Mapping[str, Any] | None = None, **options: Any) -> None:
        """Edit by another policy from the next forward on; the counts in ``stats`` go on, until ``stats.reset()``.

            patched.update(alpha=0.5)
            patched.update(attnrb.Emphasis(strength=8))

        Args:
            policy: as `patch` takes it.
            options: of re-balancing, in place of ``policy``; those not named have their defaults.

        Raises:
            TypeError, ValueError: as `patch` does, or nothing is given; the policy before then stays.
        """
        if policy is None and not options:
            raise TypeError("policy: expected a policy, a mapping or options of re-balancing, got none")
        policy = _policy(policy, None, options)
        with torch.inference_mode(False):  # a tensor of inference mode could not take part in training later
            plan = policy.resolve(self._shape)
        _ = plan.steps  # worked out here and not in a traced forward
        self._plan = plan
        self.policy = policy
        if self._plan.emits:
            tell("outliers_kept", f"{type(policy).__name__} edits by those of layers {sorted(self._plan.emits)}")
        if self._plan.keeps:
            tell("text_kept", f"{type(policy).__name__} goes by what the prompt showed")
        if any(each.is_cuda for each in islice(self.decoder.parameters(), 1)) and not _native.library_kernels():
            tell("own_kernels", "PyTorch's kernels are turned off in torch.backends.cuda")

    @property
    def config(self) -> Any:
        """The options of re-balancing: those of learnt gains are theirs. For any other policy, the policy itself."""
        return self.policy.config if isinstance(self.policy, LearnedGains) else self.policy

    @property
    def learned(self) -> LearnedGains | None:
        """Deprecated: the learnt gains that are used, or None. ``policy`` has them."""
        deprecated("Patch.learned", "Patch.policy", removed_in="0.4.0")
        return self.policy if isinstance(self.policy, LearnedGains) else None

    @property
    def active(self) -> bool:
        """Whether the model is still patched."""
        return self._active

    @property
    def layers(self) -> int:
        """L, how many decoder layers the model has."""
        return self._shape.layers

    @property
    def source_layer(self) -> int | None:
        """The layer that decides what the outliers are: in a hybrid, the first one with attention unless chosen.

        None for a policy that looks for no outliers.
        """
        return self._plan.source_layer

    @contextmanager
    def spans(self, spans: Spans, *, prompt: int | torch.Tensor | None = None) -> Iterator[Patch]:
        """Say which spans matter in all calls of the model in this thread, until the block ends.

            marked = attnrb.mark(tokenizer, "((Read this.)) Then answer:")
            with patched.spans(marked.spans):
                model.generate(**marked.inputs)

        Args:
            spans: of each row of the batch, as `attnrb.mark` makes them. A call whose batch has a multiple of these
                rows, such as one with beams, takes each row's spans as often.
            prompt: one past the slot of the prompt's last token, for all rows or int64 ``[B]``. Default: where the
                first call ends, which is wrong if a prompt is read in several calls.

        Raises:
            TypeError: ``spans`` are no `attnrb.Spans`.
        """
        if not isinstance(spans, Spans):
            raise TypeError(f"spans: expected attnrb.Spans, such as marked.spans, got {type(spans).__name__}")
        if isinstance(prompt, int):
            prompt = torch.full((len(spans),), prompt, dtype=torch.int64, device="cpu")
        with self._request.set(Request(spans, prompt)):
            yield self

    def generate(self, marked: Marked, **options: Any) -> Any:
        """``model.generate`` on a marked prompt, whose spans matter throughout.

        Args:
            marked: of `attnrb.mark`.
            options: of ``generate``.

        Returns:
            What ``generate`` returns.

        Raises:
            TypeError: ``marked`` is no `attnrb.Marked`, or the model has no ``generate``.
        """
        if not isinstance(marked, Marked):
            raise TypeError(f"marked: expected what attnrb.mark returns, got {type(marked).__name__}")
        if not callable(getattr(self.model, "generate", None)):
            raise TypeError(f"model: {type(self.model).__name__} has no generate")
        inputs = marked.to(self.model.device).inputs
        with self.spans(marked.spans, prompt=inputs["input_ids"].shape[1]):
            return self.model.generate(**inputs, **options)

    def remove(self) -> None:
        """Make the model what it was. A second call does nothing.

        A backward through gradient checkpointing, which runs the layers again, has to come before it. While a forward
        runs, as in a hook of the model's or in another thread, the model stays patched until it is over: a forward
        ends as it began.
        """
        if self._running.any():
            self.leaving = True
        else:
            self._take_off()

    def _take_off(self) -> None:
        self.leaving = False
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._active = [], False
        self._left_out.give_back()
        self._configurations.restore()

    def __enter__(self) -> Patch:
        if not self.active or self.leaving:
            raise RuntimeError("this patch was removed: call attnrb.patch(model, policy) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __reduce__(self) -> Any:
        raise TypeError("a patch belongs to one model and cannot be copied: copy the model and patch the copy")

    def __repr__(self) -> str:
        return f"Patch({'active' if self.active else 'removed'}, {self.policy!r}, {self.stats})"

    def _before_forward(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None or not self._active:  # a hook before this one removed it, and PyTorch had its list already
            return None
        if self.leaving and not torch.compiler.is_compiling() and not self._running.any(ending=1):
            self._take_off()  # an interrupt ended the forward that was waited for
            return args, kwargs
        check_keywords(decoder, kwargs)
        self._left_out.give_back()
        inputs = _Inputs(decoder, args, kwargs)
        unpadded, weights = inputs.rule_out_packing(), inputs.weights_wanted()
        observed = weights or self._observer is not None
        continuous = self._continuous.step(kwargs, self._plan, observed=observed)
        if continuous is None:
            self._caches.check(cache_of(kwargs), kwargs.get("position_ids"), inputs.queries())
        request = self._request.current(self._plan)
        if self._plan.keeps:
            request = (request or Request()).of_sequence(self._sequences.of(cache_of(kwargs)))
        traced = torch.compiler.is_compiling()
        forward = Forward(
            self._plan,
            self._plan.begin(request),
            self.stats,
            observer=self._observer,
            first_slot=None if continuous else inputs.first_slot(),
            weights=weights,
            packed=inputs.maybe_packed(),
            unpadded=unpadded,
            left_out=self._left_out if self._left_out.at_random else None,
            made=None if traced else MadeMasks(),
            request=request,
            outer=outer_forward(decoder),
            module=None if traced else decoder,
            continuous=continuous,
        )
        kwargs[FORWARD] = forward
        enter_forward(forward)
        self._running.begins(forward)
        return args, kwargs

    def _after_forward(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward: Forward = kwargs[FORWARD]
        plan = forward.plan
        if not plan.required <= forward.called:
            missing = plan.required - forward.called
            missing -= self._left_out.among(forward, missing)
            if missing:
                raise NotImplementedError(
                    f"{type(decoder).__name__}: the attention of layers {sorted(missing)} did not go through "
                    "transformers' AttentionInterface, so attnrb could not reach it. If these layers have no "
                    "attention, name those to re-balance with RebalanceConfig(layers=...). If they did not run at all: "
                    "a model may leave out layers by lowering num_hidden_layers in its configuration, or by layerdrop"
                )
        expect_backward(decoder, output)
        if plan.keeps and forward.request is not None and cache_of(kwargs) is None:
            self._sequences.note(output, forward.request.sequence)
        if not torch.compiler.is_compiling():  # a graph counts nothing
            self.stats.add_forward(forward.called & plan.edited)

    def _leave(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward is over, or failed: one around it, whose hook called the model again, goes on."""
        forward = kwargs.get(FORWARD)
        if output is None and not torch.compiler.is_compiling():
            end_early_exit(decoder)
        enter_forward(forward.outer if isinstance(forward, Forward) else None)
        if isinstance(forward, Forward):
            self._running.ends(forward)
        if self.leaving and not torch.compiler.is_compiling() and not self._running.any(ending=1):
            self._take_off()


_KEYWORDS = frozenset(
    ("edit", "emit", "first_query", "gain", "gains", "key_bias", "marked", "outliers", "policy", "rule", "spans")
)


def check_keywords(decoder: torch.nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that look as if they were for attnrb: models pass on what they do not know, unread.

    Raises:
        TypeError: there are some, and the model has no such arguments of its own.
    """
    meant = [name for name in kwargs if name in _KEYWORDS or name.startswith("attnrb")]
    if not meant:
        return
    if unknown := [name for name in meant if name not in inspect.signature(decoder.forward).parameters]:
        raise TypeError(
            f"{unknown[0]}: a patched model takes no such argument. Spans go through patched.spans(spans) around the "
            "call, what is edited is the policy's, and attnrb.Custom(function) makes one of a function"
        )


class _Inputs:
    """What a decoder is called with, as far as attention needs to know."""

    def __init__(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.decoder = decoder
        self.args = args
        self.kwargs = kwargs

    def weights_wanted(self) -> bool:
        wanted = self.kwargs.get("output_attentions")
        return bool(getattr(self.decoder.config, "output_attentions", False) if wanted is None else wanted)

    def queries(self) -> int:
        """M, the number of tokens."""
        tokens = self.tokens()
        return 0 if tokens is None else tokens.shape[1]

    def tokens(self) -> torch.Tensor | None:
        """Their ids ``[B, M]`` or embeddings ``[B, M, width]``."""
        given = (*self.args[:1], self.kwargs.get("input_ids"), self.kwargs.get("inputs_embeds"))
        return next((each for each in given if isinstance(each, torch.Tensor)), None)

    def first_slot(self) -> int | None:
        """Slot of the first query, where a finished mask of the user's makes it needed: it does not say itself."""
        mask = self.kwargs.get("attention_mask")
        masks = [*self.args, *(mask.values() if isinstance(mask, dict) else [mask])]
        if not any(isinstance(each, torch.Tensor) and each.dim() == 4 for each in masks):
            return None
        from attnrb.hosts.transformers.masks import integer

        cache = cache_of(self.kwargs)
        return 0 if cache is None else integer(cache.get_seq_length())

    def maybe_packed(self) -> bool:
        """Whether transformers looks at the positions for several texts in one row."""
        given = self.kwargs.get
        return given("attention_mask") is None and cache_of(self.kwargs) is None and given("position_ids") is not None

    def rule_out_packing(self) -> bool:
        """Say outright that a row is one text, where neither positions nor a mask could say otherwise.

        In a compiled graph transformers cannot look at the positions that it makes itself, and would build a mask of
        all queries and keys in case several texts share a row. On a device it would have to wait for them. Given a mask
        it does not look.

        Returns:
            Whether such a mask was added. It hides nothing.
        """
        given = self.kwargs.get
        if self.args[1:]:
            return False
        told = (given("attention_mask"), given("position_ids"), cache_of(self.kwargs))
        if any(each is not None for each in told):
            return False
        tokens = self.tokens()
        if tokens is None or (tokens.device.type == "cpu" and not torch.compiler.is_compiling()):
            return False
        self.kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return True


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "attnrb.patch needs transformers 4.57 or newer, below 6: run `pip install 'attnrb[hf]'`"
        ) from error
    from attnrb.hosts.transformers.masks import attention_mask

    # Both: a model whose attention function has no mask function of the same name silently gets no mask.
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
