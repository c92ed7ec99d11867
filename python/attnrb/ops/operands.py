"""Checks that the operations share, before a native op or `attnrb.ops.dense` computes.

Note: [Transformed calls]
A native op knows backward differentiation alone, once. Under the transforms of `torch.func` (grad, vmap, jvp, jacrev,
jacfwd, hessian and what they nest to) and within a level of forward differentiation, where torch would take its tangent
to be zero without a word, the functions compute with `attnrb.ops.dense`: right in every mode and to every order, for
memory of n×n.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnrb.decisions import tell
from attnrb.ops import _native
from attnrb.ops.edit import NO_EDIT, RULES, EditArguments
from attnrb.ops.scores import DEFAULT_SCORES, Scores
from attnrb.ops.torch_version import TORCH_VERSION
from attnrb.ops.visibility import DEFAULT_VISIBILITY, VisibilityArguments, describe

__all__ = [
    "NATIVE_DTYPES",
    "NATIVE_VARIABLE",
    "check_bias_shape",
    "check_gain_values",
    "check_one_device",
    "check_operand",
    "check_shapes",
    "check_threshold",
    "given",
    "native",
    "operands",
    "records_gradient",
    "transformed",
]

# Looked up once: every layer of every decoded token asks.
_under_transforms = torch._C._are_functorch_transforms_active

# Older compilers cannot trace `is` between two named tuples; of this one it is known.
_IDENTITY_IS_TRACED = TORCH_VERSION >= (2, 13)

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*NATIVE_DTYPES, torch.float64)


def _native_devices() -> frozenset[str]:
    """The types of device that have native ops here; none where ``ATTNRB_NATIVE=0`` hides them."""
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return frozenset()
    return frozenset(("cpu", "meta", "cuda") if _native.has_cuda_ops() else ("cpu", "meta"))


NATIVE_VARIABLE = "ATTNRB_NATIVE"
_devices = _native_devices()


def native(query: Tensor) -> bool:
    """Whether native ops serve such operands; `attnrb.ops.dense` serves all others: see Note: [Transformed calls]."""
    if query.dtype in NATIVE_DTYPES and query.device.type in _devices and not transformed():
        return True
    if query.device.type not in _devices:
        _warn_of_device(query.device.type)
    elif query.dtype == torch.float64:
        tell("dense", "operands are float64")
    else:
        tell("dense", "the call is under a transform of torch.func")
    return False


_warned: set[str] = set()


def _warn_of_device(device: str) -> None:
    if torch.compiler.is_dynamo_compiling() or device in _warned:
        return
    _warned.add(device)
    hidden = f", since {NATIVE_VARIABLE}=0 hides them" if not _devices else ""
    warnings.warn(
        f"attnrb has no native ops for tensors on {device!r} here{hidden}: plain PyTorch computes, which is slower, in "
        "memory that grows linearly with the number of keys",
        stacklevel=3,
    )
    tell("dense", f"there are no native ops for tensors on {device!r}")


def transformed() -> bool:
    """Whether the call is under a transform of `torch.func`, or differentiated forward: Note: [Transformed calls]."""
    return _under_transforms() or forward_ad._current_level >= 0


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where a tensor is; torch knows of none on the meta device, and raises if it is asked."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def operands(query: Any, key: Any, value: Any, *, ragged: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Checked, and in the dtype of autocast where that is on.

    Refuses what the C++ checks could only call a ValueError. Ragged queries have 3 dimensions, ``[T, H, D]``.
    """
    if isinstance(query, Tensor) and autocasts(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        if query.dtype not in (dtype, torch.float64):
            tell("cast", f"autocast is on: {query.dtype} becomes {dtype}")
        query, key, value = (
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    # One condition for the good case: this runs at every layer of every decoded token.
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.layout is key.layout is value.layout is torch.strided
        and key.dim() == 4
        and query.dim() == (3 if ragged else 4)
    ):
        for name, operand in (("query", query), ("key", key), ("value", value)):
            check_operand(name, operand, 3 if ragged and name == "query" else 4)
            if operand.dtype != query.dtype:
                raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {operand.dtype}")
    return query, key, value


def check_operand(name: str, operand: Any, dimensions: int = 4) -> None:
    if not isinstance(operand, Tensor) or operand.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected a tensor of dtype float32, bfloat16, float16 or float64, got {describe(operand)}"
        )
    if operand.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of the layout {operand.layout}: call to_dense()")
    if operand.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got {operand.dim()}: {tuple(operand.shape)}")


def check_threshold(threshold: float, name: str = "threshold") -> None:
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {threshold}")


def check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edit: EditArguments,
    visibility: VisibilityArguments,
    scores: Scores,
) -> None:
    """Refuse, for the dense path, what PyTorch would broadcast or complain of without naming it.

    Raises:
        ValueError: shapes do not fit, a tensor is on another device, or a gain is out of its range.
    """
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != width or width < 1:
        raise ValueError(f"key: expected [B, Hk, N, D] with B = {batch} and D = {width} >= 1, got {tuple(key.shape)}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"query: expected a number of heads that is a multiple of key's {key_heads}, got {heads}")
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [B, Hk, N] of key, {tuple(key.shape[:3])}, then Dv, got {tuple(value.shape)}"
        )
    check_one_device(query=query, key=key, value=value, **edit._asdict(), **visibility._asdict(), sinks=scores.sinks)
    _check_options(batch, heads, queries, keys, visibility, scores)
    _check_edit(batch, heads, queries, edit)


