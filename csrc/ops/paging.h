// Keys and values in blocks: the tables of a call, checked before anything that they lead to is read, and the op that
// writes into such blocks. Numbers in tensors are on the host.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/thread_pool.h"
#include "ops/checks.h"
#include "ops/options.h"

namespace attnrb::ops {

inline const Tensor& required(const char* name, const OptionalTensor& tensor) {
  if (!tensor) refuse(name, "expected a tensor where block_table, query_starts or seq_lens is given, got None");
  return *tensor;
}

// int32 or int64 [count], whatever its stride.
inline std::vector<int64_t> read_numbers(const Operand& operand, int64_t count, const char* axes,
                                         const Operand& reference) {
  check_shape(operand, {count}, axes);
  if (operand.dtype != dtype_codes().int32) check_dtype(operand, dtype_codes().int64);
  check_device(operand, reference);
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  const void* data = operand.data();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * operand.strides[0];
    numbers[size_t(i)] = operand.dtype == dtype_codes().int64 ? static_cast<const int64_t*>(data)[at]
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

// The tables of a call. `shape` and `offsets` lead into it.
class CheckedPaging {
 public:
  CheckedPaging(const PagingOptions& given, const Operand& query, const Operand& key, const Operand& value)
      : shape(check_pools(query, key, value)), block_rows_(key.sizes[2]) {
    const Operand table("block_table", required("block_table", given.block_table));
    const Operand starts("query_starts", required("query_starts", given.query_starts));
    const Operand lengths("seq_lens", required("seq_lens", given.seq_lens));
    check_rank(lengths, 1, "[B]");
    shape.batch = lengths.sizes[0];
    check_rank(table, 2, "[B, W]");
    check_shape(table, {shape.batch, table.sizes[1]}, "[B, W]");
    check_dtype(table, dtype_codes().int32);
    check_device(table, query);
    lengths_ = read_numbers(lengths, shape.batch, "[B]", query);
    starts_ = read_numbers(starts, shape.batch + 1, "[B + 1]", query);
    blocks_ = contiguous_data<int32_t>(table, *given.block_table, dtype_codes().int32, table_copy_);
    table_width_ = table.sizes[1];
    check_sequences();
    check_blocks(key.sizes[0]);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const size_t i = size_t(b);
      shape.keys = std::max(shape.keys, lengths_[i]);
      offsets_.push_back(lengths_[i] - (starts_[i + 1] - starts_[i]) - starts_[i]);
    }
    shape.query_starts = starts_.data();
    shape.key_counts = lengths_.data();
  }
  CheckedPaging(const CheckedPaging&) = delete;
  CheckedPaging& operator=(const CheckedPaging&) = delete;

  Shape shape;

  // Keys that a table has room for.
  int64_t room() const { return std::min(table_width_, kMostKeys / block_rows_) * block_rows_; }
  const int64_t* query_offsets() const { return offsets_.data(); }
  KeyRows rows(const Operand& pool) const {
    KeyRows rows = view_of(pool);
    rows.strides[3] = 1;  // of one column too
    rows.table = blocks_;
    rows.table_stride = table_width_;
    rows.block_rows = uint32_t(block_rows_);
    return rows;
  }

  // Calls visit(first, count) for the queries of each sequence that is skipped.
  template <class Visit>
  void each_skipped(Visit&& visit) const {
    for (size_t b = 0; b < lengths_.size(); ++b)
      if (lengths_[b] == 0 && starts_[b + 1] > starts_[b]) visit(starts_[b], starts_[b + 1] - starts_[b]);
  }

 private:
  // Slots travel as int32, and a block of keys may be counted behind the last.
  static constexpr int64_t kMostKeys = (int64_t(1) << 31) - (int64_t(1) << 16);

  void check_sequences() const {
    const int64_t most = room();
    if (starts_.front() != 0 || starts_.back() != shape.queries)
      refuse("query_starts", "expected 0 first and T = ", shape.queries, " last, got ", starts_.front(), " and ",
             starts_.back());
    for (size_t b = 0; b < lengths_.size(); ++b) {
      const int64_t first = starts_[b], last = starts_[b + 1];
      if (last < first || last > shape.queries)
        refuse("query_starts", "expected ascending numbers up to T = ", shape.queries, ", got ", last, " after ",
               first);
      if (lengths_[b] < 0 || lengths_[b] > most)
        refuse("seq_lens", "expected numbers from 0 to the W P = ", most, " that block_table has room for, got ",
               lengths_[b], " for sequence ", b);
      if (lengths_[b] > 0 && last - first > lengths_[b])
        refuse("seq_lens", "expected at least the queries of each sequence, got ", lengths_[b], " for the ",
               last - first, " of sequence ", b);
    }
  }

  void check_blocks(int64_t blocks) const {
    const uint32_t bound = uint32_t(std::min(blocks, int64_t(std::numeric_limits<int32_t>::max())));
    for (size_t b = 0; b < lengths_.size(); ++b) {
      const int32_t* row = blocks_ + int64_t(b) * table_width_;
      const int64_t needed = (lengths_[b] + block_rows_ - 1) / block_rows_;
      bool inside = true;
      for (int64_t j = 0; j < needed; ++j) inside &= uint32_t(row[j]) < bound;  // negative ones are large
      if (inside) continue;
      for (int64_t j = 0; j < needed; ++j)
        if (uint32_t(row[j]) >= bound)
          refuse("block_table", "expected numbers from 0 to ", blocks - 1, ", got ", row[j], " for block ", j,
                 " of sequence ", b);
    }
  }

  const int64_t block_rows_;
  int64_t table_width_ = 0;
  const int32_t* blocks_ = nullptr;
  OptionalTensor table_copy_;
  std::vector<int64_t> starts_, lengths_, offsets_;
};

}  // namespace attnrb::ops
