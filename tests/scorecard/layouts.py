"""Odd layouts of every tensor of a call, against contiguous copies, bit for bit.

    python tests/scorecard/layouts.py --count 5000

Calls are those of `calls.call`, over every native op. Each tensor gets a layout at random: axes in another order,
slices with steps out of a buffer of NaN, odd offsets, repeated by strides of zero, rows that overlap, or a place in one
buffer with the others. In some calls an axis has no element. Nothing that was passed may be written.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from calls import OPS, call, invoke
from row import Tally, run
from torch import Tensor

# The axes of each argument, so that one of them can be emptied everywhere; x has one element.
_AXES = {
    "query": "BHMD",
    "key": "BKND",
    "value": "BKNV",
    "output": "BHMV",
    "lse": "BHM",
    "indices": "BHMC",
    "counts": "BHM",
    "gain": "H",
    "key_bias": "BHN",
    "first_query": "B",
    "key_start": "B",
    "key_end": "B",
    "sinks": "H",
    "weights": "BHMN",
    "grad_lse": "BHM",
    "grad_received": "BHN",
}
_ROWS_OF_SLOTS = ("indices", "counts")  # which must stay as they are


def _ordered(tensor: Tensor, rng: random.Random) -> Tensor:
    axes = list(range(tensor.dim()))
    rng.shuffle(axes)
    return tensor.permute(axes).contiguous().permute([axes.index(axis) for axis in range(tensor.dim())])


def _sliced(tensor: Tensor, rng: random.Random) -> Tensor:
    steps = [rng.choice((1, 1, 2, 3)) for _ in tensor.shape]
    margins = [rng.randint(0, 3) for _ in tensor.shape]
    sizes = [size * step + margin for size, step, margin in zip(tensor.shape, steps, margins, strict=True)]
    buffer = _waste(sizes, tensor.dtype)
    view = buffer[tuple(slice(margin, None, step) for margin, step in zip(margins, steps, strict=True))]
    view = view[tuple(slice(0, size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def _offset(tensor: Tensor, rng: random.Random) -> Tensor:
    first = rng.choice((1, 3, 5, 7, 17, 33))
    view = _waste([first + tensor.numel() + 9], tensor.dtype)[first : first + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _expanded(tensor: Tensor, rng: random.Random) -> Tensor:
    axis = rng.randrange(tensor.dim())
    return tensor.narrow(axis, 0, 1).clone().expand(tensor.shape) if tensor.shape[axis] else tensor


def _overlapping(tensor: Tensor, rng: random.Random) -> Tensor:
    """Each row begins inside the one before."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        return tensor
    strides = list(tensor.contiguous().stride())
    strides[-2] = rng.randint(1, tensor.shape[-1])
    return tensor.contiguous().as_strided(tensor.shape, strides)


def _waste(sizes: list[int], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.full(sizes, torch.nan, dtype=dtype)
    return torch.full(sizes, 1 if dtype == torch.bool else -(2**30), dtype=dtype)


_KEEPING: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "axes in another order": _ordered,
    "slices": _sliced,
    "odd offsets": _offset,
}
_CHANGING = _KEEPING | {"strides of zero": _expanded, "rows that overlap": _overlapping}


def emptied(name: str, arguments: dict[str, Any], axis: str) -> dict[str, Any]:
    """The call with no element along an axis of every tensor that has it."""
    axes = _AXES | {"mask": "BHMN" if name.startswith(("rebalance.", "rebalance_")) or name == "rebalance" else "BxMN"}
    axes["grad_output"] = "BHMN" if name == "rebalance_backward" else "BHMV"
    return {
        argument: value.narrow(axes[argument].index(axis), 0, 0)
        if isinstance(value, Tensor) and axis in axes.get(argument, "")
        else value
        for argument, value in arguments.items()
    }


def shared(arguments: dict[str, Any]) -> dict[str, Any]:
    """All tensors of one dtype side by side in one buffer."""
    found = dict(arguments)
    for dtype in {value.dtype for value in arguments.values() if isinstance(value, Tensor)}:
        names = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dtype == dtype]
        buffer = torch.cat([arguments[name].reshape(-1) for name in names])
        place = 0
        for name in names:
            size = arguments[name].numel()
            found[name] = buffer[place : place + size].view(arguments[name].shape)
            place += size
    return found


def lay_out(arguments: dict[str, Any], rng: random.Random, tally: Tally) -> dict[str, Any]:
    """Every tensor in a new layout; indices and counts keep their values."""
    if rng.random() < 0.15:
        tally.counts["one buffer for all"] += 1
        return shared(arguments)
    found = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or rng.random() < 0.2:
            found[name] = value
            continue
        choices = _KEEPING if name in (*_ROWS_OF_SLOTS, "first_query") else _CHANGING
        kind = rng.choice(sorted(choices))
        tally.counts[kind] += 1
        found[name] = choices[kind](value, rng)
    return found


def bits(result: Any) -> list[tuple[Any, ...]]:
    """Shapes, dtypes and bytes of everything that came."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [_bits(each) if isinstance(each, Tensor) else (each,) for each in tensors]


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return tuple(tensor.shape), tensor.dtype, flat.view(torch.uint8).numpy().tobytes()


def refusal(name: str, arguments: dict[str, Any]) -> str | None:
    """What a call raises."""
    try:
        invoke(name, arguments)
    except Exception as error:
        return str(error)
    return None


def attempt(tally: Tally, seed: int) -> None:
    """One call in an odd layout and one of contiguous copies."""
    rng = random.Random(seed)
    name = rng.choice(OPS)
    _, arguments = call(name, rng)
    if rng.random() < 0.1:
        tally.counts["calls with an empty axis"] += 1
        arguments = emptied(name, arguments, rng.choice("BMNV"))
    odd = lay_out(arguments, rng, tally)
    plain = {
        name: x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x for name, x in odd.items()
    }
    tally.counts["calls"] += 1
    try:
        expected = bits(invoke(name, plain))
    except Exception as refused:
        also = refusal(name, odd)
        if also != str(refused):
            raise AssertionError(f"copies are refused with: {refused}; the odd ones with: {also}") from None
        tally.counts["of these refused alike"] += 1
        return
    found = bits(invoke(name, odd))
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"result {number} of {name} has other bits"
    for argument, value in odd.items():
        if isinstance(value, Tensor):
            assert bits(value) == bits(plain[argument]), f"{argument} was written"


def work(tally: Tally) -> None:
    """Try every seed."""
    torch.set_num_threads(1)
    for seed in tally.seeds():
        try:
            attempt(tally, seed)
        except Exception as error:
            tally.fault(f"seed {seed}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    sys.exit(run("layouts", __doc__, work, count=5000))
