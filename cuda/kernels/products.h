// Products of rows in shared memory with rows in shared memory: scores, and gradients of weights.
#pragma once

#include "fragments.h"

namespace attnrb::cuda {

template <int Tiles>
ATTNRB_DEVICE void clear(float (&c)[Tiles][4]) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
}

// c [16, 8 Tiles] += sixteen rows times as many others, `columns` wide; rows of both lie `stride` elements apart.
template <class T, int Tiles>
ATTNRB_DEVICE void multiply_rows(float (&c)[Tiles][4], const T* sixteen, const T* others, int stride, int columns) {
  constexpr int kUnit = 16 / int(sizeof(T));
  const int lane = thread_index() % 32;
  const T* left = sixteen + lane % 16 * stride + lane / 16 * kUnit;
  const T* right = others + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * kUnit;
  for (int column = 0; column < columns; column += 2 * kUnit) {
    uint32_t a[4];
    load_matrices(a, left + column);
#pragma unroll
    for (int n = 0; n < Tiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, right + n * 8 * stride + column);
      Engine<T>::multiply(c[n], a, b[0], b[1]);
      Engine<T>::multiply(c[n + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace attnrb::cuda
