"""Attention over blocks of keys, op against op on the same tensors.

Who runs: attnrb's paged op plain, emitting and edited; its strided op on rows that were gathered beforehand (one call
for a batch of equal sequences, else one a sequence; the gathering is not timed); and where vLLM for processors is
installed its own op on its own packed blocks.

    python bench/python/bench_paged.py [--quick] [--case PART]... [--dtype NAME]... [--block 128] [--threads N]
        [--json FILE]

Every output is verified before it is timed; contenders run in turn; the figure is the median. "x strided" is the time
over that of the strided calls, "x vLLM" over that of vLLM's op, whose aim is 1.0. Exit status 1 means that an output
was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from attnrb import Edit, Outliers, Paging
from figures import Figures, option_parser
from timing import Times, interleaved
from torch import Tensor

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
GAIN, THRESHOLD = 0.2, 0.01

# Queries and keys of each sequence.
CASES: dict[str, list[tuple[int, int]]] = {
    "decode 1 of 4096": [(1, 4096)],
    "decode 8 of 1024": [(1, 1024)] * 8,
    "decode 32 of 512": [(1, 512)] * 32,
    "decode 16 of 100 to 3100": [(1, 100 + 200 * i) for i in range(16)],
    "prefill 2048": [(2048, 2048)],
    "prefill 4 of 512": [(512, 512)] * 4,
    "chunk 256 onto 4096": [(256, 4096)],
    "mixed: chunk 256 and decode 15": [(256, 1024)] + [(1, 400 + 100 * i) for i in range(15)],
}


@dataclass
class Operands:
    """Of one case: queries, rows side by side, and the same rows in blocks."""

    query: Tensor
    rows: list[tuple[Tensor, Tensor]]
    key: Tensor
    value: Tensor
    paging: Paging
    slots: Tensor
    """int64 ``[keys of all]``: where the rows lie."""

    def spans(self) -> list[slice]:
        starts = self.paging.query_starts.tolist()
        return [slice(first, last) for first, last in pairwise(starts)]


def prepare(sequences: list[tuple[int, int]], dtype: torch.dtype, block_rows: int) -> Operands:
    """Random operands; blocks in a random order."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-keys // block_rows) for _, keys in sequences]
    order = torch.randperm(sum(needed), generator=generator)
    table = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
    key, value = (torch.zeros(sum(needed), KEY_HEADS, block_rows, WIDTH, dtype=dtype) for _ in range(2))
    rows, slots, taken = [], [], 0
    for b, (count, (_, keys)) in enumerate(zip(needed, sequences, strict=True)):
        table[b, :count] = order[taken : taken + count]
        taken += count
        places = torch.arange(keys)
        slots.append(table[b, places // block_rows].long() * block_rows + places % block_rows)
        rows.append(tuple(torch.randn(1, KEY_HEADS, keys, WIDTH, generator=generator).to(dtype) for _ in range(2)))
        for pool, own in zip((key, value), rows[-1], strict=True):
            pool[slots[-1] // block_rows, :, slots[-1] % block_rows] = own[0].transpose(0, 1)
    queries = torch.tensor([0, *(count for count, _ in sequences)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([keys for _, keys in sequences], dtype=torch.int32)
    query = (torch.randn(int(queries[-1]), HEADS, WIDTH, generator=generator) * 1.5).to(dtype)
    return Operands(query, rows, key, value, Paging(table, queries, lengths), torch.cat(slots))  # type: ignore[arg-type]


def contenders(operands: Operands, vllm: Any) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """What is timed, each returning an output ``[T, H, Dv]``; and what the edited one should return."""
    from attnrb import functional

    query, key, value, paging = operands.query, operands.key, operands.value, operands.paging
    source = functional.attention(query, key, value, paging=paging, emit=THRESHOLD)
    assert source.outliers is not None
    edit = Edit(Outliers(*source.outliers), torch.full((HEADS,), GAIN))
    batch = [query[span].transpose(0, 1)[None] for span in operands.spans()]
    equal = len({(each.shape, keys.shape) for each, (keys, _) in zip(batch, operands.rows, strict=True)}) == 1
    if equal:  # one call of a batch
        rows = [tuple(torch.cat(each) for each in zip(*operands.rows, strict=True))]
        batch = [torch.cat(batch)]
    else:
        rows = list(operands.rows)
    out = torch.zeros_like(query)

    def strided() -> Tensor:
        outputs = [
            torch.ops.attnrb.attention.output(each, keys, values)
            for each, (keys, values) in zip(batch, rows, strict=True)
        ]
        return torch.cat([each.flatten(0, 1) for each in outputs])

    found: dict[str, Callable[[], Tensor]] = {
        "strided": strided,
        "paged": lambda: functional.attention(query, key, value, paging=paging, out=out).output,
        "paged, emits": lambda: functional.attention(query, key, value, paging=paging, out=out, emit=THRESHOLD).output,
        "paged, edited": lambda: functional.attention(query, key, value, paging=paging, out=out, edit=edit).output,
    }
    if vllm is not None and key.shape[2] % 32 == 0:
        found["vLLM"] = vllm_call(operands, vllm)
    return found, edited_by_rows(operands, source.outliers)


def edited_by_rows(operands: Operands, outliers: Outliers) -> Tensor:
    """The edited output ``[T, H, Dv]`` by the strided op, one sequence at a time."""
    from attnrb import functional

    outputs = []
    for span, (keys, values) in zip(operands.spans(), operands.rows, strict=True):
        query = operands.query[span].transpose(0, 1)[None]
        own = Outliers(*(each[span].transpose(0, 1)[None].contiguous() for each in outliers))
        edited = functional.attention(query, keys, values, edit=Edit(own, torch.full((HEADS,), GAIN)))
        outputs.append(edited.output[0].transpose(0, 1))
    return torch.cat(outputs)


def vllm_call(operands: Operands, vllm: Any) -> Callable[[], Tensor]:
    """VLLM's op on the same rows, packed by vLLM's writer beforehand."""
    operations, choose = vllm
    query, paging, block_rows = operands.query, operands.paging, operands.key.shape[2]
    isa = choose(query.dtype, block_rows, WIDTH)
    blocks = operands.key.shape[0]
    cache = torch.zeros(blocks, KEY_HEADS, 2 * block_rows, WIDTH, dtype=query.dtype)
    keys, values = cache.chunk(2, dim=2)
    written = [torch.cat([each[which][0].transpose(0, 1) for each in operands.rows]).contiguous() for which in (0, 1)]
    operations.cpu_attn_reshape_and_cache(*written, keys, values, operands.slots, isa)
    plan = operations.cpu_attn_get_scheduler_metadata(
        num_reqs=len(operands.rows),
        num_heads=HEADS,
        num_kv_heads=KEY_HEADS,
        head_dim=WIDTH,
        seq_lens=paging.seq_lens,
        dtype=query.dtype,
        query_start_loc=paging.query_starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    out = torch.zeros_like(query)

    def call() -> Tensor:
        operations.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=paging.query_starts,
            seq_lens=paging.seq_lens,
            scale=WIDTH**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=paging.block_table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )
        return out

    return call


def find_vllm() -> Any:
    """VLLM's ops and how it chooses a layout, or None where it is not installed."""
    try:
        from vllm import _custom_ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return None
    current_platform.import_kernels()
    return _custom_ops, _get_attn_isa


def wrong(calls: dict[str, Callable[[], Tensor]], edited: Tensor) -> str | None:
    """The contender whose output is not the strided op's."""
    plain = calls["strided"]().float()
    bound = 0.02 if edited.dtype != torch.float32 else 1e-4
    for name, call in calls.items():
        # Strengthening all of a row multiplies it, and its error, by 1 + GAIN at most.
        expected, most = (edited.float(), bound * (1 + GAIN)) if name == "paged, edited" else (plain, bound)
        if float((call().float() - expected).abs().max()) > most:
            return name
    return None


def line(name: str, times: dict[str, Times]) -> str:
    parts = [f"{contender} {each.median * 1e3:8.3f} ms" for contender, each in times.items()]
    ratios = [f"paged x strided {times['paged'].median / times['strided'].median:.2f}"]
    if "vLLM" in times:
        ratios += [
            f"{each} x vLLM {times[each].median / times['vLLM'].median:.2f}" for each in ("paged", "paged, edited")
        ]
    return f"{name:41} " + "  ".join(parts + ratios)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = option_parser(__doc__, quick="an eighth of the keys and fewer rounds", seconds=(3.0, "a case"))
    parser.add_argument("--case", action="append", metavar="PART", help="only cases whose name contains this")
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="default: the first two"
    )
    parser.add_argument("--block", type=int, default=128, help="rows of a block (default: 128, as vLLM has them)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    figures = Figures(options)
    vllm = find_vllm()
    if vllm is None:
        print("vLLM is not installed: its op is left out")
    results: dict[str, Any] = {}
    for dtype in options.dtype or ["float32", "bfloat16"]:
        for name, sequences in CASES.items():
            if options.case and not any(part in name for part in options.case):
                continue
            if options.quick:
                sequences = [(-(-queries // 8), -(-keys // 8)) for queries, keys in sequences]
            calls, edited = contenders(prepare(sequences, getattr(torch, dtype), options.block), vllm)
            failed = wrong(calls, edited)
            if failed is not None:
                print(f"WRONG RESULT, not timed: {failed} in {name}, {dtype}", file=sys.stderr)
                return 1
            times = interleaved(calls, seconds=options.seconds / (10 if options.quick else 1))
            print(line(f"{dtype} {name}", times), flush=True)
            results.setdefault(dtype, {})[name] = {contender: vars(each) for contender, each in times.items()}
    figures.store(block_rows=options.block, cases=results)
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
