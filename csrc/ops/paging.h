// Keys and values in blocks: the tables of a call, checked before anything that they lead to is read. A device that can
// look at numbers in tensors has a HostPaging.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "ops/checks.h"
#include "ops/options.h"

namespace attnrb::ops {

inline const Tensor& required(const char* name, const OptionalTensor& tensor) {
  if (!tensor) refuse(name, "expected a tensor where block_table, query_starts or seq_lens is given, got None");
  return *tensor;
}

// int32 or int64 [count].
inline void check_numbers(const Operand& operand, int64_t count, const char* axes, const Operand& reference) {
  check_shape(operand, {count}, axes);
  if (operand.dtype != dtype_codes().int32) check_dtype(operand, dtype_codes().int64);
  check_device(operand, reference);
}

// The numbers of such an operand, `stride` apart from `data` on.
inline std::vector<int64_t> numbers_at(const void* data, const Operand& operand, int64_t stride) {
  std::vector<int64_t> numbers(static_cast<size_t>(operand.sizes[0]));
  for (size_t i = 0; i < numbers.size(); ++i) {
    const int64_t at = int64_t(i) * stride;
    numbers[i] = operand.dtype == dtype_codes().int64 ? static_cast<const int64_t*>(data)[at]
                                                      : int64_t(static_cast<const int32_t*>(data)[at]);
  }
  return numbers;
}

inline void check_columns(const Operand& operand) {
  const int64_t last = operand.rank - 1;
  if (operand.sizes[last] > 1 && operand.strides[last] != 1)
    refuse(operand.name, "expected a last axis whose elements follow each other, got a stride of ",
           operand.strides[last]);
}

// query [T, H, D], key [blocks, Hk, P, D], value [blocks, Hk, P, Dv]: all sizes but those of the sequences.
inline Shape check_pools(const Operand& query, const Operand& key, const Operand& value) {
  check_rank(query, 3, "[T, H, D]");
  check_rank(key, 4, "[blocks, Hk, P, D]");
  check_rank(value, 4, "[blocks, Hk, P, Dv]");
  check_companion(key, query);
  check_companion(value, query);
  Shape shape;
  shape.queries = query.sizes[0];
  shape.heads = query.sizes[1];
  shape.width = query.sizes[2];
  shape.key_heads = key.sizes[1];
  shape.value_width = value.sizes[3];
  if (shape.width < 1) refuse("query", "expected a width D of at least 1, got ", shape_text(query));
  if (key.sizes[3] != shape.width)
    refuse("key", "expected the width of query, ", shape.width, ", got ", shape_text(key));
  if (shape.key_heads < 1 || key.sizes[2] < 1)
    refuse("key", "expected at least one head and blocks of at least one row, got ", shape_text(key));
  if (key.sizes[2] > std::numeric_limits<int32_t>::max())
    refuse("key", "expected blocks of fewer rows, got ", shape_text(key));
  if (shape.heads % shape.key_heads != 0)
    refuse("query", "expected a number of heads H that is a multiple of Hk = ", shape.key_heads, " of key, got ",
           shape.heads);
  if (!std::equal(key.sizes, key.sizes + 3, value.sizes))
    refuse("value", "expected [blocks, Hk, P] of key, ", shape_text(key.sizes, 3), ", then Dv, got ",
           shape_text(value));
  check_columns(key);
  check_columns(value);
  return shape;
}

// The tables of a call, their sizes checked. What stands in them is for others to read.
struct PagingTables {
  Shape shape;  // but for the keys
  Operand table, starts, lengths;
  int64_t block_rows, blocks;

  PagingTables(const PagingOptions& given, const Operand& query, const Operand& key, const Operand& value)
      : shape(check_pools(query, key, value)),
        table("block_table", required("block_table", given.block_table)),
        starts("query_starts", required("query_starts", given.query_starts)),
        lengths("seq_lens", required("seq_lens", given.seq_lens)),
        block_rows(key.sizes[2]),
        blocks(key.sizes[0]) {
    check_rank(lengths, 1, "[B]");
    shape.batch = lengths.sizes[0];
    check_rank(table, 2, "[B, W]");
    check_shape(table, {shape.batch, table.sizes[1]}, "[B, W]");
    check_dtype(table, dtype_codes().int32);
    check_device(table, query);
    check_numbers(lengths, shape.batch, "[B]", query);
    check_numbers(starts, shape.batch + 1, "[B + 1]", query);
  }

