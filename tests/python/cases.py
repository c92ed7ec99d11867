"""The case table: every shape, layout, visibility and distribution that the ops are tested on, by name.

A case is data: sizes, a distribution, a layout in memory and a visibility. `Case.build` turns it into tensors of a
given dtype, always the same ones for the same name. `table()` lists all cases, `sample()` a fixed part of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Builds the keyword arguments of attnrb.Visibility; None stands for the default visibility.
Vision = Callable[["Case", torch.Generator], "dict[str, Any] | None"]


def _default(case: Case, generator: torch.Generator) -> dict[str, Any] | None:
    return None


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    queries: int = 32
    keys: int = 32
    width: int = 64
    value_width: int | None = None  # width
    threshold: float = 0.01
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    spread: float = 2.0  # standard deviation of the scores: 0 is flat, 2 has a dozen outliers a row, 100 is one-hot
    layout: str = "contiguous"
    vision: Vision = _default

    def build(self, dtype: torch.dtype, draw: int = 0) -> Inputs:
        """The tensors of this case; the same bits on every run and machine. Another `draw` has other numbers."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + draw)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        value_width = self.width if self.value_width is None else self.value_width
        scale = 1.0 / math.sqrt(max(self.width, 1)) if self.scale is None else self.scale
        # Scores are a sum of `width` products times the scale, so their spread is that of the query here.
        strength = self.spread / (scale * math.sqrt(max(self.width, 1)))
        query = normal(self.batch, self.heads, self.queries, self.width) * strength
        key = normal(self.batch, self.key_heads, self.keys, self.width)
        value = normal(self.batch, self.key_heads, self.keys, value_width)
        lay_out = LAYOUTS[self.layout]
        query, key, value = (lay_out(x.to(dtype)) for x in (query, key, value))
        return Inputs(
            query,
            key,
            value,
            self.vision(self, generator),
            normal(self.heads) * 2.0 if self.sinks else None,
            self,
        )


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    vision: dict[str, Any] | None
    sinks: Tensor | None
    case: Case

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that all attention functions share."""
        from attnrb import Visibility

        return {
            "scale": self.case.scale,
            "visibility": None if self.vision is None else Visibility(**self.vision),
            "softcap": self.case.softcap,
            "sinks": self.sinks,
        }


# --- Layouts in memory. Each returns a tensor equal to its argument. What lies around the values is NaN, so that a
# --- kernel that reads a neighbour, even to multiply it by zero, shows it.


def _filled(tensor: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=tensor.dtype)


def _sequence_first(x: Tensor) -> Tensor:
    """[B,H,N,D] seen through [B,N,H,D], as projections of hidden states are."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cache(x: Tensor) -> Tensor:
    """The first rows of a longer buffer, as a static cache is."""
    batch, heads, rows, width = x.shape
    buffer = _filled(x, batch, heads, rows + 13, width)
    buffer[:, :, :rows] = x
    return buffer[:, :, :rows]


def _offset(x: Tensor) -> Tensor:
    """Begins at an odd element of a wider buffer: rows are aligned to nothing."""
    batch, heads, rows, width = x.shape
    buffer = _filled(x, 1 + batch * heads * (rows + 1) * (width + 3))
    view = buffer[1:].view(batch, heads, rows + 1, width + 3)[:, :, :rows, 2 : width + 2]
    view.copy_(x)
    return view


def _innermost(x: Tensor) -> Tensor:
    """Every third element of a wider buffer: the innermost stride is 3."""
    batch, heads, rows, width = x.shape
    buffer = _filled(x, batch, heads, rows, 3 * width)
    buffer[..., 1::3] = x
    return buffer[..., 1::3]


