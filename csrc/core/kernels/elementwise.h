// The operations on weight matrices that the caller already holds, and a gradient: plain loops over rows.
#pragma once

#include "driver.h"
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

// With f = 1 + gain where mask and 1 elsewhere, w the weights, dy the gradient of the output and z the sum of a row of
// f·w, or 1 where rows are not divided (and in a row of zeros, which is not either):
//
//     dw_j = f_j e_j,   dgain = sum of w_j e_j where mask,   e_j = (dy_j - [divided] sum_k dy_k f_k w_k / z) / z
//
// A row whose dy is zero is left out, whatever its weights hold.
template <class T>
void rebalance_gradient(const RebalanceGradientProblem& problem, const ThreadPool& pool) {
  const Shape& shape = problem.shape;
  const int64_t keys = shape.keys, stride = problem.weights.strides[3], mask_stride = problem.mask.strides[3],
                upstream_stride = problem.grad_output.strides[3];
  for_each_row(shape, pool, [&](int64_t batch, int64_t head, int64_t query, int64_t index) {
    const T* weights = row_of<T>(problem.weights, batch, head, query);
    const T* upstream = row_of<T>(problem.grad_output, batch, head, query);
    const bool* mask = row_of<bool>(problem.mask, batch, head, query);
    T* out = static_cast<T*>(problem.grad_weights) + index * keys;
    double& gain_row = problem.gain_rows[index];
    gain_row = 0.0;
    bool any = false;
    for (int64_t j = 0; j < keys; ++j) any |= to_float(upstream[j * upstream_stride]) != 0.0f;
    if (!any) {
      for (int64_t j = 0; j < keys; ++j) out[j] = from_float<T>(0.0f);
      return;
    }
    const float strength = 1.0f + problem.gain[head];
    const auto factor = [&](int64_t j) { return mask[j * mask_stride] ? strength : 1.0f; };
    double scale = 1.0, mean = 0.0;
    if (problem.normalize) {
      double sum = 0.0, along = 0.0;
      for (int64_t j = 0; j < keys; ++j) {
        const double boosted = double(factor(j)) * to_float(weights[j * stride]);
        sum += boosted;
        along += boosted * to_float(upstream[j * upstream_stride]);
      }
      if (sum != 0.0) scale = 1.0 / sum, mean = along / sum;
    }
    for (int64_t j = 0; j < keys; ++j) {
      const double error = (to_float(upstream[j * upstream_stride]) - mean) * scale;
      if (mask[j * mask_stride]) gain_row += error * to_float(weights[j * stride]);
      out[j] = from_float<T>(float(error * factor(j)));
    }
  });
  // In one order, whatever the threads were.
  for (int64_t head = 0; head < shape.heads; ++head) {
    double sum = 0.0;
    for (int64_t batch = 0; batch < shape.batch; ++batch)
      for (int64_t query = 0; query < shape.queries; ++query)
        sum += problem.gain_rows[(batch * shape.heads + head) * shape.queries + query];
    problem.grad_gain[head] = float(sum);
  }
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
