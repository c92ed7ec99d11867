"""Random calls of every native op, made from its schema: a value for each argument, by the argument's name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attnrb
import torch
from torch import Tensor

OPS = (
    "attention",
    "attention_training",
    "attention_backward",
    "received_attention",
    "received_attention.edited",
    "received_attention_training",
    "received_attention_backward",
    "source_attention",
    "rebalanced_attention",
    "rebalance",
    "rebalance.per_head",
    "rebalance_backward",
    "outlier_mask",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def overload(name: str) -> Any:
    """The op of a name like ``rebalance.per_head``."""
    op, _, kind = name.partition(".")
    return getattr(getattr(torch.ops.attnrb, op), kind or "default")


@dataclass(frozen=True)
class Sizes:
    """Of a call, by the letters of the documentation."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int


def draw_sizes(rng: random.Random) -> Sizes:
    """Small, each of them at least 1."""
    key_heads = rng.randint(1, 3)
    queries = rng.randint(1, 5)
    return Sizes(
        rng.randint(1, 3),
        key_heads * rng.randint(1, 3),
        key_heads,
        queries,
        queries + rng.randint(0, 6),
        rng.choice((4, 8, 12, 16)),
        rng.choice((4, 8, 10)),
    )


def call(name: str, rng: random.Random) -> tuple[Sizes, dict[str, Any]]:
    """The sizes and the arguments of a valid call of the op."""
    sizes, dtype = draw_sizes(rng), rng.choice(DTYPES)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    b, h, hk, m, n = sizes.batch, sizes.heads, sizes.key_heads, sizes.queries, sizes.keys
    query, key = draw(b, h, m, sizes.width, dtype=dtype), draw(b, hk, n, sizes.width, dtype=dtype)
    value = draw(b, hk, n, sizes.value_width, dtype=dtype)
    output, lse, found = attnrb.functional.source_attention(query, key, value, threshold=0.15)
    weights = torch.rand(b, h, m, n, generator=generator).to(dtype)
    edited = name in ("attention", "attention_training", "attention_backward", "rebalanced_attention")
    slots = torch.zeros(b, dtype=torch.int64)
    values: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "output": output,
        "lse": lse,
        "indices": found.indices if edited else None,
        "counts": found.counts if edited else None,
        "gain": draw(h).abs() if edited or name.startswith("rebalance") else None,
        "rule": rng.choice((0, 1)),
        "key_bias": draw(b, h, n) if rng.random() < 0.5 else None,
        "first_query": slots.clone() if rng.random() < 0.5 else None,
        "emit": 0.2 if name != "attention_backward" and rng.random() < 0.5 else None,
        "causal": rng.random() < 0.7,
        "query_offset": n - m,
        "query_offsets": None,
        "key_offset": 0,
        "window": rng.choice((0, 0, 2, 5)),
        "chunk": rng.choice((0, 0, 3)),
        "key_start": slots.clone() if rng.random() < 0.5 else None,
        "key_end": torch.full((b,), n, dtype=torch.int64) if rng.random() < 0.5 else None,
        "mask": torch.rand(b, 1, m, n, generator=generator) < 0.8 if rng.random() < 0.5 else None,
        "scale": sizes.width**-0.5,
        "softcap": rng.choice((0.0, 0.0, 5.0)),
        "sinks": draw(h) if rng.random() < 0.5 else None,
        "threshold": 0.15,
        "normalize": rng.random() < 0.5,
        "weights": weights,
        "grad_output": draw(*(weights.shape if name == "rebalance_backward" else output.shape), dtype=dtype),
        "grad_lse": draw(b, h, m) if rng.random() < 0.5 else None,
        "grad_received": draw(b, h, n),
    }
    values["mask"] = weights > 0.5 if name.startswith("rebalance") and name[9:10] in ("", ".", "_") else values["mask"]
    if name == "rebalance":
        values["gain"] = 0.5
    if values["key_bias"] is None:
        values["first_query"] = None
    # What is not drawn here, as tables of blocks, has its default.
    schema = overload(name)._schema.arguments
    return sizes, {each.name: values.get(each.name, each.default_value) for each in schema}


def invoke(name: str, arguments: dict[str, Any]) -> Any:
    """Call the op, positional arguments by position."""
    schema = overload(name)._schema.arguments
    positional = [arguments[each.name] for each in schema if not each.kwarg_only]
    return overload(name)(*positional, **{each.name: arguments[each.name] for each in schema if each.kwarg_only})


Change = Callable[[Sizes, dict[str, Any]], None]
