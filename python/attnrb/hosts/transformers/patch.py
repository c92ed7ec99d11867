"""Re-balance a Hugging Face model in place, and take it back.

Note: [How a model is patched]
transformers looks up its attention and its mask function by a name in the configuration that a module holds. A patch
registers attnrb's functions under a name of its own and gives the modules of one model a copy of their configuration
that says this name; the configuration itself, which other models may share, is not written to. A hook before the
decoder adds one keyword argument, the `Forward`, which models hand down to their attention. A hook after it checks that
every layer that was to be re-balanced did come by: what cannot be served raises, and nothing runs plainly in silence.
`Patch.remove` puts the configurations back and takes both hooks out.

A patch belongs to one model. Copies of a patched model, made with ``copy.deepcopy``, by pickling or by
``save_pretrained``, are not patched: when a hook is copied it leaves nothing but the original attention behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from attnrb.hosts.stats import PatchStats
from attnrb.hosts.transformers.attention import (
    FORWARD,
    AttentionCall,
    Forward,
    Observer,
    Plan,
    attention,
    enter_forward,
)
from attnrb.hosts.transformers.configurations import NAME, Configurations, Hook
from attnrb.hosts.transformers.decoder import find_decoder, kinds, layers_with_attention, shard_of, size
from attnrb.policies.learned import LearnedGains
from attnrb.policies.rebalance import RebalanceConfig

__all__ = ["AttentionCall", "Patch", "patch"]


def patch(
    model: Any, config: RebalanceConfig | LearnedGains | None = None, *, observer: Observer | None = None
) -> Patch:
    """Re-balance a model from now on.

        with attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.2)):
            model.generate(**inputs)

    or, without ``with``, until ``remove()`` of the handle. Forward, ``generate`` with its caches, batches with padding,
    sampling and beam search work as before. A model that shares modules or its configuration with others may be
    patched: those that share a configuration do not notice, those that share modules share the patch.

    Args:
        model: a ``transformers`` decoder, with or without a head, in float32, bfloat16 or float16.
        config: the options, or learnt gains, which bring theirs. Default: ``RebalanceConfig()``.
        observer: called with an `AttentionCall` after the attention of every layer, for analysis.

    Returns:
        The patch, already in force: a handle and a context manager.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``config`` names a layer or head that the model has not, or has gains of another model.
        RuntimeError: the model is patched already.
        NotImplementedError: the model cannot be served; the message says why. What only a forward shows raises there.
        ImportError: transformers is missing or too old.
    """
    if config is None:
        config = RebalanceConfig()
    learned = config if isinstance(config, LearnedGains) else None
    if learned is not None:
        config = learned.config
    if not isinstance(config, RebalanceConfig):
        raise TypeError(
            f"config: expected an attnrb.RebalanceConfig, attnrb.LearnedGains or None, got {type(config).__name__}"
        )
    if observer is not None and not callable(observer):
        raise TypeError(f"observer: expected a function or None, got {type(observer).__name__}")
    return Patch(model, config, observer, learned)


class Patch:
    """A model being re-balanced; made by `patch`.

    Attributes:
        config: the options, as given.
        learned: the learnt gains that are used, or None.
        stats: what was done so far. It stays readable after `remove`. Forwards inside a graph of ``torch.compile`` are
            not counted.
        decoder: the part of the model that holds its layers. Called by itself, it computes no logits.
    """

    def __init__(
        self,
        model: Any,
        config: RebalanceConfig,
        observer: Observer | None = None,
        learned: LearnedGains | None = None,
    ) -> None:
        """See `patch`."""
        _register()
        decoder = find_decoder(model)
        self.config = config
        self.stats = PatchStats()
        self.decoder = decoder
        self.learned = learned
        self._plan = _make_plan(decoder, config, observer, shard_of(model), learned)
        self._configurations = Configurations(model, decoder)
        self._hooks = [
            decoder.register_forward_pre_hook(Hook(self._before_forward, self._configurations), with_kwargs=True),
            decoder.register_forward_hook(Hook(self._after_forward, self._configurations), with_kwargs=True),
        ]

    @property
    def active(self) -> bool:
        """Whether the model is still patched."""
        return bool(self._hooks)

    @property
    def layers(self) -> int:
        """L, how many decoder layers the model has."""
        return self._plan.layers

    @property
    def source_layer(self) -> int:
        """The layer that decides what the outliers are: in a hybrid, the first one with attention unless chosen."""
        return self._plan.source_layer

    def remove(self) -> None:
        """Make the model what it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._configurations.restore()

    def __enter__(self) -> Patch:
        if not self.active:
            raise RuntimeError("this patch was removed: call attnrb.patch(model, config) again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __reduce__(self) -> Any:
        raise TypeError("a patch belongs to one model and cannot be copied: copy the model and patch the copy")

    def __repr__(self) -> str:
        return f"Patch({'active' if self.active else 'removed'}, {self.config}, {self.stats})"

    def _before_forward(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = _Inputs(decoder, args, kwargs)
        unpadded = inputs.rule_out_packing()
        forward = Forward(
            self._plan,
            self.stats,
            inputs.first_slot(),
            weights=inputs.weights_wanted(),
            packed=inputs.maybe_packed(),
            unpadded=unpadded,
        )
        kwargs[FORWARD] = forward
        enter_forward(forward)
        return args, kwargs

    def _after_forward(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward: Forward = kwargs[FORWARD]
        enter_forward(None)
        if not self._plan.required <= forward.called:
            missing = sorted(self._plan.required - forward.called)
            raise NotImplementedError(
                f"{type(decoder).__name__}: the attention of layers {missing} did not go through transformers' "
                "AttentionInterface, so attnrb could not reach it. If these layers have no attention, name those to "
                "re-balance with RebalanceConfig(layers=...)"
            )
        if not torch.compiler.is_compiling():  # a graph counts nothing
            self.stats.add_forward(forward.called & self._plan.touched)


class _Inputs:
    """What a decoder is called with, as far as attention needs to know."""

    def __init__(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.decoder = decoder
        self.args = args
        self.kwargs = kwargs

    def weights_wanted(self) -> bool:
        wanted = self.kwargs.get("output_attentions")
        return bool(getattr(self.decoder.config, "output_attentions", False) if wanted is None else wanted)

    def first_slot(self) -> int | None:
        """Slot of the first query, where a finished mask of the user's makes it needed: it does not say itself."""
        mask = self.kwargs.get("attention_mask")
        masks = [*self.args, *(mask.values() if isinstance(mask, dict) else [mask])]
        if not any(isinstance(each, torch.Tensor) and each.dim() == 4 for each in masks):
            return None
        from attnrb.hosts.transformers.masks import integer

        cache = self.kwargs.get("past_key_values")
        return 0 if cache is None else integer(cache.get_seq_length())

    def maybe_packed(self) -> bool:
        """Whether transformers looks at the positions for several texts in one row."""
        given = self.kwargs.get
        return (
            given("attention_mask") is None and given("past_key_values") is None and given("position_ids") is not None
        )

    def rule_out_packing(self) -> bool:
        """Say outright that a row is one text, where neither positions nor a mask could say otherwise.

        In a compiled graph transformers cannot look at the positions that it makes itself, and would build a mask of
        all queries and keys in case several texts share a row. Given a mask it does not look.

        Returns:
            Whether such a mask was added. It hides nothing.
        """
        given = self.kwargs.get
        if not torch.compiler.is_compiling() or self.args[1:]:
            return False
        if any(given(name) is not None for name in ("attention_mask", "past_key_values", "position_ids")):
            return False
        inputs = (*self.args, given("input_ids"), given("inputs_embeds"))
        tokens = next((each for each in inputs if isinstance(each, torch.Tensor)), None)
        if tokens is None:
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


def gain_layout(model: Any, config: RebalanceConfig) -> tuple[list[list[float]], list[list[bool]]]:
    """For each of the model's L layers the gain of each of its H heads, and which of them ``config`` chooses.

    A chosen gain may be 0, as the last layer's is in the schedule.
    """
    decoder = find_decoder(model)
    plan = _make_plan(decoder, config, None, (0, 1))
    gains = _gain_rows(plan)
    everywhere = dataclasses.replace(config, gains=(1.0,) * plan.layers)
    chosen = _gain_rows(_make_plan(decoder, everywhere, None, (0, 1)))
    return gains, [[gain != 0.0 for gain in row] for row in chosen]


def _gain_rows(plan: Plan) -> list[list[float]]:
    rows = (plan.gain(layer, plan.heads, torch.device("cpu")) for layer in range(plan.layers))
    return [[0.0] * plan.heads if row is None else row.tolist() for row in rows]


def _make_plan(
    decoder: Any,
    config: RebalanceConfig,
    observer: Observer | None,
    shard: tuple[int, int],
    learned: LearnedGains | None = None,
) -> Plan:
    """Resolve the configuration for this model's layers and heads."""
    sizes = decoder.config.get_text_config(decoder=True)
    layers = size(sizes, "decoder_layers", "num_hidden_layers")
    heads = size(sizes, "decoder_attention_heads", "num_attention_heads")
    for what, value in (("layers (num_hidden_layers)", layers), ("heads (num_attention_heads)", heads)):
        if not isinstance(value, int):
            raise NotImplementedError(
                f"model: the configuration of {type(decoder).__name__} gives no one number of {what}, but {value!r}; "
                "attnrb supports models whose layers have equally many heads"
            )
    assert layers is not None and heads is not None
    has_attention = layers_with_attention(sizes, layers)
    if True not in has_attention:
        raise NotImplementedError(
            f"model: none of the layers of {type(decoder).__name__} has softmax attention over all keys or a window of "
            f"them; their kinds are {', '.join(sorted(set(kinds(sizes, layers) or [])))}"
        )
    if config.source_layer < layers and not has_attention[config.source_layer]:
        if config.source_layer > 0:
            raise ValueError(
                f"source_layer: expected a layer with attention, which this model's layer {config.source_layer} has not"
            )
        config = dataclasses.replace(config, source_layer=has_attention.index(True))
    gains = config.layer_gains(layers, heads)
    if True not in has_attention[config.source_layer + 1 :]:
        raise ValueError(
            f"source_layer: this model has no attention above layer {config.source_layer}, so nothing to re-balance"
        )
    if config.layers is None and not isinstance(config.heads, Mapping):
        gains = tuple(gain if has else None for gain, has in zip(gains, has_attention, strict=True))
    if learned is not None:
        learned.check_model(layers, heads)
        gains = tuple((0.0,) * heads if layer in learned.layers else None for layer in range(layers))
    return Plan(config, heads, gains, observer, shard, learned)
