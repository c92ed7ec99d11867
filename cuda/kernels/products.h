// Products of rows in shared memory with rows in shared memory: scores, and gradients of weights.
#pragma once

#include "fragments.h"
#include "parameters.h"

namespace attnrb::cuda {

template <int Tiles>
ATTNRB_DEVICE void clear(float (&c)[Tiles][4]) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
}

// c [16, 8 Tiles] += sixteen rows times as many others, `columns` wide; both begin with a row whose number is a
// multiple of eight. A step has two units: the second is one further, or, which is the same, has another last bit.
// `Columns`: how many there mostly are, or 0.
template <class T, int Columns, int Tiles>
ATTNRB_DEVICE void multiply_rows(float (&c)[Tiles][4], const T* sixteen, const T* others, RowLayout layout,
                                 int columns) {
  constexpr int kUnit = 16 / int(sizeof(T));
  const int lane = thread_index() % 32, stride = layout.stride, turn = lane & layout.turned;
  const T* left = sixteen + lane % 16 * stride;
  const T* right = others + (lane / 16 * 8 + lane % 8) * stride;
  const int of_left = (lane / 16 ^ turn) * kUnit, of_right = (lane / 8 % 2 ^ turn) * kUnit;
  const auto step = [&](int column, int distance) {
    uint32_t a[4];
    load_matrices(a, left + (column ^ of_left));
#pragma unroll
    for (int n = 0; n < Tiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, right + n * 8 * distance + (column ^ of_right));
      Engine<T>::multiply(c[n], a, b[0], b[1]);
      Engine<T>::multiply(c[n + 1], a, b[2], b[3]);
    }
  };
  // Of common widths the compiler knows every distance.
  if (Columns > 0 && columns == Columns && stride == Columns) {
#pragma unroll
    for (int column = 0; column < Columns; column += 2 * kUnit) step(column, Columns);
  } else {
    for (int column = 0; column < columns; column += 2 * kUnit) step(column, stride);
  }
}

}  // namespace attnrb::cuda
