"""What grows with what: the sizes of docs/scale.md, computed.

.venv/bin/python docs/scale.py                  # write docs/scale.md
.venv/bin/python docs/scale.py --model FOLDER   # print the tables for the config.json of a model instead
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
CONTEXTS = {"8k": 1 << 13, "32k": 1 << 15, "128k": 1 << 17, "1M": 1 << 20}
CHUNK = 1 << 13
RANKS = (1, 2, 4, 8)
HALF, FULL = 2, 4  # bytes of bfloat16 and of int32 or float32


class Shape(NamedTuple):
    """What of a model's shape matters."""

    name: str
    layers: int
    heads: int
    key_heads: int
    width: int
    hidden: int


MODELS = (Shape("8B", 32, 32, 8, 128, 4096), Shape("70B", 80, 64, 8, 128, 8192))


def capacity(threshold: float = 0.01) -> int:
    """C, the most outliers of a row: docs/method.md, "Outlier rows are bounded"."""
    return math.ceil(1 / threshold) - 1


def cache_bytes(shape: Shape, slots: int = 1) -> int:
    """Keys and values of one layer, in bfloat16."""
    return 2 * slots * shape.key_heads * shape.width * HALF


def outlier_bytes(shape: Shape, queries: int = 1, threshold: float = 0.01) -> int:
    """One forward's outliers: C slots and a count in every row, int32, once for all layers."""
    return queries * shape.heads * (capacity(threshold) + 1) * FULL


def matrix_bytes(shape: Shape, slots: int) -> int:
    """The weights of one layer as eager attention builds them, in bfloat16, and as many booleans for its outliers."""
    return shape.heads * slots * slots * (HALF + 1)


def size(number: float) -> str:
    """Bytes, with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1000 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1024
    raise AssertionError


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def per_token(models: tuple[Shape, ...]) -> str:
    """Memory and traffic of one new token."""
    rows = []
    for each in models:
        outliers = outlier_bytes(each)
        rows += [
            [f"{each.name}: cached keys and values, each layer", size(cache_bytes(each)), "stays"],
            [f"{each.name}: cached keys and values, all layers", size(each.layers * cache_bytes(each)), "stays"],
            [f"{each.name}: outliers, all layers together", size(outliers), "until the forward ends"],
            [f"{each.name}: hidden state, for comparison", size(each.hidden * HALF), "until the layer ends"],
        ]
    return table(["one token", "size", "lives"], rows)


def per_context(models: tuple[Shape, ...]) -> str:
    """Memory of a text, whole and in chunks."""
    rows = []
    for each in models:
        for name, slots in CONTEXTS.items():
            rows.append(
                [
                    each.name,
                    name,
                    size(each.layers * cache_bytes(each, slots)),
                    size(outlier_bytes(each, slots)),
                    size(outlier_bytes(each, min(slots, CHUNK))),
                    size(matrix_bytes(each, slots)),
                ]
            )
    header = [
        "model",
        "context",
        "cache",
        "outliers, one prefill",
        "outliers, chunks of 8k",
        "one layer's matrices, not built",
    ]
    return table(header, rows)


def per_step(models: tuple[Shape, ...]) -> str:
    """What decoding one token reads in every layer."""
    rows = []
    for each in models:
        for name, slots in CONTEXTS.items():
            read, listed = cache_bytes(each, slots), outlier_bytes(each)
            rows.append([each.name, name, size(read), size(listed), f"{listed / read:.1e}"])
    return table(["model", "context", "keys and values read", "outliers read, at most", "share"], rows)


def per_rank(models: tuple[Shape, ...]) -> str:
    """Tensor parallelism: what each rank holds of a context of 128k."""
    rows = []
    for each in models:
        for ranks in RANKS:
            cache = each.layers * cache_bytes(each, CONTEXTS["128k"]) / min(ranks, each.key_heads)
            outliers = outlier_bytes(each, CHUNK) / ranks
            rows.append([each.name, str(ranks), size(cache), size(outliers), "0 B"])
    header = ["model", "ranks", "cache, each", "outliers of a chunk of 8k, each", "sent between ranks in addition"]
    return table(header, rows)


PAGE = """# Scale

This page says what grows with what when a model is patched, and which engine to use when.

The tables are computed and not measured. They take the shapes of models of 8 and 70 billion parameters, in bfloat16,
with a threshold of 0.01:

| model | layers | query heads | key heads | width of a head |
| --- | --- | --- | --- | --- |
| 8B | 32 | 32 | 8 | 128 |
| 70B | 80 | 64 | 8 | 128 |

This command writes the page:

    .venv/bin/python docs/scale.py

`docs/scale.py --model FOLDER` prints the tables for a model of your own.

## One token

{per_token}
Outliers are found once in a forward, and all layers above the source use them. Their number does not grow with the
layers. It does not grow with the context either, since a row has at most 99 of them ([Outlier rows are
bounded](method.md#outlier-rows-are-bounded)). Nothing about them is kept from one step to the next. The cache is the
model's own, unchanged.

## A context

{per_context}
In a prefill of the whole text, each token has its row of outliers at the same time. Where that is too much, prefill in
chunks (`generate(prefill_chunk_size=8192)`); then only the rows of one chunk exist at once. The last column is what
eager attention and its mask of outliers would take in a single layer. attnrb never builds these matrices.

## A step of decoding

{per_step}
With or without a patch, decoding reads every cached key and value of a layer. A re-balanced layer also reads the
outliers of one row in each head. Real rows have far fewer than the 99 that this table counts.

## Ranks

{per_rank}
When heads are split between ranks, each rank finds and uses the outliers of its own heads, because outliers pair by
head. So a patch adds nothing to what ranks send each other. A test counts the collective operations of both and
compares.

Layers on different devices (`device_map`) do hand outliers on, once for each border between devices in each forward.
The first table gives the size for every token.

## Which engine

| you have | use | what is re-balanced |
| --- | --- | --- |
| a model that fits one device | `attnrb.patch(model)` | everything |
| many prompts, several devices, a model that fits each | `accelerate launch` and one patched copy in each process | each process by itself |
| a model larger than one device, to generate quickly | tensor parallelism of transformers (`tp_plan="auto"` under `torchrun`), then `attnrb.patch` | each rank its own heads |
| the same, without a fast link, or with a disk to help out | `device_map="auto"`, then `attnrb.patch` | outliers follow the layers |
| a forward of a model that FSDP shards | `fully_shard`, before or after `attnrb.patch` | each process its own rows |
| vLLM | served, on the CPU: [vLLM](vllm.md) | `make test-vllm` |
| another inference server with paged caches | not served: the server brings attention of its own | |

The rows for several processes are tested with two processes on the CPU. Logits and greedy text equal those of one
process.
"""  # noqa: E501 (tables)


def tables(models: tuple[Shape, ...]) -> dict[str, str]:
    """Every table of the page, by the name of the function that makes it."""
    return {make.__name__: make(models) for make in (per_token, per_context, per_step, per_rank)}


def shape_of(folder: Path) -> Shape:
    """The shape that a config.json tells."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return Shape(folder.name, config.num_hidden_layers, heads, key_heads, width, config.hidden_size)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or print the tables of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="print the tables for this model instead")
    options = parser.parse_args(arguments)
    if options.model is None:
        (DOCS / "scale.md").write_text(PAGE.format(**tables(MODELS)), encoding="utf-8")
    else:
        print("\n".join(tables((shape_of(options.model),)).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
