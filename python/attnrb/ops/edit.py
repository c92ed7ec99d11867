"""How the weights of one layer's attention are edited, and what attention with an edit returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrb.ops.outliers import Outliers
from attnrb.ops.scores import promoted
from attnrb.ops.shown import shown_fields
from attnrb.ops.visibility import check_slots, describe

__all__ = ["NO_EDIT", "RULES", "Attended", "Edit", "EditArguments", "edit_arguments", "gain_tensor"]

RULES = ("none", "row", "rest")


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What one layer does to its attention weights: see Note: [Edited attention] in `attnrb.ops.reference`.

    With ``t`` the scores plus ``key_bias`` and ``P`` their softmax, ``S_i`` the outliers of row i, ``m_i`` the sum of
    their weights and ``g`` the gain, the rule says what becomes of a row:

    | rule | weight of an outlier | weight of any other key |
    | --- | --- | --- |
    | ``none`` | ``(1 + g) P`` | ``P``: the row sums to ``1 + g m`` |
    | ``row`` | ``(1 + g) P / (1 + g m)`` | ``P / (1 + g m)``: the row sums to 1 |
    | ``rest`` | ``(1 + g) P`` | ``P (1 - (1 + g) m) / (1 - m)``: likewise |

    A sink counts among the other keys. With ``rest``, a row that sees outliers only stays as it is. The rule does
    nothing where there are no outliers.

    Attributes:
        outliers: the entries that ``gain`` is for, as `attnrb.functional.attention` finds them: indices int32
            ``[B, H, M, C]`` and counts int32 ``[B, H, M]``; or ``[B, H, 1, C]`` and ``[B, H, 1]``: one list for all
            queries of a head. With a `attnrb.Paging` ``[T, H, C]`` and ``[T, H]``. Slots must ascend in each row.
        gain: a number, or one for each head: a sequence, or a floating tensor ``[H]`` or ``[1]``; with a paging also
            ``[B, H]``, one for each sequence. Without ``outliers`` every visible key is one. At least -1 with the rule
            ``rest``: below, weights would change sign.
        rule: ``"none"``, ``"row"`` or ``"rest"``.
        key_bias: floating ``[B, H, N']``, B and H being 1 where all share it: added to the scores of the key at each
            slot, after the softcap. Keys at slots from N' on have none. -inf removes a key. Computed with in float32.
        first_query: the slot from which on queries have the bias: an int, or int64 or int32 ``[B]``, one for each batch
            row. The default, None, is all queries.

    Raises:
        TypeError: an attribute has the wrong type or dtype.
        ValueError: the rule is unknown, a rank is wrong, a gain is not finite or below its range, or ``outliers``
            stand without ``gain`` or ``first_query`` without ``key_bias``.
    """

    outliers: Outliers | tuple[Tensor, Tensor] | None = None
    gain: float | Sequence[float] | Tensor | None = None
    rule: str = "none"
    key_bias: Tensor | None = None
    first_query: int | Tensor | None = None

    @classmethod
    def of_arguments(cls, arguments: EditArguments) -> Edit:
        """The edit that an op is told by these arguments, which are not checked again."""
        indices, counts, gain, rule, key_bias, first_query = arguments
        outliers = None if indices is None or counts is None else Outliers(indices, counts)
        edit = object.__new__(cls)
        vars(edit).update(outliers=outliers, gain=gain, rule=RULES[rule], key_bias=key_bias, first_query=first_query)
        return edit

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(map(repr, RULES))}, got {self.rule!r}")
        if self.outliers is not None:
            if self.gain is None:
                raise ValueError("gain: expected where there are outliers, got None")
            _check_outliers(self.outliers)
        if self.gain is not None:
            check_gain(self.gain, self.rule)
        if self.key_bias is not None:
            _check_key_bias(self.key_bias)
        if self.first_query is not None:
            _check_first_query(self.first_query, self.key_bias)

    def __repr__(self) -> str:
        return shown_fields(self, vars(self))


class Attended(NamedTuple):
    """What `attnrb.functional.attention` returns.

    Attributes:
        output: ``[B, H, M, Dv]`` in the dtype of the query, laid out in memory as ``[B, M, H, Dv]``. With a
            `attnrb.Paging` ``[T, H, Dv]``.
        lse: float32 ``[B, H, M]``, with a paging ``[T, H]``: the log-sum-exp of each row's scores, bias and sink
            included; with the rule ``row`` also what the gain adds, ``ln(1 + g m)``. -inf for a row that sees no key.
        outliers: the layer's own, where they were asked for.
    """

    output: Tensor
    lse: Tensor
    outliers: Outliers | None

    def __repr__(self) -> str:
        return shown_fields(self, self._fields)


class EditArguments(NamedTuple):
    """An edit as the ops take it, under the names of their arguments."""

    indices: Tensor | None = None
    counts: Tensor | None = None
    gain: Tensor | None = None
    rule: int = 0
    """Index in `RULES`."""
    key_bias: Tensor | None = None
    first_query: Tensor | None = None


