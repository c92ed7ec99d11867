// The two operations on weight matrices in memory: a warp for a row, 16 bytes of weights a lane where they are aligned.
#pragma once

#include "elementwise_parameters.h"
#include "merge.h"

namespace attnrb::cuda {

template <class T>
struct alignas(16) Unit {
  static constexpr int size = 16 / int(sizeof(T));
  T element[size];
};

template <class T>
ATTNRB_DEVICE Unit<T> load_unit(const T* row, int64_t column, int64_t stride, int64_t columns, bool aligned) {
  if (aligned) return *reinterpret_cast<const Unit<T>*>(row + column);
  Unit<T> unit{};
#pragma unroll
  for (int i = 0; i < Unit<T>::size; ++i)
    if (column + i < columns) unit.element[i] = row[(column + i) * stride];
  return unit;
}

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads) outlier_mask_kernel(ATTNRB_PARAMETERS OutlierMaskParameters p) {
  using U = Unit<T>;
  const Shape& shape = p.problem.shape;
  const int64_t row = block_index() * kWarps + thread_index() / 32, keys = shape.keys;
  if (row >= shape.batch * shape.heads * shape.queries) return;
  const int64_t query = row % shape.queries, head = row / shape.queries % shape.heads,
                batch = row / shape.queries / shape.heads;
  const int64_t* strides = p.problem.weights.strides;
  const T* weights =
      static_cast<const T*>(p.problem.weights.data) + batch * strides[0] + head * strides[1] + query * strides[2];
  bool* out = p.problem.mask + row * keys;
  const int64_t own = p.problem.query_offset + query;
  for (int64_t j = thread_index() % 32 * U::size; j < keys; j += 32 * U::size) {
    const U unit = load_unit(weights, j, strides[3], keys, p.aligned);
#pragma unroll
    for (int i = 0; i < U::size; ++i)
      if (j + i < keys) out[j + i] = widen(unit.element[i]) > p.bound && j + i != own;
  }
}

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads) rebalance_kernel(ATTNRB_PARAMETERS RebalanceParameters p) {
  using U = Unit<T>;
  const Shape& shape = p.problem.shape;
  const int64_t row = block_index() * kWarps + thread_index() / 32, keys = shape.keys;
  if (row >= shape.batch * shape.heads * shape.queries) return;
  const int64_t query = row % shape.queries, head = row / shape.queries % shape.heads,
                batch = row / shape.queries / shape.heads;
  const int64_t *strides = p.problem.weights.strides, *mask_strides = p.problem.mask.strides;
  const T* weights =
      static_cast<const T*>(p.problem.weights.data) + batch * strides[0] + head * strides[1] + query * strides[2];
  const bool* mask = static_cast<const bool*>(p.problem.mask.data) + batch * mask_strides[0] + head * mask_strides[1] +
                     query * mask_strides[2];
  T* out = static_cast<T*>(p.problem.output) + row * keys;
  const float gain = p.problem.gain == nullptr ? p.gain : p.problem.gain[head * p.gain_stride];
  const auto strengthened = [&](T weight, int64_t j) {
    return widen(weight) * (mask[j * mask_strides[3]] ? 1.0f + gain : 1.0f);
  };
  const int64_t first = thread_index() % 32 * U::size;
  float scale = 1.0f;
  if (p.problem.normalize) {
    float sum = 0.0f;
    for (int64_t j = first; j < keys; j += 32 * U::size) {
      const U unit = load_unit(weights, j, strides[3], keys, p.aligned);
#pragma unroll
      for (int i = 0; i < U::size; ++i)
        if (j + i < keys) sum += strengthened(unit.element[i], j + i);
    }
    sum = warp_sum(sum);
    // A row of zeros (a query that sees no key) stays one.
    if (sum != 0.0f) scale = 1.0f / sum;
  }
  for (int64_t j = first; j < keys; j += 32 * U::size) {
    U unit = load_unit(weights, j, strides[3], keys, p.aligned);
#pragma unroll
    for (int i = 0; i < U::size; ++i)
      if (j + i < keys) unit.element[i] = narrow<T>(strengthened(unit.element[i], j + i) * scale);
    if (p.aligned) {
      *reinterpret_cast<U*>(out + j) = unit;
      continue;
    }
#pragma unroll
    for (int i = 0; i < U::size; ++i)
      if (j + i < keys) out[j + i] = unit.element[i];
  }
}

}  // namespace attnrb::cuda
