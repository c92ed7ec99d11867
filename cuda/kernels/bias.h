// The key bias of an edit (csrc/core/edit.h), for the two rows of a lane.
//
// Note: [Key bias on the device]
// Scores are in base 2, so a bias joins them by one fused multiply-add each. A tile is ordinary for a warp where each
// of its rows takes the bias of all keys in it and no number is minus infinity, beyond kFarBias or NaN: the warp finds
// that out together, with a few loads for each head of its rows. In others every key is looked at for itself: whether
// it has a bias at all, and whether that removes it.
#pragma once

#include "rows.h"

namespace attnrb::cuda {

// A score's distance from the row's reference is exact up to the rounding of the reference, which beyond this is larger
// than what 2^x bears. Weights of 1 and 0 come of it either way.
constexpr float kFarBias = 5e8f;

// Infinity and NaN stay what they are.
ATTNRB_DEVICE float bounded_bias(float bias) {
  const float bounded = fminf(fmaxf(bias, -kFarBias), kFarBias);
  return bias - bias == 0.0f ? bounded : bias;
}

// One row of the bias, indexed by key position.
struct BiasRow {
  const float* first = nullptr;  // of key position 0
  int limit = 0;                 // positions from here on have none

  template <class Sequences = EvenSequences>
  ATTNRB_DEVICE void start(const AttentionParameters& p, int64_t batch, const RowPlace& place) {
    aim(p, batch, place.head);
    const Edit& edit = p.problem.edit;
    const bool holds =
        edit.first_query == nullptr || query_slot(p.problem.visibility, batch, place.query) >= edit.first_query[batch];
    const int64_t held = edit.bias_slots - p.problem.visibility.key_offset;
    limit = !holds || held < 0 ? 0 : int(held < Sequences::keys(p) ? held : Sequences::keys(p));
  }
  ATTNRB_DEVICE void aim(const AttentionParameters& p, int64_t batch, int head) {
    const int64_t* strides = p.problem.edit.bias_strides;
    first =
        p.problem.edit.key_bias + batch * strides[0] + head * strides[1] + p.problem.visibility.key_offset * strides[2];
  }
  // Of a key that there is.
  ATTNRB_DEVICE float of(const AttentionParameters& p, int key) const {
    return key < limit ? bounded_bias(first[key * p.problem.edit.bias_strides[2]]) : 0.0f;
  }
};

struct BiasPair {
  BiasRow row[2];

  // Rows behind the last are given that one's.
  template <class Sequences = EvenSequences>
  ATTNRB_DEVICE void start(const AttentionParameters& p, int64_t batch, int64_t key_head, int64_t first_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t rows = Sequences::rows(p), at = first_row + 8 * i < rows ? first_row + 8 * i : rows - 1;
      row[i].template start<Sequences>(p, batch, row_place<Sequences>(p, key_head, at));
    }
  }

  // Whether the `keys` keys from `first` on are ordinary: see Note: [Key bias on the device]. The warp's sixteen rows
  // begin with head `in_group` of the key head's.
  ATTNRB_DEVICE bool ordinary(const AttentionParameters& p, int64_t batch, int64_t key_head, int in_group, int first,
                              int keys) const {
    const Edit& edit = p.problem.edit;
    const int last = first + keys;
    bool plain = row[0].limit >= last && row[1].limit >= last && edit.bias_strides[2] == 1;
    const int heads = edit.bias_strides[1] == 0 ? 1 : p.group < 16 ? p.group : 16;
    for (int r = 0; plain && r < heads; ++r) {
      const int of_row = in_group + r < p.group ? in_group + r : in_group + r - p.group;
      const float* bias = edit.key_bias + batch * edit.bias_strides[0] +
                          (key_head * p.group + of_row) * edit.bias_strides[1] + p.problem.visibility.key_offset +
                          first;
      for (int key = thread_index() % 32; key < keys; key += 32) plain = plain && fabsf(bias[key]) <= kFarBias;
    }
    return !any(!plain);
  }

  // Adds to the scores of a tile whose rows begin as in ordinary(). Returns which of this lane's scores a bias removed,
  // bit 4 n + e for element e of score tile n; those are minus infinity.
  template <int Tiles>
  ATTNRB_DEVICE uint32_t add(const AttentionParameters& p, int64_t batch, int64_t key_head, int in_group,
                             float (&s)[Tiles][4], int first) const {
    const int column = first + thread_index() % 4 * 2;
    if (ordinary(p, batch, key_head, in_group, first, 8 * Tiles)) {
      const float* bias[2] = {row[0].first + column, row[1].first + column};
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        if (n % 2 == 0) keep_loads_apart();
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = fmaf(bias[e / 2][8 * n + e % 2], kLog2E, s[n][e]);
      }
      return 0;
    }
    uint32_t removed = 0;
    const int64_t stride = p.problem.edit.bias_strides[2];
    const float* at[2] = {row[0].first + column * stride, row[1].first + column * stride};  // of the next score tile
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
      keep_loads_apart();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = column + 8 * n + e % 2;
        const float bias = key < row[e / 2].limit ? bounded_bias(at[e / 2][e % 2 * stride]) : 0.0f;
        const bool removes = bias == minus_infinity();
        removed |= uint32_t(removes) << (4 * n + e);
        s[n][e] = removes ? minus_infinity() : fmaf(bias, kLog2E, s[n][e]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) at[i] += 8 * stride;
    }
    return removed;
  }
};

}  // namespace attnrb::cuda
