// The gradient of re-balancing weights in memory; the formulas stand in csrc/core/kernels/elementwise.h. A warp for a
// row, in double precision as on the CPU: what is read and written bounds it.
#pragma once

#include "elementwise.h"

namespace attnrb::cuda {

ATTNRB_DEVICE double warp_sum(double x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads)
    rebalance_gradient_kernel(ATTNRB_PARAMETERS RebalanceGradientParameters p) {
  using U = Unit<T>;
  const RebalanceGradientProblem& problem = p.problem;
  const Shape& shape = problem.shape;
  const int64_t row = block_index() * kWarps + thread_index() / 32, keys = shape.keys;
  if (row >= shape.batch * shape.heads * shape.queries) return;
  const int64_t query = row % shape.queries, head = row / shape.queries % shape.heads,
                batch = row / shape.queries / shape.heads;
  const auto start = [&](const View& view) {
    return batch * view.strides[0] + head * view.strides[1] + query * view.strides[2];
  };
  const T* weights = static_cast<const T*>(problem.weights.data) + start(problem.weights);
  const T* upstream = static_cast<const T*>(problem.grad_output.data) + start(problem.grad_output);
  const bool* mask = static_cast<const bool*>(problem.mask.data) + start(problem.mask);
  const int64_t weight_stride = problem.weights.strides[3], upstream_stride = problem.grad_output.strides[3],
                mask_stride = problem.mask.strides[3];
  T* out = static_cast<T*>(problem.grad_weights) + row * keys;
  const float strength = 1.0f + problem.gain[head * p.gain_stride];
  const int64_t first = thread_index() % 32 * U::size;

  bool found = false;
  double sum = 0.0, along = 0.0;
  for (int64_t j = first; j < keys; j += 32 * U::size) {
    const U dy = load_unit(upstream, j, upstream_stride, keys, p.aligned);
    U w{};
    if (problem.normalize) w = load_unit(weights, j, weight_stride, keys, p.aligned);
#pragma unroll
    for (int i = 0; i < U::size; ++i) {
      if (j + i >= keys) continue;
      found = found || widen(dy.element[i]) != 0.0f;
      if (!problem.normalize) continue;
      const double boosted = double(mask[(j + i) * mask_stride] ? strength : 1.0f) * double(widen(w.element[i]));
      sum += boosted;
      along += boosted * double(widen(dy.element[i]));
    }
  }
  // A row whose gradient is zero is left out, whatever its weights hold.
  const bool active = any(found);
  double scale = 1.0, mean = 0.0, gain = 0.0;
  if (problem.normalize) {
    sum = warp_sum(sum);
    along = warp_sum(along);
    if (sum != 0.0) scale = 1.0 / sum, mean = along / sum;
  }
  for (int64_t j = first; j < keys; j += 32 * U::size) {
    U unit{};
    if (active) {
      const U dy = load_unit(upstream, j, upstream_stride, keys, p.aligned);
      const U w = load_unit(weights, j, weight_stride, keys, p.aligned);
#pragma unroll
      for (int i = 0; i < U::size; ++i) {
        if (j + i >= keys) continue;
        const bool marked = mask[(j + i) * mask_stride];
        const double error = (double(widen(dy.element[i])) - mean) * scale;
        if (marked) gain += error * double(widen(w.element[i]));
        unit.element[i] = narrow<T>(float(error * double(marked ? strength : 1.0f)));
      }
    }
    if (p.aligned) {
      *reinterpret_cast<U*>(out + j) = unit;
      continue;
    }
#pragma unroll
    for (int i = 0; i < U::size; ++i)
      if (j + i < keys) out[j + i] = unit.element[i];
  }
  gain = warp_sum(gain);
  if (thread_index() % 32 == 0) problem.gain_rows[row] = gain;
}

// The gradient of a head's gain: a block for each, which adds its rows in one order.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads) gain_sums_kernel(ATTNRB_PARAMETERS RebalanceGradientParameters p) {
  const Shape& shape = p.problem.shape;
  const int64_t head = block_index();
  double sum = 0.0;
  for (int64_t batch = 0; batch < shape.batch; ++batch) {
    const double* rows = p.problem.gain_rows + (batch * shape.heads + head) * shape.queries;
    for (int64_t query = thread_index(); query < shape.queries; query += Threads) sum += rows[query];
  }
  double* sums = reinterpret_cast<double*>(shared_memory());
  sums[thread_index()] = sum;
  block_sync();
  if (thread_index() != 0) return;
  for (int i = 1; i < Threads; ++i) sum += sums[i];
  p.problem.grad_gain[head] = float(sum);
}

}  // namespace attnrb::cuda
