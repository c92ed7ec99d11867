// Rows of an operand in shared memory.
//
// Note: [Tiles in shared memory]
// The eight rows of 16 bytes which ldmatrix reads at a time have to lie in different banks. A tile's rows are padded
// with zeros to whole steps of 32 bytes and then kept 16 bytes further apart, so that the distance of two rows is an
// odd number of 16-byte units. Queries and keys whose rows have whole 128 bytes need no room for that (RowLayout): unit
// u of row r stands where unit u ^ (r % 8) would. Two blocks of rows of 256 bytes then fit a multiprocessor with 100
// KB. What the operand does not hold is zero, not garbage: zero times NaN is NaN.
#pragma once

#include "device.h"
#include "parameters.h"

namespace attnrb::cuda {

// Of padded rows.
template <class T>
ATTNRB_DEVICE int row_stride(int columns) {
  return columns + 16 / int(sizeof(T));
}

// Copies `count` rows, `columns` of them wide, from where row(r) points; null: a row of zeros. Aligned operands are
// copied asynchronously.
template <class T, int Threads, class Row>
ATTNRB_DEVICE void load_tile(T* tile, int count, int columns, const Operand& operand, int first_column, Row&& row,
                             RowLayout layout) {
  constexpr int kUnit = 16 / int(sizeof(T));
  const int units = columns / kUnit, left = operand.width - first_column;
  // A power of two of neighbouring threads takes a row.
  int shift = 1;
  while (shift < 5 && (1 << shift) < units) ++shift;
  for (int r = thread_index() >> shift; r < count; r += Threads >> shift) {
    const T* source = row(r);
    for (int unit = thread_index() & ((1 << shift) - 1); unit < units; unit += 1 << shift) {
      const int column = unit * kUnit;
      T* target = tile + r * layout.stride + (unit ^ (r & layout.turned)) * kUnit;
      const bool valid = source != nullptr && column < left;
      if (operand.aligned) {
        const T* from = valid ? source + first_column + column : static_cast<const T*>(operand.data);
        copy_async(target, from, valid);
        continue;
      }
      int64_t at = int64_t(first_column + column) * operand.strides[3];
#pragma unroll
      for (int i = 0; i < kUnit; ++i, at += operand.strides[3])
        target[i] = valid && column + i < left ? source[at] : T{};
    }
  }
}
template <class T, int Threads, class Row>
ATTNRB_DEVICE void load_tile(T* tile, int count, int columns, const Operand& operand, int first_column, Row&& row) {
  load_tile<T, Threads>(tile, count, columns, operand, first_column, row, {row_stride<T>(columns), 0});
}

// The same of `Rows` rows of a key head from key `first` on, of which the sequence holds `left`, at least one. A thread
// keeps its column where rows are no longer than `Units` units of 16 bytes, so that a copy of a whole tile costs no
// more than to move on both addresses.
template <class T, int Threads, int Rows, int Units, class KeyRows>
ATTNRB_DEVICE void load_keys_of_tile(T* tile, int columns, const Operand& operand, int first_column,
                                     const KeyRows& keys, int64_t first, int64_t left, RowLayout layout) {
  constexpr int kUnit = 16 / int(sizeof(T)), kStep = Threads / Units, kCopies = Rows / kStep;
  static_assert(Threads % Units == 0 && Rows % kStep == 0, "every thread has as many rows");
  static_assert(kStep % 8 == 0, "the rows of a thread are turned alike");
  if (!operand.aligned) {
    load_tile<T, Threads>(
        tile, Rows, columns, operand, first_column,
        [&](int r) -> const T* { return r < left ? keys.row(first + r) : nullptr; }, layout);
    return;
  }
  const int row = thread_index() / Units, units = columns / kUnit, stride = layout.stride;
  for (int unit = thread_index() % Units; unit < units; unit += Units) {
    const int from = first_column + unit * kUnit;
    T* first_target = tile + row * stride + (unit ^ (row & layout.turned)) * kUnit;
    const auto target = [&](int i) { return first_target + i * (kStep * stride); };
    // The last unit may be padding.
    const bool held = from < operand.width;
    if (held && left >= Rows) {
      keys.template each<kCopies, kStep>(first + row,
                                         [&](int i, const T* at) { copy_async(target(i), at + from, true); });
      continue;
    }
    for (int i = 0; i < kCopies; ++i) {
      const bool valid = held && row + i * kStep < left;
      copy_async(target(i), keys.row(valid ? first + row + i * kStep : first) + (valid ? from : 0), valid);
    }
  }
}

}  // namespace attnrb::cuda
