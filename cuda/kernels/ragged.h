// What ragged sequences need besides: rows of those that have no keys.
#pragma once

#include "rows.h"

namespace attnrb::cuda {

// Sixteen rows of a warp, from `first_row` on, of a sequence that is skipped or whose tables lead nowhere.
template <class T>
ATTNRB_DEVICE void leave_without_keys(const AttentionParameters& p, int64_t key_head, int64_t first_row) {
  const AttentionProblem& problem = p.problem;
  const int lane = thread_index() % 32;
  const bool broken = RaggedSequences::keys(p) == kBrokenSequence;
  if (!broken && p.skipped == Skipped::untouched) return;
  const float nan = bit_cast<float>(uint32_t(0x7fc00000u));
  for (int64_t row = first_row; row < first_row + 16 && row < RaggedSequences::rows(p); ++row) {
    const RowPlace place = row_place<RaggedSequences>(p, key_head, row);
    const int64_t index = RaggedSequences::index(p, 0, place);
    if (problem.lse != nullptr && lane == 0) problem.lse[index] = broken ? nan : minus_infinity();
    if (problem.emit.counts != nullptr) {
      if (lane == 0) problem.emit.counts[index] = 0;
      for (int64_t c = lane; c < problem.emit.capacity; c += 32)
        problem.emit.indices[index * problem.emit.capacity + c] = -1;
    }
    if (!broken && p.skipped != Skipped::cleared) continue;
    T* out = static_cast<T*>(problem.output) + place.head * problem.output_strides[1] +
             place.query * problem.output_strides[2];
    for (int64_t d = lane; d < problem.shape.value_width; d += 32) out[d] = narrow<T>(broken ? nan : 0.0f);
  }
}

}  // namespace attnrb::cuda