def _width_first(x: Tensor) -> Tensor:
    """[B,H,N,D] seen through [B,H,D,N]: the row stride is 1."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "sequence first": _sequence_first,
    "cache": _cache,
    "offset": _offset,
    "innermost": _innermost,
    "width first": _width_first,
}


# --- Visibilities.


def given(**kwargs: Any) -> Vision:
    return lambda case, generator: dict(kwargs)


def ranges(starts: list[int] | None, ends: list[int] | None = None, **kwargs: Any) -> Vision:
    """Per-batch key ranges, as padding makes them."""

    def build(case: Case, generator: torch.Generator) -> dict[str, Any]:
        given = dict(kwargs)
        if starts is not None:
            given["key_start"] = torch.tensor(starts)
        if ends is not None:
            given["key_end"] = torch.tensor(ends)
        return given

    return build


def masked(axes: str, density: float = 0.7, layout: str = "contiguous", **kwargs: Any) -> Vision:
    """A random mask over the axes named (of BHMN; an axis named by 1 is broadcast, leading ones may be left out)."""

    def build(case: Case, generator: torch.Generator) -> dict[str, Any]:
        sizes = {"B": case.batch, "H": case.heads, "M": case.queries, "N": case.keys, "1": 1}
        mask = torch.rand([sizes[axis] for axis in axes], generator=generator) < density
        if layout == "transposed":
            mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == "strided":
            buffer = torch.ones(*mask.shape[:-1], 2 * mask.shape[-1] + 1, dtype=torch.bool)
            buffer[..., 1::2] = mask
            mask = buffer[..., 1::2]
        elif layout == "expanded":
            mask = mask.expand(case.batch, case.heads, case.queries, case.keys)
        return {"mask": mask, **kwargs}

    return build


# Every way a mask can broadcast; see `masked`.
MASK_AXES = ("N", "MN", "1N", "M1", "HMN", "11MN", "B11N", "B1MN", "1H1N", "1HMN", "BHMN", "BHM1", "B1M1", "111N")


def chunked_mask(chunk: int) -> Vision:
    """Causal inside chunks of slots, as llama4 masks; it comes as a plain mask."""

    def build(case: Case, generator: torch.Generator) -> dict[str, Any]:
        slot = torch.arange(case.keys)
        query_slot = slot[case.keys - case.queries :, None]
        return {"mask": (slot <= query_slot) & (slot // chunk == query_slot // chunk)}

    return build


# --- The table, topic by topic.


def _lengths() -> Iterator[Case]:
    """Every way a length can fall against tiles of 16 to 256 rows, widths and head groups taken in turn."""
    lengths = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 191, 193, 255, 256, 257)
    shapes = ((2, 1, 64), (4, 2, 32), (3, 3, 16), (6, 2, 80), (2, 2, 128), (5, 1, 24), (2, 1, 36))
    for index, length in enumerate(lengths):
        heads, key_heads, width = shapes[index % len(shapes)]
        yield Case(f"square {length}", 1, heads, key_heads, length, length, width)
    for length, heads, key_heads, width in (
        (300, 3, 1, 64),
        (384, 2, 2, 40),
        (511, 2, 1, 64),
        (512, 2, 2, 128),
        (513, 3, 1, 32),
        (577, 2, 1, 96),
        (640, 1, 1, 64),
        (700, 2, 1, 48),
    ):
        yield Case(f"square {length}", 1, heads, key_heads, length, length, width)
    for queries, keys in ((17, 40), (40, 17), (33, 256), (64, 257), (100, 129), (256, 300), (257, 640), (130, 700)):
        yield Case(f"wide {queries}x{keys}", 2, 4, 2, queries, keys, 64)
        yield Case(f"wide {queries}x{keys} sees all", 1, 2, 1, queries, keys, 32, vision=given(causal=False))


def _widths() -> Iterator[Case]:
    widths = (1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 65, 72, 80, 96, 112, 120, 127, 128, 129)
    for width in (*widths, 160, 192, 224, 255, 256):
        yield Case(f"width {width}", 1, 2, 1, 37, 53, width)
    pairs = ((64, 128), (128, 64), (192, 128), (72, 40), (16, 1), (1, 16), (256, 33), (33, 256), (8, 7))
    for width, value_width in pairs:
        yield Case(f"width {width} value width {value_width}", 1, 4, 2, 45, 70, width, value_width)
        yield Case(f"width {width} value width {value_width} decode", 2, 4, 2, 1, 70, width, value_width)


def _few_queries() -> Iterator[Case]:
    """Decoding, and the handful of rows where a small-M kernel takes over from the tiles."""
    for queries in range(2, 21):
        yield Case(f"few {queries}", 1, 6, 2, queries, 150, 64)
    for keys in (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 300, 511, 512, 513, 1000, 1500, 2049):
        yield Case(f"decode {keys}", 1, 8, 2, 1, keys, 64)
    for heads, key_heads in ((1, 1), (7, 7), (7, 1), (9, 3), (16, 1), (32, 8), (33, 1), (40, 2)):
        yield Case(f"decode heads {heads}/{key_heads}", 1, heads, key_heads, 1, 333, 128)
        yield Case(f"decode heads {heads}/{key_heads} batch", 3, heads, key_heads, 1, 100, 32)
    ragged = [0, 3, 64, 130, 255, 256, 299, 300]
    yield Case("decode ragged left padding", 8, 8, 2, 1, 300, 64, vision=ranges(ragged))
    yield Case("decode ragged both sides", 4, 4, 1, 1, 300, 64, vision=ranges([0, 5, 200, 290], [300, 6, 280, 290]))
    yield Case("decode window", 1, 4, 2, 1, 400, 64, vision=given(window=100))
    yield Case("decode window with key offset", 1, 4, 2, 1, 100, 64, vision=given(window=100, key_offset=900))
    yield Case("decode into an empty tail", 1, 4, 2, 1, 400, 64, vision=given(query_offset=250))
    yield Case("decode mask", 2, 4, 2, 1, 400, 64, vision=masked("B11N"))
    yield Case("decode sinks", 2, 8, 2, 1, 400, 64, sinks=True)
    yield Case("decode softcap", 2, 8, 2, 1, 400, 64, softcap=5.0)
    yield Case("decode sharp", 1, 8, 2, 1, 700, 64, spread=12.0)
    yield Case("decode threshold 0.001", 1, 8, 2, 1, 1500, 64, threshold=0.001, spread=1.0)
    yield Case("few with ragged left padding", 3, 4, 2, 7, 200, 64, vision=ranges([0, 150, 197]))
    yield Case("few window sinks", 2, 4, 2, 12, 200, 64, sinks=True, vision=given(window=50))
    yield Case("few mask", 2, 4, 2, 9, 200, 64, vision=masked("B1MN"))


def _heads() -> Iterator[Case]:
    for heads, key_heads in ((1, 1), (3, 3), (9, 3), (8, 2), (7, 1), (12, 6), (32, 4)):
        yield Case(f"heads {heads}/{key_heads}", 2, heads, key_heads, 40, 72, 32)


def _visibilities() -> Iterator[Case]:
    base = Case("", 3, 4, 2, 70, 150, 32)

    def with_vision(name: str, vision: Vision, **changes: Any) -> Case:
        return replace(base, name=name, vision=vision, **changes)

    yield with_vision("causal offset 0", given(query_offset=0))
    yield with_vision("causal offset 37", given(query_offset=37))
    yield with_vision("causal offset beyond the keys", given(query_offset=500))
    yield with_vision("causal offset negative", given(query_offset=-20))
    yield with_vision("causal said", given(causal=True))
    yield with_vision("sees all", given(causal=False))
    yield with_vision("sees all offset 37", given(causal=False, query_offset=37))
    yield with_vision("key offset", given(key_offset=1000))
    yield with_vision("key offset and query offset", given(key_offset=1000, query_offset=1040))
    for window in (1, 2, 16, 33, 64, 70, 149, 150, 1000):
        yield with_vision(f"window {window}", given(window=window))
    yield with_vision("window without causality", given(causal=False, window=40))
    yield with_vision("window with key offset", given(window=40, key_offset=77))
    yield with_vision("window that leaves the keys", given(window=10, query_offset=140))
    yield with_vision("key start", ranges([0, 33, 149]))
    yield with_vision("key start hides some rows", ranges([0, 100, 150]))
    yield with_vision("key end", ranges(None, [150, 64, 1]))
    yield with_vision("key end without causality", ranges(None, [150, 65, 0], causal=False))
    yield with_vision("key range", ranges([0, 10, 50], [150, 20, 50], causal=False))
    yield with_vision("key range beyond the keys", ranges([-5, 0, 200], [400, 151, 300], causal=False))
    yield with_vision("key range with key offset", ranges([500, 533, 600], [650, 640, 610], key_offset=500))
    yield with_vision("causal window range", ranges([0, 33, 100], [150, 140, 120], window=48))
    for axes in MASK_AXES:
        yield with_vision(f"mask {axes}", masked(axes))
    for layout in ("transposed", "strided", "expanded"):
        yield with_vision(f"mask {layout}", masked("B1MN", layout=layout))
    yield with_vision("mask sparse", masked("BHMN", density=0.02))
    yield with_vision("mask empty", masked("BHMN", density=0.0))
    yield with_vision("mask full", masked("11MN", density=1.0))
    yield with_vision("mask and causal", masked("B1MN", causal=True))
    yield with_vision("mask causal window", masked("BHMN", causal=True, window=30))
    yield with_vision("mask and key range", lambda case, g: masked("1HMN")(case, g) | ranges([0, 9, 80])(case, g))
    yield with_vision("mask in chunks", chunked_mask(32))
    yield with_vision("large mask in chunks", chunked_mask(100), batch=1, queries=300, keys=555)
    yield with_vision("large window", given(window=130), batch=1, queries=600, keys=600)
    yield with_vision("large key range", ranges([257], [513], causal=False), batch=1, queries=40, keys=640)
    yield with_vision("chunked prefill", given(), batch=1, queries=128, keys=600)
    yield with_vision("chunked prefill into a static cache", given(query_offset=300), batch=1, queries=64, keys=700)
    yield with_vision("left-padded prefill", ranges([0, 40, 99]), queries=100, keys=100)
    yield with_vision(
        "left-padded windowed prefill with sinks", ranges([0, 40, 99], window=32), queries=100, keys=100, sinks=True
    )


def _empty() -> Iterator[Case]:
    yield Case("no batch", 0, 2, 1, 5, 7, 16)
    yield Case("no queries", 2, 2, 1, 0, 7, 16)
    yield Case("no keys", 2, 2, 1, 5, 0, 16)
    yield Case("no keys, sinks", 2, 2, 1, 5, 0, 16, sinks=True)
    yield Case("no keys, decode", 2, 4, 2, 1, 0, 16)
    yield Case("nothing", 1, 2, 1, 0, 0, 16)
    yield Case("more queries than keys", 2, 2, 1, 20, 12, 16)
    yield Case("all rows masked", 2, 2, 1, 33, 65, 16, vision=ranges([65, 80]))
    yield Case("all rows masked, sinks", 2, 2, 1, 33, 65, 16, sinks=True, vision=ranges([65, 80]))


def _scoring() -> Iterator[Case]:
    base = Case("", 2, 4, 2, 60, 130, 64)
    yield replace(base, name="scale", scale=0.3)
    yield replace(base, name="scale negative", scale=-0.125)
    yield replace(base, name="softcap 50", softcap=50.0, spread=8.0)
    yield replace(base, name="softcap 2", softcap=2.0, spread=6.0)
    yield replace(base, name="sinks", sinks=True)
    yield replace(base, name="sinks and softcap", sinks=True, softcap=20.0)
    yield replace(base, name="sinks, window, key range", sinks=True, vision=ranges([0, 70], window=33))
    yield replace(base, name="sinks and mask", sinks=True, vision=masked("B1MN"))
    yield replace(base, name="large sinks", sinks=True, spread=1.0, batch=1, queries=200, keys=300)
    for spread in (0.0, 0.3, 1.0, 4.0, 10.0, 30.0, 100.0):
        yield replace(base, name=f"spread {spread:g}", spread=spread)
        yield replace(base, name=f"large spread {spread:g}", spread=spread, batch=1, heads=2, queries=300, keys=300)
    for threshold in (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.25, 0.34, 0.5, 0.9):
        yield replace(base, name=f"threshold {threshold}", threshold=threshold)
    yield replace(base, name="large threshold 0.001", threshold=0.001, batch=1, queries=400, keys=640, spread=1.0)
    # A hundred equal weights of exactly 0.01: the threshold is met, not passed, save for rounding.
    yield replace(base, name="flat at the threshold", spread=0.0, vision=given(window=100))


def _layouts() -> Iterator[Case]:
    for layout in LAYOUTS:
        if layout != "contiguous":
            yield Case(f"layout {layout}", 2, 4, 2, 50, 90, 40, layout=layout)
            yield Case(f"layout {layout} decode", 2, 6, 2, 1, 90, 64, layout=layout)
            yield Case(f"layout {layout} odd width", 1, 2, 1, 21, 33, 37, 19, layout=layout)
            yield Case(f"layout {layout} large", 1, 2, 1, 270, 300, 64, layout=layout)


@cache
def table() -> tuple[Case, ...]:
    """All cases; their names are unique."""
    topics = (_lengths, _widths, _few_queries, _heads, _visibilities, _empty, _scoring, _layouts)
    cases = tuple(case for topic in topics for case in topic())
    assert len({case.name for case in cases}) == len(cases)
    return cases


def sample(one_in: int = 4) -> tuple[Case, ...]:
    """One case in so many, spread evenly over all topics."""
    return table()[::one_in]


def named(name: str) -> Case:
    return next(case for case in table() if case.name == name)