NO_EDIT = EditArguments()


def edit_arguments(edit: Edit | None, query: Tensor, sequences: int | None = None) -> EditArguments:
    """What an op is told for ``edit``; `NO_EDIT` where there is none.

    Args:
        edit: None changes nothing.
        query: ``[B, H, M, D]``, or ragged. Numbers become tensors on its device; a gain and a bias become float64
            where it is, else float32.
        sequences: how many there are; the default is the size of the query's first axis.

    Raises:
        TypeError: ``edit`` is something else.
    """
    if edit is None:
        return NO_EDIT
    if not isinstance(edit, Edit):
        raise TypeError(f"edit: expected an Edit or None, got {describe(edit)}")
    device, wide = query.device, promoted(query.dtype)
    indices, counts = (None, None) if edit.outliers is None else edit.outliers
    first = edit.first_query
    if first is not None and not isinstance(first, Tensor):
        first = torch.full(
            (query.size(0) if sequences is None else sequences,), first, dtype=torch.int64, device=device
        )
    return EditArguments(
        indices,
        counts,
        None if edit.gain is None else gain_tensor(edit.gain, device, wide),
        RULES.index(edit.rule),
        None if edit.key_bias is None else edit.key_bias.to(wide),
        first,
    )


def gain_tensor(gain: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gain as the ops take it: ``[1]`` or ``[H]``.

    Raises:
        TypeError: it is neither numbers nor a floating tensor.
        ValueError: a number is not finite.
    """
    if isinstance(gain, Tensor):
        if gain.dtype == dtype and gain.dim() == 1:
            return gain
        if not gain.is_floating_point():
            raise TypeError(f"gain: expected numbers or a floating-point tensor, got {describe(gain)}")
        return (gain.reshape(1) if gain.dim() == 0 else gain).to(dtype)
    if isinstance(gain, (int, float)):
        _check_finite(gain)
        return torch.full((1,), gain, dtype=dtype, device=device)
    return torch.tensor(_numbers(gain), dtype=dtype, device=device)


def check_gain(gain: Any, rule: str) -> None:
    """Refuse what is no gain, and numbers that the rule has no meaning for; values of tensors are the ops' to check."""
    if isinstance(gain, Tensor):
        if not gain.is_floating_point():
            raise TypeError(f"gain: expected numbers or a floating-point tensor, got {describe(gain)}")
        if gain.dim() > 2:
            raise ValueError(
                f"gain: expected one number, one for each head, [H], or with paging [B, H], got the shape "
                f"{tuple(gain.shape)}"
            )
        return
    for each in _numbers(gain):
        if rule == "rest" and each < -1.0:
            raise ValueError(f"gain: expected at least -1 with the rule {rule!r}, got {each}")


def _numbers(gain: Any) -> list[float]:
    try:
        numbers = [float(each) for each in gain] if isinstance(gain, Sequence) else [float(gain)]
    except (TypeError, ValueError):
        raise TypeError(f"gain: expected a number, or one for each head, got {describe(gain)}") from None
    for each in numbers:
        _check_finite(each)
    return numbers


def _check_finite(value: float) -> None:
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite() of a dynamic float
        raise ValueError(f"gain: expected a finite number, got {value}")


def _check_outliers(outliers: Any) -> None:
    # A lone tensor would unpack too, along its first axis.
    if not isinstance(outliers, tuple) or len(outliers) != 2:
        raise TypeError(f"outliers: expected a tuple (indices, counts), got {describe(outliers)}")
    for name, tensor in (("indices", outliers[0]), ("counts", outliers[1])):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
            raise TypeError(f"outliers: expected {name} to be an int32 tensor, got {describe(tensor)}")
    indices, counts = outliers
    if indices.dim() not in (3, 4):
        raise ValueError(
            "outliers: expected indices of shape [B, H, M, C] or [B, H, 1, C], or with paging [T, H, C], got "
            f"{tuple(indices.shape)}"
        )
    if counts.dim() != indices.dim() - 1:
        axes = "[B, H, M] or [B, H, 1]" if indices.dim() == 4 else "[T, H]"
        raise ValueError(f"outliers: expected counts of shape {axes}, got {tuple(counts.shape)}")


def _check_key_bias(bias: Any) -> None:
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"key_bias: expected a floating-point tensor [B, H, N'], got {describe(bias)}")
    if bias.dim() != 3:
        raise ValueError(f"key_bias: expected 3 axes [B, H, N'], B and H being 1 for all, got {tuple(bias.shape)}")


def _check_first_query(first: Any, bias: Any) -> None:
    if bias is None:
        raise ValueError("key_bias: expected where there is first_query, got None")
    if isinstance(first, Tensor):
        check_slots("first_query", first)
    elif not isinstance(first, (int, torch.SymInt)) or isinstance(first, bool):
        raise TypeError(f"first_query: expected an int, an int64 tensor [B] or None, got {describe(first)}")