def _check_options(
    batch: int, heads: int, queries: int, keys: int, visibility: VisibilityArguments, scores: Scores
) -> None:
    for name in ("query_offsets", "key_start", "key_end"):
        slots = getattr(visibility, name)
        if slots is not None and slots.shape != (batch,):
            raise ValueError(f"{name}: expected the shape [B] = [{batch}], got {tuple(slots.shape)}")
    mask, full = visibility.mask, (batch, heads, queries, keys)
    if mask is not None and any(
        size not in (1, whole) for size, whole in zip(mask.shape[::-1], full[::-1], strict=False)
    ):
        raise ValueError(f"mask: expected to be broadcastable to [B, H, M, N] = {full}, got {tuple(mask.shape)}")
    if scores.sinks is not None and scores.sinks.shape != (heads,):
        raise ValueError(f"sinks: expected the shape [H] = [{heads}], got {tuple(scores.sinks.shape)}")


def _check_edit(batch: int, heads: int, queries: int, edit: EditArguments) -> None:
    if edit.gain is not None:
        if edit.gain.shape not in ((1,), (heads,)):
            raise ValueError(f"gain: expected the shape [1] or [H] = [{heads}], got {tuple(edit.gain.shape)}")
        check_gain_values(edit)
    if edit.indices is not None and edit.counts is not None:
        shape, rows = edit.indices.shape, edit.counts.shape
        if shape[:2] != (batch, heads) or shape[2] not in (1, queries):
            raise ValueError(
                f"indices: expected the shape [B, H, M, C] or [B, H, 1, C] with B = {batch}, H = {heads} and "
                f"M = {queries}, got {tuple(shape)}"
            )
        if rows != shape[:3]:
            raise ValueError(f"counts: expected the shape of indices without C, {tuple(shape[:3])}, got {tuple(rows)}")
    check_bias_shape(batch, heads, edit)


def check_bias_shape(batch: int, heads: int, edit: EditArguments) -> None:
    """Refuse a bias, or first queries, of other sequences or heads."""
    bias, first = edit.key_bias, edit.first_query
    if bias is not None and (bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads)):
        raise ValueError(
            f"key_bias: expected the shape [B, H, N'] with B = {batch} or 1 and H = {heads} or 1, got "
            f"{tuple(bias.shape)}"
        )
    if first is not None and first.shape != (batch,):
        raise ValueError(f"first_query: expected the shape [B] = [{batch}], got {tuple(first.shape)}")


def check_gain_values(edit: EditArguments) -> None:
    """Refuse a gain whose numbers are not finite, or below what its rule allows, where they are on the host."""
    if edit.gain is None or edit.gain.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return
    if not bool(edit.gain.isfinite().all()):
        raise ValueError(f"gain: expected finite numbers, got {edit.gain.tolist()}")
    if RULES[edit.rule] == "rest" and bool((edit.gain < -1).any()):
        raise ValueError(f"gain: expected at least -1 with the rule {RULES[edit.rule]!r}, got {edit.gain.tolist()}")


def check_one_device(**arguments: Any) -> None:
    """Refuse tensors of another device than the first one's."""
    # A meta tensor among others brings the call here, where nothing else would notice the mixture.
    devices = {name: tensor.device for name, tensor in arguments.items() if isinstance(tensor, Tensor)}
    first = next(iter(devices))
    for name, device in devices.items():
        if device != devices[first]:
            raise ValueError(f"{name}: expected on {devices[first]}, where {first} is, got {device}")


def op_first(*inputs: Tensor | None) -> bool:
    """Whether the native op may be called before anything else is looked at.

    Note: [Short calls]
    What Python looks at takes 10 microseconds, and four times as long behind a large kernel, which leaves none of it in
    the caches: a quarter of a re-balanced call of 64 queries. The op checks what it is given anyway. So it comes first
    where nothing records, casts, traces or differentiates the call. Only who it refuses is looked at, for a type of
    error that says more, or for the dense form.

    Args:
        inputs: what a gradient may be wanted of. What is no tensor may raise AttributeError.
    """
    return bool(_devices) and not (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or records_gradient(*inputs)
    )


def records_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd records this call: gradients are enabled and some input requires one."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)


def given(edit: EditArguments, emit: float | None, visibility: VisibilityArguments, scores: Scores) -> dict[str, Any]:
    """The options that are not at their defaults: each that is passed costs a call a quarter of a microsecond."""
    if not _IDENTITY_IS_TRACED and torch.compiler.is_compiling():
        return {"emit": emit, **edit._asdict(), **visibility._asdict(), **scores._asdict()}
    found: dict[str, Any] = {} if emit is None else {"emit": emit}
    for options, nothing in ((edit, NO_EDIT), (visibility, DEFAULT_VISIBILITY), (scores, DEFAULT_SCORES)):
        if options is not nothing:
            for name, option, default in zip(options._fields, options, nothing, strict=True):
                if option is not default:
                    found[name] = option
    return found
