// What the backward does beside its products: walks down outlier lists, what rule rest makes of a row, and which tiles
// are wanted.
#pragma once

#include "gradient_rows.h"

namespace attnrb::cuda {

// Sixteen lanes walk down the outlier lists of a warp's sixteen rows, in ascending order.
struct OutlierWalk {
  OutlierList list;
  int32_t next = 0;

  // The row's outliers among the `keys` <= 32 keys from `first` on, one bit each; earlier ones are passed over.
  ATTNRB_DEVICE uint32_t take(int64_t key_offset, int64_t first, int keys) {
    uint32_t bits = 0;
    for (; next < list.count; ++next) {
      const int64_t at = int64_t(list.slots[next]) - key_offset - first;
      if (at >= keys) break;
      if (at >= 0) bits |= 1u << at;
    }
    return bits;
  }
};

// Of a row's weights, and of weights times their gradients: the outliers' and all others'.
struct RestSums {
  float others, along_others, chosen, along_chosen;

  ATTNRB_DEVICE void add(bool marked, float weight, float along) {
    others += marked ? 0.0f : weight;
    along_others += marked ? 0.0f : along;
    chosen += marked ? weight : 0.0f;
    along_chosen += marked ? along : 0.0f;
  }
  ATTNRB_DEVICE void join() {
    others = quad_sum(others);
    along_others = quad_sum(along_others);
    chosen = quad_sum(chosen);
    along_chosen = quad_sum(along_chosen);
  }
};

// See Note: [Gradients of an edit].
ATTNRB_DEVICE void finish_rest(const GradientParameters& parameters, const GradientRow& row, const RestSums& sums,
                               int head, int64_t index) {
  constexpr float kSmallest = 1.17549435e-38f;  // normal number of float32, as in the forward
  const float* sinks = parameters.rows.problem.scoring.sinks;
  float others = sums.others;
  if (sinks != nullptr) others += exp2f(fmaf(sinks[head], kLog2E, -row.reference) - row.rest);
  float gain = row.gain, of_others = 1.0f, delta = row.delta, outlier_delta = row.delta, of_gain = 0.0f;
  if (others >= kSmallest) {
    const float mean = sums.along_others / others, share = gain * (sums.chosen / others);
    of_others = 1.0f - share;
    outlier_delta = row.delta + gain * mean;
    delta = row.delta - share * mean;
    of_gain = sums.along_chosen - sums.chosen * mean;
  } else {
    gain = 0.0f;  // nothing can share: the row stays plain
  }
  parameters.words[8 * index + 2] = bit_cast<uint32_t>(delta);
  parameters.words[8 * index + 3] = bit_cast<uint32_t>(gain);
  parameters.rest_rows[2 * index] = of_others;
  parameters.rest_rows[2 * index + 1] = outlier_delta;
  if (parameters.gain_rows != nullptr) parameters.gain_rows[index] = of_gain;
}

// Whether somebody wants what this block owns.
template <GradientTask task>
ATTNRB_DEVICE bool is_wanted(const GradientParameters& parameters) {
  if (task != GradientTask::queries && task != GradientTask::keys) return true;
  const AttentionParameters& p = parameters.rows;
  const Shape& shape = p.problem.shape;
  const bool of_keys = task == GradientTask::keys;
  const int32_t* wanted = of_keys ? parameters.wanted_keys : parameters.wanted_rows;
  if (wanted == nullptr) return true;
  const int64_t block = block_index() / p.slices, heads = shape.batch * shape.key_heads, tile = block / heads;
  const int64_t tiles = of_keys ? (shape.keys + kTileRows - 1) / kTileRows : p.row_tiles;
  return wanted[block % heads * tiles + (of_keys ? tile : tiles - 1 - tile)] != 0;
}

}  // namespace attnrb::cuda
