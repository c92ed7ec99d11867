// Rows of an operand in shared memory.
//
// Note: [Tiles in shared memory]
// A tile's rows are padded with zeros to whole steps of 32 bytes and then kept 16 bytes further apart: the distance of
// two rows is an odd number of 16-byte units, so that the eight rows which ldmatrix reads at a time lie in different
// banks. What the operand does not hold is zero, not garbage: zero times NaN is NaN.
#pragma once

#include "device.h"
#include "parameters.h"

namespace attnrb::cuda {

template <class T>
ATTNRB_DEVICE int row_stride(int columns) {
  return columns + 16 / int(sizeof(T));
}

// Copies `count` rows, `columns` of them wide, from where row(r) points; null: a row of zeros. Aligned operands are
// copied asynchronously.
template <class T, int Threads, class Row>
ATTNRB_DEVICE void load_tile(T* tile, int count, int columns, const Operand& operand, int first_column, Row&& row) {
  constexpr int kUnit = 16 / int(sizeof(T));
  const int units = columns / kUnit, stride = row_stride<T>(columns), left = operand.width - first_column;
  // A power of two of neighbouring threads takes a row.
  int shift = 1;
  while (shift < 5 && (1 << shift) < units) ++shift;
  for (int r = thread_index() >> shift; r < count; r += Threads >> shift) {
    const T* source = row(r);
    for (int unit = thread_index() & ((1 << shift) - 1); unit < units; unit += 1 << shift) {
      const int column = unit * kUnit;
      T* target = tile + r * stride + column;
      const bool valid = source != nullptr && column < left;
      if (operand.aligned) {
        const T* from = valid ? source + first_column + column : static_cast<const T*>(operand.data);
        copy_async(target, from, valid);
        continue;
      }
      for (int i = 0; i < kUnit; ++i)
        target[i] = valid && column + i < left ? source[int64_t(first_column + column + i) * operand.strides[3]] : T{};
    }
  }
}

}  // namespace attnrb::cuda
