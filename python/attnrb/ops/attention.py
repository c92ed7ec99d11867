"""Attention with an edit: `torch.ops.attnrb.attention`, its gradient, and the functions that call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnrb.decisions import tell
from attnrb.ops import dense, training
from attnrb.ops.edit import NO_EDIT, RULES, Attended, Edit, EditArguments, edit_arguments
from attnrb.ops.everything import strengthened
from attnrb.ops.library import outlier_capacity
from attnrb.ops.operands import (
    check_gain_values,
    check_one_device,
    check_shapes,
    check_threshold,
    given,
    native,
    operands,
    records_gradient,
)
from attnrb.ops.outliers import Outliers
from attnrb.ops.paged import attend_paged
from attnrb.ops.paging import Paging, paging_arguments
from attnrb.ops.refusals import native_op
from attnrb.ops.scores import DEFAULT_SCORES, Scores, score_arguments
from attnrb.ops.visibility import DEFAULT_VISIBILITY, Visibility, VisibilityArguments, visibility_arguments

__all__ = [
    "OPTIONS",
    "attend",
    "attend_unchecked",
    "attention",
    "attention_fake",
    "attention_weights",
    "dispatch",
    "gradients",
    "named_options",
    "unchecked_arguments",
]

# Looked up once: torch.ops resolves overloads at every call.
_attention = native_op(torch.ops.attnrb.attention.default)
_attention_output = native_op(torch.ops.attnrb.attention.output)
_attention_output_heads_first = native_op(torch.ops.attnrb.attention.output_heads_first)
_attention_training = native_op(torch.ops.attnrb.attention_training.default)
_attention_backward = native_op(torch.ops.attnrb.attention_backward.default)
_unrecorded = torch._C._AutoDispatchBelowAutograd

# The options of the op in the order of its schema.
OPTIONS = (*EditArguments._fields, "emit", *VisibilityArguments._fields, *Scores._fields)
_DEFAULTS = (*NO_EDIT, None, *DEFAULT_VISIBILITY, *DEFAULT_SCORES)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    edit: Edit | None = None,
    emit: float | None = None,
    visibility: Visibility | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    paging: Paging | None = None,
    out: Tensor | None = None,
) -> Attended:
    """Attention whose weights are edited, and which may find its own outliers.

    With ``s`` the scores ``scale · query · keyᵀ`` after the softcap, ``β`` the edit's key bias and ``P = softmax(s +
    β)`` over the visible keys, `attnrb.Edit` says what becomes of ``P`` before it weighs the values. No
    ``[M, N]`` matrix is built.

    Differentiable in query, key, value, sinks, and the edit's gain and key bias, through output and log-sum-exp.
    So is ``torch.ops.attnrb.attention``, by way of ``torch.ops.attnrb.attention_training``, which has the same options
    by position. Its overload ``output``, which decodes tokens, is not: a gradient would slow every one of them.

    Args:
        query: ``[B, H, M, D]``, float32, bfloat16, float16 or float64, any strides.
        key: ``[B, Hk, N, D]``, dtype and device of ``query``.
        value: ``[B, Hk, N, Dv]``, likewise.
        edit: what is done to the weights. The default is nothing.
        emit: return the outliers too: the keys of each row, other than the query's own, with ``P`` above this number,
            between 0 and 1, both excluded. ``P`` includes the bias, not the gain. The default is not to.
        visibility: which keys a query may see: a `attnrb.Visibility`, or a bool mask broadcastable to
            ``[B, H, M, N]``. The default is causal, with the last query on the last key.
        scale: factor on ``query · key``. The default is ``1 / sqrt(D)``.
        softcap: scores become ``softcap · tanh(score / softcap)``. The default is none.
        sinks: ``[H]``, any floating dtype: one more score of each row, in the softmax denominator only.
        paging: keys and values lie in blocks, and queries of many sequences follow each other: query ``[T, H, D]``,
            key ``[blocks, Hk, P, D]`` and value ``[blocks, Hk, P, Dv]`` with a contiguous last axis, the others in any
            order. Slots are those of each sequence. Forward only.
        out: with a paging, a tensor ``[T, H, Dv]`` with a contiguous last axis to write the output into. Rows of
            sequences without keys are left as they are. The default is a new tensor, such rows being zeros.

    Returns:
        `attnrb.Attended`; with a paging output ``[T, H, Dv]``, log-sum-exp ``[T, H]``, outliers ``[T, H, C]`` and
        ``[T, H]``, ``C`` being at most ``W P``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, tables or numbers do not fit, a row of the edit's outliers does not ascend, or the
            visibility says what the paging says.
        RuntimeError: with a paging, a gradient would be recorded.
    """
    query, key, value = operands(query, key, value, ragged=paging is not None)
    if emit is not None:
        check_threshold(emit, "emit")
    if paging is not None:
        tables = paging_arguments(paging)
        editing = edit_arguments(edit, query, tables.seq_lens.shape[0])
        seeing, scoring = visibility_arguments(visibility), score_arguments(scale, softcap, sinks)
        return attend_paged(query, key, value, tables, editing, emit, seeing, scoring, out)
    if out is not None:
        raise ValueError("out: expected None without a paging")
    editing = edit_arguments(edit, query)
    return dispatch(
        query, key, value, editing, emit, visibility_arguments(visibility), score_arguments(scale, softcap, sinks)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    edit: Edit | None,
    emit: float | None,
    visibility: Visibility,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Outliers | None]:
    """Output and outliers of `attention`, which are what a model's layers need."""
    options: dict[str, Any] = {"visibility": visibility, "scale": scale, "softcap": softcap, "sinks": sinks}
    output, _, outliers = attention(query, key, value, edit=edit, emit=emit, **options)
    return output, outliers


