// Sums of the backward over whole columns or heads.
#pragma once

#include "bias.h"
#include "gradient_rows.h"

namespace attnrb::cuda {

// The first query for which `holds` is true, or their number; it is true for all behind that one.
template <class Holds>
ATTNRB_DEVICE int64_t first_query(int64_t queries, Holds&& holds) {
  int64_t low = 0, high = queries;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (holds(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The first query for which a key bias removes the key, or their number.
ATTNRB_DEVICE int64_t removed_from(const AttentionParameters& p, int64_t batch, int64_t head, int64_t key) {
  const AttentionProblem& problem = p.problem;
  const Edit& edit = problem.edit;
  const int64_t queries = problem.shape.queries, slot = problem.visibility.key_offset + key;
  if (edit.key_bias == nullptr || slot >= edit.bias_slots) return queries;
  const int64_t* strides = edit.bias_strides;
  if (edit.key_bias[batch * strides[0] + head * strides[1] + slot * strides[2]] != minus_infinity()) return queries;
  if (edit.first_query == nullptr) return 0;
  return first_query(
      queries, [&](int64_t query) { return query_slot(problem.visibility, batch, query) >= edit.first_query[batch]; });
}

// shares[b, h, j] = grad_received_j / number of queries that see key j. A thread for each.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads) shares_kernel(ATTNRB_PARAMETERS GradientParameters parameters) {
  const AttentionProblem& problem = parameters.rows.problem;
  const Shape& shape = problem.shape;
  const Visibility& visibility = problem.visibility;
  const int64_t index = block_index() * Threads + thread_index(), head = index / shape.keys;
  if (head >= shape.batch * shape.heads) return;
  const int64_t key = index % shape.keys, batch = head / shape.heads;
  const auto seen = [&](int64_t query) { return visible_interval(visibility, batch, query, shape.keys); };
  // Both ends of the interval grow with the query.
  const int64_t begin = first_query(shape.queries, [&](int64_t query) { return seen(query).high > key; });
  const int64_t end = first_query(shape.queries, [&](int64_t query) { return seen(query).low > key; });
  // From `limit` on a bias removes the key: slots grow with the query.
  const int64_t limit = removed_from(parameters.rows, batch, head % shape.heads, key);
  const int64_t last = end < limit ? end : limit;
  int64_t count = last > begin ? last - begin : 0;
  if (visibility.mask != nullptr) {
    const int64_t* strides = visibility.mask_strides;
    const bool* mask = visibility.mask + batch * strides[0] + head % shape.heads * strides[1] + key * strides[3];
    count = 0;
    for (int64_t query = begin; query < last; ++query) count += mask[query * strides[2]] ? 1 : 0;
  }
  parameters.shares[index] = count > 0 ? parameters.grad_received[index] / float(count) : 0.0f;
}

// The gradient of the key bias: what the walk over one head left, summed where the bias is broadcast, in one order. A
// thread for each number.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads) bias_sums_kernel(ATTNRB_PARAMETERS GradientParameters parameters) {
  const AttentionProblem& problem = parameters.rows.problem;
  const Shape& shape = problem.shape;
  const int64_t* strides = parameters.grad_bias_strides;
  const int64_t batches = strides[0] == 0 ? 1 : shape.batch, heads = strides[1] == 0 ? 1 : shape.heads;
  const int64_t slots = problem.edit.bias_slots, index = block_index() * Threads + thread_index();
  if (index >= batches * heads * slots) return;
  const int64_t slot = index % slots, head = index / slots % heads, batch = index / slots / heads;
  const int64_t key = slot - problem.visibility.key_offset;
  double sum = 0.0;
  if (key >= 0 && key < shape.keys)
    for (int64_t b = batch; b < (batches == 1 ? shape.batch : batch + 1); ++b)
      for (int64_t h = head; h < (heads == 1 ? shape.heads : head + 1); ++h)
        sum += double(parameters.bias_keys[(b * shape.heads + h) * shape.keys + key]);
  parameters.grad_bias[batch * strides[0] + head * strides[1] + slot * strides[2]] = float(sum);
}

// The gradients of a head's gain and sink: a block for each head, which adds its rows in one order.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads) head_sums_kernel(ATTNRB_PARAMETERS GradientParameters parameters) {
  const AttentionParameters& p = parameters.rows;
  const Shape& shape = p.problem.shape;
  const int64_t head = block_index(), key_head = head / p.group, in_group = head % p.group;
  const float* sinks = p.problem.scoring.sinks;
  const float sink = sinks != nullptr ? sinks[head] : minus_infinity();
  double gain_sum = 0.0, sink_sum = 0.0;
  for (int64_t batch = 0; batch < shape.batch; ++batch)
#pragma unroll 4
    for (int64_t query = thread_index(); query < shape.queries; query += Threads) {
      const int64_t index = (batch * shape.key_heads + key_head) * p.rows + query * p.group + in_group;
      if (parameters.gain_rows != nullptr) gain_sum += double(parameters.gain_rows[index]);
      if (sink == minus_infinity()) continue;
      GradientRow row;
      row.read(parameters.words + 8 * index, parameters.words + 8 * index + 4);
      if (row.delta != 0.0f)
        sink_sum -= double(exp2f(fmaf(sink, kLog2E, -row.reference) - row.rest)) * double(row.delta);
    }
  double* sums = reinterpret_cast<double*>(shared_memory());
  sums[thread_index()] = gain_sum;
  sums[Threads + thread_index()] = sink_sum;
  block_sync();
  if (thread_index() > 1) return;
  double sum = 0.0;
  for (int i = 0; i < Threads; ++i) sum += sums[thread_index() * Threads + i];
  float* out = thread_index() == 0 ? parameters.grad_gain : parameters.grad_sinks;
  if (out != nullptr) out[head] = float(sum);
}

}  // namespace attnrb::cuda
