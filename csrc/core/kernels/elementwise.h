// The two operations on weight matrices that the caller already holds: plain loops over rows.
#pragma once

#include "../problem.h"
#include "../thread_pool.h"
#include "math.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr int64_t kRowsPerTask = 64;

// Calls row(batch, head, query, index) for every row of [B, H, M], in parallel.
template <class RowFunction>
void for_each_row(const Shape& shape, const ThreadPool& pool, RowFunction&& row) {
  const int64_t rows = shape.batch * shape.heads * shape.queries;
  for_each_task(pool, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t, int64_t task) {
    const int64_t last = (task + 1) * kRowsPerTask < rows ? (task + 1) * kRowsPerTask : rows;
    for (int64_t index = task * kRowsPerTask; index < last; ++index)
      row(index / shape.queries / shape.heads, index / shape.queries % shape.heads, index % shape.queries, index);
  });
}

template <class T>
const T* row_of(const View& view, int64_t batch, int64_t head, int64_t query) {
  return static_cast<const T*>(view.data) + batch * view.strides[0] + head * view.strides[1] + query * view.strides[2];
}

template <class T>
void outlier_mask(const OutlierMaskProblem& problem, const ThreadPool& pool) {
  const int64_t keys = problem.shape.keys, stride = problem.weights.strides[3];
  const double threshold = problem.threshold;
  for_each_row(problem.shape, pool, [&](int64_t batch, int64_t head, int64_t query, int64_t index) {
    const T* weights = row_of<T>(problem.weights, batch, head, query);
    bool* out = problem.mask + index * keys;
    for (int64_t j = 0; j < keys; ++j) out[j] = double(to_float(weights[j * stride])) > threshold;
    const int64_t own = problem.query_offset + query;
    if (own >= 0 && own < keys) out[own] = false;
  });
}

template <class T>
void rebalance(const RebalanceProblem& problem, const ThreadPool& pool) {
  const int64_t keys = problem.shape.keys, stride = problem.weights.strides[3], mask_stride = problem.mask.strides[3];
  for_each_row(problem.shape, pool, [&](int64_t batch, int64_t head, int64_t query, int64_t index) {
    const T* weights = row_of<T>(problem.weights, batch, head, query);
    const bool* mask = row_of<bool>(problem.mask, batch, head, query);
    T* out = static_cast<T*>(problem.output) + index * keys;
    const float factor = 1.0f + problem.gain[head];
    const auto strengthened = [&](int64_t j) {
      return to_float(weights[j * stride]) * (mask[j * mask_stride] ? factor : 1.0f);
    };
    float scale = 1.0f;
    if (problem.normalize) {
      double sum = 0.0;
      for (int64_t j = 0; j < keys; ++j) sum += strengthened(j);
      // A row of zeros (a query that sees no key) stays one.
      if (sum != 0.0) scale = float(1.0 / sum);
    }
    for (int64_t j = 0; j < keys; ++j) out[j] = from_float<T>(strengthened(j) * scale);
  });
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
