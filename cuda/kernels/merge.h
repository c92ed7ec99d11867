// Puts the parts of rows together whose keys were split over blocks: see Note: [Split keys].
#pragma once

#include "marks.h"
#include "rest.h"

namespace attnrb::cuda {

ATTNRB_DEVICE float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
ATTNRB_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// What the splits of a row left, put together; the same in all lanes.
struct MergedRow {
  float keys_max;  // finite reference of the splits' sums of values
  float max, sum, boosted;
  bool seen;
};
ATTNRB_DEVICE MergedRow merge_states(const float* states, int splits) {
  const int lane = thread_index() % 32;
  MergedRow row{0.0f, minus_infinity(), 0.0f, 0.0f, false};
  for (int s = lane; s < splits; s += 32) {
    row.max = fmaxf(row.max, states[4 * s]);
    row.seen = row.seen || states[4 * s + 3] != 0.0f;
  }
  row.max = warp_max(row.max);
  row.seen = any(row.seen);
  row.keys_max = reference(row.max);
  for (int s = lane; s < splits; s += 32) {
    if (states[4 * s + 3] == 0.0f) continue;
    const float factor = exp2f(states[4 * s] - row.keys_max);
    row.sum += states[4 * s + 1] * factor;
    row.boosted += states[4 * s + 2] * factor;
  }
  row.sum = warp_sum(row.sum);
  row.boosted = warp_sum(row.boosted);
  return row;
}

// What each split's sums are multiplied by: lane l has those of splits l and l + 32, 0 where no key was seen.
struct SplitFactors {
  float of[2];

  ATTNRB_DEVICE SplitFactors(const float* states, int splits, float keys_max) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int s = thread_index() % 32 + 32 * half;
      of[half] = s < splits && states[4 * s + 3] != 0.0f ? exp2f(states[4 * s] - keys_max) : 0.0f;
    }
  }
  // The same in all lanes; 0 behind the last.
  ATTNRB_DEVICE float at(int split) const { return shuffle(split < 32 ? of[0] : of[1], split % 32); }
};

// The sum of values in a column, relative to keys_max. `sums` begins at the first split's. Eight loads are under way
// together: none waits for another, and none for a condition.
ATTNRB_DEVICE float merged_value(const SplitFactors& factors, const float* sums, int splits, int64_t width,
                                 int64_t column) {
  constexpr int kFlight = 8;
  float value = 0.0f;
  for (int first = 0; first < splits; first += kFlight) {
    float loaded[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int s = first + i < splits ? first + i : splits - 1;
      loaded[i] = sums[s * width + column];
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const float factor = factors.at(first + i);
      value += first + i < splits ? loaded[i] * factor : 0.0f;
    }
  }
  return value;
}

// One warp for 32 columns of one row of a key head: of all sequences together where they are ragged. The first has what
// else there is to say of the row.
template <class T, class Sequences>
ATTNRB_DEVICE void merge_row(const AttentionParameters& p, int64_t batch, int64_t key_head, int64_t row,
                             int64_t first_column) {
  const AttentionProblem& problem = p.problem;
  const int lane = thread_index() % 32;
  const int64_t first = EvenSequences::part(p, Sequences::ragged ? 0 : batch, key_head, row) * p.splits;
  const float* states = p.partials.state + 4 * first;
  const float* chosen_states = p.partials.chosen_state == nullptr ? nullptr : p.partials.chosen_state + 4 * first;
  const RowPlace place = row_place(p, key_head, row);

  const MergedRow merged = merge_states(states, p.splits);
  const bool seen = merged.seen;
  float max = merged.max, sum = merged.sum, boosted = merged.boosted;
  join_sink(p, place.head, max, sum, boosted);
  if (!seen) sum = boosted = 0.0f;
  // What the values' sums are multiplied by.
  float by = seen ? exp2f(merged.keys_max - reference(max)) / (sum + boosted) : 0.0f, of_chosen = 0.0f,
        chosen_max = 0.0f;
  if (chosen_states != nullptr) {
    // See Note: [Rule rest on the device].
    const MergedRow chosen = merge_states(chosen_states, p.splits);
    const RestShares shares = rest_shares(max, sum, chosen.max, chosen.sum, gain_of<Sequences>(p, batch, place.head));
    by = sum == 0.0f ? 0.0f : exp2f(merged.keys_max - reference(max)) * (shares.of_rest / sum);
    by += boosted;  // zero, or NaN where the outliers break the rules
    of_chosen = chosen.sum == 0.0f ? 0.0f : shares.of_chosen / chosen.sum;
    chosen_max = chosen.keys_max;
    max = shares.max;
    sum = seen ? shares.sum : 0.0f;
    boosted = 0.0f;
  }

  const int64_t index = Sequences::index(p, batch, place);
  if (lane == 0 && first_column == 0) {
    if (problem.lse != nullptr) problem.lse[index] = seen ? (max + log2f(sum + boosted)) * kLn2 : minus_infinity();
    if (problem.softmax != nullptr) {
      problem.softmax[2 * index] = max;
      problem.softmax[2 * index + 1] = sum;
    }
  }
  if (problem.output != nullptr) {
    T* out = static_cast<T*>(problem.output) + batch * problem.output_strides[0] +
             place.head * problem.output_strides[1] + place.query * problem.output_strides[2];
    const int64_t width = problem.shape.value_width, d = first_column + lane, column = d < width ? d : width - 1;
    if (width > 0) {
      const SplitFactors factors(states, p.splits, merged.keys_max);
      float value = by * merged_value(factors, p.partials.sums + first * width, p.splits, width, column);
      if (chosen_states != nullptr) {
        const SplitFactors of_outliers(chosen_states, p.splits, chosen_max);
        value += of_chosen * merged_value(of_outliers, p.partials.chosen_sums + first * width, p.splits, width, column);
      }
      if (d < width) out[d] = narrow<T>(value);
    }
  }
  if (problem.emit.indices == nullptr || first_column != 0) return;
  const int64_t capacity = problem.emit.capacity;
  const float threshold = max + log2f(sum) + p.threshold_log2;
  int32_t* found = problem.emit.indices + index * capacity;
  int32_t count = 0, of_splits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    of_splits[half] = lane + 32 * half < p.splits ? p.partials.candidate_counts[first + lane + 32 * half] : 0;
  for (int s = 0; s < p.splits; ++s) {
    const int32_t candidates = shuffle(s < 32 ? of_splits[0] : of_splits[1], s % 32);
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

// How many warps share a row.
ATTNRB_INLINE int64_t merge_warps(const AttentionParameters& p) {
  const int64_t width = p.problem.output == nullptr ? 1 : p.problem.shape.value_width;
  return width > 32 ? (width + 31) / 32 : 1;
}

// Left alone, ptxas spills registers to fit nine blocks.
constexpr int kMergeBlocks = 6;

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, kMergeBlocks) merge_kernel(ATTNRB_PARAMETERS AttentionParameters p) {
  const int64_t warps = merge_warps(p), warp = block_index() * kWarps + thread_index() / 32, index = warp / warps;
  const int64_t head = index / p.rows;
  if (head >= p.problem.shape.batch * p.problem.shape.key_heads) return;
  merge_row<T, EvenSequences>(p, head / p.problem.shape.key_heads, head % p.problem.shape.key_heads, index % p.rows,
                              warp % warps * 32);
}

}  // namespace attnrb::cuda