def attend_unchecked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    rows_first: bool = True,
) -> tuple[Tensor, Outliers | None]:
    """`attend` for layers that are called once a token: nothing is checked here that the op checks itself.

    Args:
        query: ``[B, H, M, D]`` of a dtype that the native op takes; nobody wants a gradient or a cast.
        key: ``[B, Hk, N, D]``.
        value: ``[B, Hk, N, Dv]``.
        edit: as `unchecked_arguments` has it.
        emit: as `attention` has it.
        visibility: as the op takes it.
        scale: as `attention` has it, like the rest.
        softcap: likewise.
        sinks: likewise.
        rows_first: whether the output is ``[B, M, H, Dv]``, as a model's next projection takes it, or
            ``[B, H, M, Dv]``.
    """
    if emit is None:
        op = _attention_output if rows_first else _attention_output_heads_first
        if visibility is DEFAULT_VISIBILITY and scale is None and not softcap and sinks is None:
            return op(query, key, value, *edit), None  # each argument costs a quarter of a microsecond
        return op(query, key, value, *edit, None, *visibility, scale, softcap or 0.0, sinks), None
    options = given(edit, emit, visibility, Scores(scale, softcap or 0.0, sinks))
    with _unrecorded():
        output, _, indices, counts = _attention(query, key, value, **options)
    return output.transpose(1, 2) if rows_first else output, Outliers(indices, counts)


def unchecked_arguments(edit: Edit | None) -> EditArguments | None:
    """An edit as `attend_unchecked` takes it; None where it needs a check, a cast or more than the op."""
    if edit is None:
        return NO_EDIT
    outliers, gain, bias, first = edit.outliers, edit.gain, edit.key_bias, edit.first_query
    if (
        (gain is None or (outliers is not None and isinstance(gain, Tensor) and gain.dtype is torch.float32))
        and (bias is None or bias.dtype is torch.float32)
        and (first is None or isinstance(first, Tensor))
    ):
        indices, counts = (None, None) if outliers is None else outliers
        return EditArguments(indices, counts, gain, RULES.index(edit.rule), bias, first)
    return None


def dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edit: EditArguments,
    emit: float | None,
    visibility: VisibilityArguments,
    scores: Scores,
) -> Attended:
    """`attention` of checked operands, with its options as the op takes them."""
    if not native(query):
        check_shapes(query, key, value, edit, visibility, scores)
        return Attended(*dense.attention(query, key, value, edit, emit, visibility, scores))
    if edit.gain is not None and edit.indices is None:  # every key is an outlier: no kernel's matter
        attended = dispatch(query, key, value, edit._replace(gain=None), emit, visibility, scores)
        return _strengthen_everything(attended, edit, scores.sinks)
    if records_gradient(query, key, value, edit.gain, edit.key_bias, scores.sinks):
        output, lse, indices, counts = _attention_training(query, key, value, *edit, emit, *visibility, *scores)
    elif torch.compiler.is_compiling():
        output, lse, indices, counts = _attention(query, key, value, **given(edit, emit, visibility, scores))
    else:
        with _unrecorded():  # what attnrb.ops.raw asks of those who call the op itself is known here
            output, lse, indices, counts = _attention(query, key, value, **given(edit, emit, visibility, scores))
    return Attended(output, lse, None if emit is None else Outliers(indices, counts))


def _strengthen_everything(attended: Attended, edit: EditArguments, sinks: Tensor | None) -> Attended:
    """A gain without outliers, given what the rest of the edit made of the row."""
    assert edit.gain is not None
    check_gain_values(edit)
    output, lse, _ = attended
    of_rows = None if sinks is None else sinks[:, None]
    factor, lse = strengthened(lse, edit.gain[:, None], RULES[edit.rule], of_rows)
    # Not in place: a backward may need the output.
    return attended._replace(output=(output * factor[..., None]).to(output.dtype), lse=lse)


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    edit: Edit | None = None,
    visibility: Visibility | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights of `attention` as a matrix, for those who ask to see them.

    Models return their weights with ``output_attentions=True``. No op has them: they are computed again here, in
    float32 (float64 for float64), ``4 B H M N`` bytes, and as many of ``query``'s dtype for every layer that a model
    keeps. Output and weights of a layer agree up to rounding.

    Args:
        query: ``[B, H, M, D]``.
        key: ``[B, Hk, N, D]``.
        edit: what is done to the weights.
        visibility: as for `attention`, like the rest.
        scale: likewise.
        softcap: likewise.
        sinks: likewise.

    Returns:
        ``[B, H, M, N]`` in the dtype of ``query``; a query that sees no key has zeros.
    """
    editing, seeing = edit_arguments(edit, query), visibility_arguments(visibility)
    scoring = score_arguments(scale, softcap, sinks)
    check_shapes(query, key, key, editing, seeing, scoring)
    tell("weights", "someone asks to see them: output_attentions=True, or attnrb.functional.attention_weights")
    return dense.attention_weights(query, key, editing, seeing, scoring)


# ------------------------------------------------------------------------------------------------ as torch knows it


def named_options(positional: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The options of a call, all of them: torch leaves out what is at its default."""
    return dict(zip(OPTIONS, _DEFAULTS, strict=True)) | dict(zip(OPTIONS, positional, strict=False)) | keywords


