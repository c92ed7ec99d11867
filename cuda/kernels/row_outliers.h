// A row's outliers as they are found among its scores, tile by tile.
#pragma once

#include "rows.h"

namespace attnrb::cuda {

struct RowOutliers {
  float threshold = 0.0f;
  int own = -1;              // position of the own key, which is none
  int32_t* found = nullptr;  // where they go, and their scores, if anywhere
  float* scores = nullptr;
  int32_t count = 0;

  // Appends those of row g + 8 i among a tile's scores, in ascending order.
  template <int Tiles>
  ATTNRB_DEVICE void take(const AttentionParameters& p, const float (&s)[Tiles][4], int i, bool valid, int first,
                          int slot_offset) {
    const int column = thread_index() % 4 * 2;
    uint64_t mine = 0;
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (s[n][2 * i + e] > threshold && first + 8 * n + column + e != own)
          mine |= uint64_t(1) << (8 * n + column + e);
    if (!valid) mine = 0;
    if (!any(mine != 0)) return;
    uint64_t all = mine | shuffle_xor(mine, 1);
    all |= shuffle_xor(all, 2);
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = 8 * n + column + e;
        if (!((mine >> key) & 1)) continue;
        // See Note: [Outlier capacity].
        const int32_t at = count + count_bits(all & ((uint64_t(1) << key) - 1));
        if (at >= p.problem.emit.capacity) continue;
        found[at] = first + key + slot_offset;
        if (scores != nullptr) scores[at] = s[n][2 * i + e];
      }
    count += count_bits(all);
  }
};

}  // namespace attnrb::cuda