  // Keys that a table has room for.
  int64_t room() const { return std::min(table.sizes[1], kMostKeys / block_rows) * block_rows; }

  KeyRows rows(const Operand& pool, const int32_t* row_blocks) const {
    KeyRows rows = view_of(pool);
    rows.strides[3] = 1;  // of one column too
    rows.table = row_blocks;
    rows.table_stride = table.sizes[1];
    rows.block_rows = uint32_t(block_rows);
    return rows;
  }

 private:
  // Slots travel as int32, and a block of keys may be counted behind the last.
  static constexpr int64_t kMostKeys = (int64_t(1) << 31) - (int64_t(1) << 16);
};

// Refuses numbers that break the rules, on the host; `row_blocks` is the table, contiguous.
inline void check_tables(const PagingTables& tables, const std::vector<int64_t>& starts,
                         const std::vector<int64_t>& lengths, const int32_t* row_blocks) {
  const int64_t most = tables.room(), queries = tables.shape.queries;
  if (starts.front() != 0 || starts.back() != queries)
    refuse("query_starts", "expected 0 first and T = ", queries, " last, got ", starts.front(), " and ", starts.back());
  for (size_t b = 0; b < lengths.size(); ++b) {
    const int64_t first = starts[b], last = starts[b + 1];
    if (last < first || last > queries)
      refuse("query_starts", "expected ascending numbers up to T = ", queries, ", got ", last, " after ", first);
    if (lengths[b] < 0 || lengths[b] > most)
      refuse("seq_lens", "expected numbers from 0 to the W P = ", most, " that block_table has room for, got ",
             lengths[b], " for sequence ", b);
    if (lengths[b] > 0 && last - first > lengths[b])
      refuse("seq_lens", "expected at least the queries of each sequence, got ", lengths[b], " for the ", last - first,
             " of sequence ", b);
  }
  const uint32_t bound = uint32_t(std::min(tables.blocks, int64_t(std::numeric_limits<int32_t>::max())));
  for (size_t b = 0; b < lengths.size(); ++b) {
    const int32_t* row = row_blocks + int64_t(b) * tables.table.sizes[1];
    const int64_t needed = (lengths[b] + tables.block_rows - 1) / tables.block_rows;
    bool inside = true;
    for (int64_t j = 0; j < needed; ++j) inside &= uint32_t(row[j]) < bound;  // negative ones are large
    if (inside) continue;
    for (int64_t j = 0; j < needed; ++j)
      if (uint32_t(row[j]) >= bound)
        refuse("block_table", "expected numbers from 0 to ", tables.blocks - 1, ", got ", row[j], " for block ", j,
               " of sequence ", b);
  }
}

// The tables of a call on the host, checked. `shape` and the offsets lead into it.
class HostPaging {
 public:
  HostPaging(const PagingOptions& given, const Operand& query, const Operand& key, const Operand& value)
      : tables(given, query, key, value), shape(tables.shape) {
    lengths_ = numbers_at(tables.lengths.data(), tables.lengths, tables.lengths.strides[0]);
    starts_ = numbers_at(tables.starts.data(), tables.starts, tables.starts.strides[0]);
    blocks_ = contiguous_data<int32_t>(tables.table, *given.block_table, dtype_codes().int32, table_copy_);
    check_tables(tables, starts_, lengths_, blocks_);
    for (size_t b = 0; b < lengths_.size(); ++b) {
      shape.keys = std::max(shape.keys, lengths_[b]);
      offsets_.push_back(lengths_[b] - starts_[b + 1]);
    }
    shape.query_starts = starts_.data();
    shape.key_counts = lengths_.data();
  }
  HostPaging(const HostPaging&) = delete;
  HostPaging& operator=(const HostPaging&) = delete;

  const PagingTables tables;
  Shape shape;

  int64_t room() const { return tables.room(); }
  const int64_t* query_offsets() const { return offsets_.data(); }
  KeyRows rows(const Operand& pool) const { return tables.rows(pool, blocks_); }

  // Calls visit(first, count) for the queries of each sequence that is skipped.
  template <class Visit>
  void each_skipped(Visit&& visit) const {
    for (size_t b = 0; b < lengths_.size(); ++b)
      if (lengths_[b] == 0 && starts_[b + 1] > starts_[b]) visit(starts_[b], starts_[b + 1] - starts_[b]);
  }

 private:
  const int32_t* blocks_ = nullptr;
  OptionalTensor table_copy_;
  std::vector<int64_t> starts_, lengths_, offsets_;
};

}  // namespace attnrb::ops
