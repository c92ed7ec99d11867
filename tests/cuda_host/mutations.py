"""The faults that mutate.py plants."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str  # under cuda/
    old: str  # occurs there once
    new: str
    unit: str = "float32.cu"  # the source in which it shows


MUTATIONS: list[Fault] = [
    Fault(
        "no barrier before the scores are computed",
        "kernels/attention.h",
        "    wait_for_copies();\n    block_sync();\n    if (task != Task::softmax) load_values(tile);",
        "    wait_for_copies();\n    if (task != Task::softmax) load_values(tile);",
    ),
    Fault(
        "no barrier before the values are used",
        "kernels/attention.h",
        "    wait_for_copies();\n    block_sync();\n    if (tile + 1 < last_tile) load_keys(tile + 1, 0);",
        "    wait_for_copies();\n    if (tile + 1 < last_tile) load_keys(tile + 1, 0);",
    ),
    Fault(
        "no wait for the values",
        "kernels/attention.h",
        "    wait_for_copies();\n    block_sync();\n    if (tile + 1 < last_tile) load_keys(tile + 1, 0);",
        "    block_sync();\n    if (tile + 1 < last_tile) load_keys(tile + 1, 0);",
    ),
    Fault(
        "no barrier in the second pass",
        "kernels/attention.h",
        "      wait_for_copies();\n      block_sync();\n      if (next < last_tile)",
        "      wait_for_copies();\n      if (next < last_tile)",
    ),
    Fault(
        "no barrier between queries of received attention",
        "kernels/received.h",
        "      wait_for_copies();\n      block_sync();\n",
        "      wait_for_copies();\n",
    ),
    Fault(
        "no barrier before column sums are joined",
        "kernels/received.h",
        "    block_sync();\n    const int key = thread_index();",
        "    const int key = thread_index();",
    ),
    Fault(
        "the next tile of values, not this one",
        "kernels/attention.h",
        "load_values(tile);",
        "load_values(tile + 1);",
    ),
    Fault(
        "the last tile of keys is left out",
        "kernels/attention.h",
        "high = int((interval.high + kKeys - 1) / kKeys);",
        "high = int(interval.high / kKeys);",
    ),
    Fault(
        "a row of queries beyond the last is read",
        "kernels/attention.h",
        "      if (row >= p.rows) return nullptr;",
        "      if (row > p.rows) return nullptr;",
    ),
    Fault(
        "a key beyond the last is read",
        "kernels/attention.h",
        "return r < left ? base + (first + r) * operand.strides[2] : nullptr;",
        "return r <= left ? base + (first + r) * operand.strides[2] : nullptr;",
    ),
    Fault(
        "the tail of a row is not cut",
        "kernels/tile.h",
        "valid && column + i < left ?",
        "valid && column + i <= left ?",
    ),
    Fault(
        "keys' fragments from the wrong lanes",
        "kernels/attention.h",
        "(lane / 16 * 8 + lane % 8) * query_stride + lane / 8 % 2 * Tiles::unit",
        "(lane / 8 % 2 * 8 + lane % 8) * query_stride + lane / 16 * Tiles::unit",
    ),
    Fault(
        "values' fragments from the wrong lanes",
        "kernels/fragments.h",
        "(step * 16 + lane % 16) * stride + column + lane / 16 * 8",
        "(step * 16 + lane / 16 * 8 + lane % 8) * stride + column + lane / 8 % 2 * 8",
        "bfloat16.cu",
    ),
    Fault(
        "float32 probabilities in the order of 16-bit ones",
        "kernels/fragments.h",
        "    a[1] = bit_cast<uint32_t>(p[step][2]);\n    a[2] = bit_cast<uint32_t>(p[step][1]);",
        "    a[1] = bit_cast<uint32_t>(p[step][1]);\n    a[2] = bit_cast<uint32_t>(p[step][2]);",
    ),
    Fault(
        "one of six tf32 products is missing",
        "kernels/fragments.h",
        "    multiply_tf32(sum, high, b_middle[0], b_middle[1]);\n",
        "",
    ),
    Fault(
        "the maximum of half a row",
        "kernels/rows.h",
        "  x = fmaxf(x, shuffle_xor(x, 1));\n  return fmaxf(x, shuffle_xor(x, 2));",
        "  return fmaxf(x, shuffle_xor(x, 1));",
    ),
    Fault(
        "sums of values are not rescaled",
        "kernels/attention.h",
        "sums[n][e] *= factor[e / 2];",
        "sums[n][e] *= 1.0f;",
    ),
    Fault(
        "the second row's factor for the first",
        "kernels/attention.h",
        "sums[n][e] *= factor[e / 2];",
        "sums[n][e] *= factor[1 - e / 2];",
    ),
    Fault(
        "tiles are marked too rarely",
        "kernels/attention.h",
        "rows.max[i] + log2f(sum) + slack",
        "rows.max[i] + log2f(sum) + 1.0f + slack",
    ),
    Fault(
        "the query's own key counts",
        "kernels/attention.h",
        " && first + 8 * n + column + e != own",
        "",
    ),
    Fault(
        "outliers of one lane overwrite another's",
        "kernels/attention.h",
        "count_bits(all & ((uint64_t(1) << key) - 1))",
        "count_bits(mine & ((uint64_t(1) << key) - 1))",
    ),
    Fault(
        "what lies behind a row's outliers is left",
        "kernels/attention.h",
        "for (int64_t c = count + lane % 4; c < capacity; c += 4) found[i][c] = -1;",
        "for (int64_t c = count + 4; c < capacity; c += 4) found[i][c] = -1;",
    ),
    Fault(
        "strengthened before it joined the row's sum",
        "kernels/attention.h",
        "          s[n][2 * i + e] *= 1.0f + gain;",
        "          s[n][2 * i + e] *= 1.0f + gain, rows.sum[i] += gain * s[n][2 * i + e];",
    ),
    Fault(
        "an outlier of an earlier tile stops the list",
        "kernels/rows.h",
        "      if (position >= first) bits |=",
        "      if (position < first) return bits;\n      bits |=",
    ),
    Fault(
        "split sums are merged without their references",
        "kernels/merge.h",
        "    sum += states[4 * s + 1] * factor;",
        "    sum += states[4 * s + 1];",
    ),
    Fault(
        "candidates of splits are not filtered",
        "kernels/merge.h",
        "c + lane < candidates && p.partials.candidate_scores[at] > threshold",
        "c + lane < candidates",
    ),
    Fault(
        "a NaN value reaches rows that do not see it",
        "kernels/attention.h",
        "if (!partial || all_finite(values)) {",
        "if (true) {",
    ),
    Fault(
        "received attention counts rows behind the last",
        "kernels/received.h",
        "const bool shown = rows.valid[i] && (!partial",
        "const bool shown = (!partial",
    ),
    Fault(
        "a sum over half a warp",
        "kernels/merge.h",
        "  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);",
        "  for (int mask = 8; mask > 0; mask /= 2) x += shuffle_xor(x, mask);",
    ),
    Fault(
        "a 32-bit row offset",
        "kernels/attention.h",
        "return r < left ? base + (first + r) * operand.strides[2] : nullptr;",
        "return r < left ? base + int32_t(uint32_t(first + r) * uint32_t(operand.strides[2])) : nullptr;",
    ),
    Fault(
        "a 32-bit column offset",
        "kernels/tile.h",
        "source[int64_t(first_column + column + i) * operand.strides[3]]",
        "source[int32_t(uint32_t(first_column + column + i) * uint32_t(operand.strides[3]))]",
    ),
    Fault(
        "a 32-bit offset into the mask",
        "kernels/rows.h",
        "mask[i][int64_t(key) * p.problem.visibility.mask_strides[3]]",
        "mask[i][int32_t(uint32_t(key) * uint32_t(p.problem.visibility.mask_strides[3]))]",
    ),
    Fault(
        "a 32-bit offset into the output",
        "kernels/attention.h",
        "place.query * problem.output_strides[2] + first_column;",
        "int32_t(uint32_t(place.query) * uint32_t(problem.output_strides[2])) + first_column;",
    ),
    Fault(
        "a 32-bit offset into weights",
        "kernels/elementwise.h",
        "row[(column + i) * stride]",
        "row[int32_t(uint32_t(column + i) * uint32_t(stride))]",
    ),
    Fault(
        "no barrier after the marks are joined",
        "kernels/attention.h",
        "word |= memory[32 * warp + thread_index() % 32];\n    block_sync();\n",
        "word |= memory[32 * warp + thread_index() % 32];\n",
    ),
    Fault(
        "marks of one tile where a bit stands for several",
        "kernels/attention.h",
        "    const int bit = tile >> shift;\n    if (thread_index()",
        "    const int bit = tile;\n    if (thread_index()",
    ),
    Fault(
        "every split adds the sink",
        "kernels/attention.h",
        "if (p.splits == 1 && rows.valid[i])",
        "if (rows.valid[i])",
    ),
    Fault(
        "a lane knows of its own visible keys only",
        "kernels/attention.h",
        "seen[i] = quad_sum(rows.seen[i] ? 1.0f : 0.0f) != 0.0f;",
        "seen[i] = rows.seen[i];",
    ),
    Fault(
        "the second slice of wide values is the first",
        "kernels/attention.h",
        "load_operand(p.value, p.value_columns, slice * Width, tile, 1)",
        "load_operand(p.value, p.value_columns, 0, tile, 1)",
    ),
    Fault(
        "the last warp's column sums are left out",
        "kernels/received.h",
        "    for (int w = 0; w < kWarps; ++w) {",
        "    for (int w = 0; w < kWarps - 1; ++w) {",
    ),
    Fault(
        "only the first 32 splits are merged",
        "kernels/merge.h",
        "  for (int s = lane; s < p.splits; s += 32) {\n    if (states",
        "  for (int s = lane; s < p.splits && s < 32; s += 32) {\n    if (states",
    ),
    Fault(
        "the gain of the first head for all",
        "kernels/attention.h",
        "boost.gain[row_place(p, key_head, first_row() + 8 * i).head * p.gain_stride]",
        "boost.gain[0]",
    ),
    Fault(
        "rows of a group stand in the wrong order",
        "kernels/rows.h",
        "return {query, int(key_head * p.group + (row - query * p.group))};",
        "return {query, int(key_head * p.group + p.group - 1 - (row - query * p.group))};",
    ),
    Fault(
        "softcap with a slightly wrong inner scale",
        "kernels/rows.h",
        "p.cap * tanhf(s[n][e] * p.inner)",
        "p.cap * tanhf(s[n][e] * p.inner * 0.99f)",
    ),
    Fault(
        "no barrier before the only stage of queries is filled again",
        "kernels/received.h",
        "      if (stages == 1) {\n        block_sync();\n",
        "      if (stages == 1) {\n",
    ),
    Fault(
        "normalised rows are divided by exact probabilities",
        "kernels/attention.h",
        "rows.boosted[i] += to_float(from_float<T>(s[n][2 * i + e])) - before;",
        "rows.boosted[i] += s[n][2 * i + e] - before;",
        "bfloat16.cu",
    ),
]
