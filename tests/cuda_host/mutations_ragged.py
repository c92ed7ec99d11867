"""The faults that mutate.py plants in what ragged sequences and keys in blocks add."""

from __future__ import annotations

from fault import Fault

RAGGED: list[Fault] = [
    Fault(
        "a block of keys is that of another sequence",
        "kernels/keys.h",
        "table_(p.blocks.table + sequence * p.blocks.stride)",
        "table_(p.blocks.table + 0 * sequence * p.blocks.stride)",
        unit="ragged_float32.cu",
    ),
    Fault(
        "rows of a block begin with its second",
        "kernels/keys.h",
        "row = uint32_t(key) - block * blocks_.rows;",
        "row = uint32_t(key) - block * blocks_.rows + (block > 0);",
        unit="ragged_float32.cu",
    ),
    Fault(
        "the factor that divides by rows is one too small",
        "plan.cpp",
        "((uint64_t(1) << blocks.shift) + blocks.rows - 1) / blocks.rows",
        "((uint64_t(1) << blocks.shift) - 1) / blocks.rows",
        unit="plan.cpp",
    ),
    Fault(
        "a tile fewer than there may be",
        "plan.cpp",
        "p.row_tiles = p.rows / kTileRows + shape.batch;",
        "p.row_tiles = p.rows / kTileRows + shape.batch - 1;",
        unit="plan.cpp",
    ),
    Fault(
        "tiles of a sequence begin one early",
        "kernels/sequences.h",
        "p.group * p.problem.shape.query_starts[sequence] / kTileRows + sequence",
        "p.group * p.problem.shape.query_starts[sequence] / kTileRows + sequence / 2",
        unit="ragged_float32.cu",
    ),
    Fault(
        "queries count from the first of their sequence",
        "kernels/sequences.h",
        "int64_t first_query(const AttentionParameters& p) { return known(p)[1]; }",
        "int64_t first_query(const AttentionParameters& p) { return 0 * known(p)[1]; }",
        unit="ragged_float32.cu",
    ),
    Fault(
        "gains of the first sequence for all",
        "kernels/sequences.h",
        "p.problem.edit.gain + batch * p.problem.edit.gain_stride",
        "p.problem.edit.gain + 0 * batch * p.problem.edit.gain_stride",
        unit="ragged_float32.cu",
    ),
    Fault(
        "merged rows are looked for in the sequence before",
        "kernels/sequences.h",
        "if (p.problem.shape.query_starts[middle] <= query)",
        "if (p.problem.shape.query_starts[middle] < query)",
        unit="ragged_float32.cu",
    ),
    Fault(
        "rows of a skipped sequence are written",
        "kernels/ragged.h",
        "if (!broken && p.skipped == Skipped::untouched) return;",
        "if (false) return;",
        unit="ragged_float32.cu",
    ),
    Fault(
        "a block beyond the pool is taken",
        "kernels/tables.h",
        "block < 0 || block >= p.blocks",
        "block < 0 || block > p.blocks",
        unit="blocks.cu",
    ),
    Fault(
        "the last block of a sequence is not looked at",
        "kernels/tables.h",
        "(length + p.block_rows - 1) / p.block_rows;",
        "length / p.block_rows;",
        unit="blocks.cu",
    ),
    Fault(
        "starts that descend are taken",
        "kernels/tables.h",
        "wrong = wrong || start < before ||",
        "wrong = wrong || start < 0 ||",
        unit="blocks.cu",
    ),
    Fault(
        "a slot behind the last is written",
        "kernels/write_keys.h",
        "slot >= p.blocks * p.block_rows",
        "slot > p.blocks * p.block_rows",
        unit="blocks.cu",
    ),
]
