// Puts the parts of rows together whose keys were split over blocks: see Note: [Split keys].
#pragma once

#include "rows.h"

namespace attnrb::cuda {

ATTNRB_DEVICE float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
ATTNRB_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// One warp for one row.
template <class T>
ATTNRB_DEVICE void merge_row(const AttentionParameters& p, int64_t batch, int64_t key_head, int64_t row) {
  const AttentionProblem& problem = p.problem;
  const int lane = thread_index() % 32;
  const int64_t first = ((batch * problem.shape.key_heads + key_head) * p.rows + row) * p.splits;
  const float* states = p.partials.state + 4 * first;

  float max = minus_infinity();
  bool seen = false;
  for (int s = lane; s < p.splits; s += 32) {
    max = fmaxf(max, states[4 * s]);
    seen = seen || states[4 * s + 3] != 0.0f;
  }
  max = warp_max(max);
  seen = any(seen);
  const float keys_max = reference(max);
  float sum = 0.0f, boosted = 0.0f;
  for (int s = lane; s < p.splits; s += 32) {
    if (states[4 * s + 3] == 0.0f) continue;
    const float factor = exp2f(states[4 * s] - keys_max);
    sum += states[4 * s + 1] * factor;
    boosted += states[4 * s + 2] * factor;
  }
  sum = warp_sum(sum);
  boosted = warp_sum(boosted);
  const RowPlace place = row_place(p, key_head, row);
  join_sink(p, place.head, max, sum, boosted);
  if (!seen) sum = boosted = 0.0f;

  const int64_t index = (batch * problem.shape.heads + place.head) * problem.shape.queries + place.query;
  if (lane == 0) {
    if (problem.lse != nullptr) problem.lse[index] = seen ? (max + log2f(sum + boosted)) * kLn2 : minus_infinity();
    if (problem.softmax != nullptr) {
      problem.softmax[2 * index] = max;
      problem.softmax[2 * index + 1] = sum;
    }
  }
  if (problem.output != nullptr) {
    const float by = seen ? exp2f(keys_max - reference(max)) / (sum + boosted) : 0.0f;
    T* out = static_cast<T*>(problem.output) + batch * problem.output_strides[0] +
             place.head * problem.output_strides[1] + place.query * problem.output_strides[2];
    for (int d = lane; d < problem.shape.value_width; d += 32) {
      float value = 0.0f;
      for (int s = 0; s < p.splits; ++s)
        if (states[4 * s + 3] != 0.0f)
          value += p.partials.sums[(first + s) * problem.shape.value_width + d] * exp2f(states[4 * s] - keys_max);
      out[d] = from_float<T>(value * by);
    }
  }
  if (problem.emit.indices == nullptr) return;
  const int64_t capacity = problem.emit.capacity;
  const float threshold = max + log2f(sum) + p.threshold_log2;
  int32_t* found = problem.emit.indices + index * capacity;
  int32_t count = 0;
  for (int s = 0; s < p.splits; ++s) {
    const int32_t candidates = p.partials.candidate_counts[first + s];
    for (int32_t c = 0; c < candidates; c += 32) {
      const int64_t at = (first + s) * capacity + c + lane;
      const bool keep = c + lane < candidates && p.partials.candidate_scores[at] > threshold;
      const unsigned kept = ballot(keep);
      const int32_t place_in_row = count + count_bits(kept & ((1u << lane) - 1));
      if (keep && place_in_row < capacity)
        found[place_in_row] = p.partials.candidates[at] + int32_t(problem.visibility.key_offset);
      count += count_bits(kept);
    }
  }
  if (count > capacity) count = int32_t(capacity);
  if (lane == 0) problem.emit.counts[index] = count;
  for (int64_t c = count + lane; c < capacity; c += 32) found[c] = -1;
}

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads) merge_kernel(ATTNRB_PARAMETERS AttentionParameters p) {
  const int64_t index = block_index() * kWarps + thread_index() / 32;
  const int64_t head = index / p.rows;
  if (head >= p.problem.shape.batch * p.problem.shape.key_heads) return;
  merge_row<T>(p, head / p.problem.shape.key_heads, head % p.problem.shape.key_heads, index % p.rows);
}

}  // namespace attnrb::cuda