def attention_fake(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **keywords: Any) -> tuple[Tensor, ...]:
    """What the op returns, of the right shapes, dtypes and strides."""
    options = named_options(positional, keywords)
    check_one_device(query=query, key=key, value=value, **options)
    table = options.get("block_table")
    rows = query.shape[:-1]
    emit, keys = options["emit"], key.shape[2] if table is None else table.shape[1] * key.shape[2]
    capacity = 0
    if emit is not None:
        capacity = torch.sym_min(outlier_capacity(emit), keys)  # type: ignore[no-untyped-call]
    output = training.like_rows(query, value.shape[3]) if table is None else query.new_empty((*rows, value.shape[3]))
    return (
        output,
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((*rows, capacity), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
    )


def _output_heads_first_fake(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **keywords: Any) -> Tensor:
    """The output of `attention_fake`, ``[B, H, M, Dv]`` or ``[T, H, Dv]``."""
    return attention_fake(query, key, value, *positional, **keywords)[0]


def _output_fake(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **keywords: Any) -> Tensor:
    """The same as ``[B, M, H, Dv]`` or ``[T, H, Dv]``."""
    output = _output_heads_first_fake(query, key, value, *positional, **keywords)
    return output.transpose(1, 2) if output.dim() == 4 else output


def _into_fake(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
    """The rest of them."""
    return attention_fake(query, key, value, **keywords)[1:]


def _output_into_fake(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> None:
    """Nothing: the output was there before."""
    attention_fake(query, key, value, **keywords)


def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *positional: Any,
    **keywords: Any,
) -> tuple[Tensor, ...]:
    options = named_options(positional, keywords)
    given = {"grad_output": grad_output, "grad_lse": grad_lse, "output": output, "lse": lse}
    check_one_device(query=query, key=key, value=value, **given, **options)
    rows = (training.like_rows(each) for each in (query, key, value))
    bias = training.like_bias(query, options["key_bias"])
    return (*rows, training.like_heads(query), bias, training.like_heads(query))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, *options = inputs
    attended, lse, indices, counts = output
    training.keep(ctx, dict(zip(OPTIONS, options, strict=True)), query, key, value, attended, lse)
    ctx.mark_non_differentiable(indices, counts)


def _gradient(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None and grad_lse is None:
        return (None,) * (3 + len(OPTIONS))
    tensors, options = training.kept(ctx)
    rows, found = gradients(grad_output, grad_lse, tensors, options)
    return (*rows, *(found.get(name) for name in OPTIONS))


def gradients(
    grad_output: Tensor | None, grad_lse: Tensor | None, tensors: Sequence[Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients of an attention op.

    Args:
        grad_output: of the output; not None where ``grad_lse`` is.
        grad_lse: of the log-sum-exp.
        tensors: query, key, value, output and log-sum-exp.
        options: the op's, by name; those left out have their defaults.

    Returns:
        Those of query, key and value, and those of the options that have one, by name.
    """
    query, key, value, output, lse = tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    options = named_options((), options) | {"emit": None}
    *rows, gain, key_bias, sinks = _attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, *(options[name] for name in OPTIONS)
    )
    found: dict[str, Tensor] = {}
    if options["gain"] is not None:
        found["gain"] = gain.sum(0, keepdim=True) if options["gain"].shape[0] == 1 else gain
    if options["key_bias"] is not None:
        found["key_bias"] = key_bias
    if options["sinks"] is not None:
        found["sinks"] = sinks.to(options["sinks"].dtype)
    return rows, found


torch.library.register_fake("attnrb::attention", attention_fake)
torch.library.register_fake("attnrb::attention.output", _output_fake)
torch.library.register_fake("attnrb::attention.output_heads_first", _output_heads_first_fake)
torch.library.register_fake("attnrb::attention.into", _into_fake)
torch.library.register_fake("attnrb::attention.output_into", _output_into_fake)
torch.library.register_fake("attnrb::attention_training", attention_fake)
torch.library.register_autograd("attnrb::attention_training", _gradient, setup_context=_setup)
training.register_backward("attnrb::attention_backward", _backward_fake)
