"""What the ops compute when they are called by their own names, ``torch.ops.attnrb.*``, and torch differentiates.

The functions of `attnrb.functional` see to it before they call an op. Those who call an op itself get the same: under
the transforms of `torch.func` the dense form (Note: [Transformed calls]), which is right in every mode, and where a
gradient is recorded the twin that has one. Dual tensors outside of `torch.func` get the dense form too, or an error
from ops that have a gradient registered. Left alone, torch would take tangents and some gradients to be zero, without a
word.

What serves transforms costs no other call anything. What serves gradients and dual tensors costs some microseconds, so
the overloads ``attention.output`` and ``attention.output_heads_first``, which serve short calls, do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnrb.ops import dense, weights_in_memory
from attnrb.ops.attention import OPTIONS, dispatch, named_options
from attnrb.ops.edit import EditArguments
from attnrb.ops.operands import check_shapes, records_gradient
from attnrb.ops.scores import OLDER_OPTIONS, Scores
from attnrb.ops.visibility import VisibilityArguments

__all__: list[str] = []

_TRANSFORMS = "FuncTorchDynamicLayerFrontMode"
_VIEWS = "ADInplaceOrView"  # where torch keeps account of views; what comes after gradients and has the tangents
_FOR_INFERENCE = ("attention.output", "attention.output_heads_first")
_library: Any = torch.library.Library("attnrb", "IMPL")  # type: ignore[no-untyped-call]


def _groups(options: dict[str, Any]) -> tuple[EditArguments, VisibilityArguments, Scores]:
    """Options of an op as what the functions take."""

    def some(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    return (
        EditArguments(**some(EditArguments._fields)),
        VisibilityArguments(**some(VisibilityArguments._fields)),
        Scores(**some(Scores._fields)),
    )


def _older(options: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(OLDER_OPTIONS, options, strict=True))


def _attention(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **keywords: Any) -> tuple[Tensor, ...]:
    options = named_options(positional, keywords)
    _refuse_blocks(options)
    edit, seeing, scores = _groups(options)
    output, lse, outliers = dispatch(query, key, value, edit, options["emit"], seeing, scores)
    if outliers is None:
        counts = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
        return output, lse, counts.new_empty((*counts.shape, 0)), counts
    return output, lse, *outliers


def _refuse_blocks(options: dict[str, Any]) -> None:
    """Keys in blocks are for inference."""
    if options.get("block_table") is not None:
        raise RuntimeError("block_table: keys in blocks are not differentiated; call the op under torch.no_grad()")


def _output(*arguments: Any, **keywords: Any) -> Tensor:
    return _attention(*arguments, **keywords)[0]


def _output_rows_first(*arguments: Any, **keywords: Any) -> Tensor:
    return _output(*arguments, **keywords).transpose(1, 2).contiguous()


def _source(query: Tensor, key: Tensor, value: Tensor, threshold: float, *options: Any) -> tuple[Tensor, ...]:
    return _attention(query, key, value, emit=threshold, **_older(options))


def _rebalanced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    gain: Tensor,
    normalize: bool,
    *options: Any,
) -> Tensor:
    edit = {"indices": indices, "counts": counts, "gain": gain, "rule": int(normalize)}
    return _output(query, key, value, **edit, **_older(options))


def _received(query: Tensor, key: Tensor, *positional: Any, **keywords: Any) -> Tensor:
    edit, seeing, scores = _groups(_older(positional) | keywords)
    check_shapes(query, key, key, edit, seeing, scores)
    return dense.received_attention(query, key, edit, seeing, scores)


def _rebalance(weights: Tensor, mask: Tensor, gain: float | Tensor, normalize: bool) -> Tensor:
    return weights_in_memory.rebalance(weights, mask, gain, normalize=normalize)


def _mask(weights: Tensor, threshold: float, query_offset: int) -> Tensor:
    return weights_in_memory.outlier_mask(weights, threshold, query_offset=query_offset)


def _received_training(*arguments: Any) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(
        "torch.ops.attnrb.received_attention_training: it has no forward differentiation, and no transforms of "
        "torch.func; call attnrb.functional.received_attention"
    )


def _differentiable(name: str, twin: Callable[..., Any] | None, plain: Callable[..., Any]) -> None:
    """Have an op computed by others where torch differentiates.

    Args:
        name: of the op, with its overload.
        twin: computes with a gradient; None where the op has one registered.
        plain: computes under transforms and in forward differentiation.
    """
    op: Any = torch.ops.attnrb
    for part in (*name.split("."), *([] if "." in name else ["default"])):
        op = getattr(op, part)
    _library.impl(name, plain, _TRANSFORMS)
    if name in _FOR_INFERENCE:
        return

    def checked(keys: Any, *arguments: Any, **keywords: Any) -> Any:
        # Behind the gradients, where a tangent is out of reach.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"torch.ops.attnrb.{name}: it has no forward differentiation by dual tensors; call the function of "
                "attnrb.functional, or use torch.func.jvp"
            )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments, **keywords)

    def recorded(keys: Any, *arguments: Any, **keywords: Any) -> Any:
        if forward_ad._current_level >= 0:
            return plain(*arguments, **keywords)
        if twin is not None and records_gradient(
            *(each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor))
        ):
            return twin(*arguments, **keywords)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments, **keywords)

    if twin is None:
        _library.impl(name, checked, _VIEWS, with_keyset=True)
    else:
        _library.impl(name, recorded, "Autograd", with_keyset=True)


def _attention_twin(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
    options = named_options((), keywords)
    _refuse_blocks(options)
    return torch.ops.attnrb.attention_training.default(query, key, value, *(options[name] for name in OPTIONS))


def _received_twin(*arguments: Any, **keywords: Any) -> Any:
    return torch.ops.attnrb.received_attention_training.default(*arguments, **keywords)[0]


_differentiable("attention", _attention_twin, _attention)
_differentiable("attention.output", None, _output_rows_first)
_differentiable("attention.output_heads_first", None, _output)
_differentiable("attention_training", None, _attention)
_differentiable("source_attention", None, _source)
_differentiable("rebalanced_attention", None, _rebalanced)
_differentiable("received_attention", _received_twin, _received)
_differentiable("received_attention.edited", _received_twin, _received)
_differentiable("received_attention_training", None, _received_training)
_differentiable("rebalance", None, _rebalance)
_differentiable("rebalance.per_head", None, _rebalance)
_differentiable("outlier_mask", None, _mask)
