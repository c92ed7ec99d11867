// The two rows that a lane shares with three others: g and g + 8 of its warp's sixteen (Note: [Fragments]).
//
// The softmax is that of Note: [Online softmax in base 2] (csrc/core/kernels/rows.h), with m the largest score so far,
// and strengthening that of Note: [Strengthened probabilities]. A sink joins the sum at the end, so that it cannot push
// the probabilities of 16-bit tiles out of their range.
//
// Note: [Loop distribution]
// GCC 12 at -O3 (-ftree-loop-distribution) miscompiles a short loop which first resets an element of several arrays and
// then, on one of its paths, stores the element anew: it makes loops of their own of the resets and may run one behind
// the stores. The emulated kernels then saw every key below a row's last. So each element is stored once, with a value
// that was chosen before; tests/cuda_host is compiled at -O3 and would show another such loop.
#pragma once

#include <cmath>

#include "core/visibility.h"
#include "fragments.h"
#include "sequences.h"
#include "tile.h"

namespace attnrb::cuda {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

ATTNRB_DEVICE float minus_infinity() { return bit_cast<float>(uint32_t(0xff800000u)); }

// Over the four lanes of a row.
ATTNRB_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
ATTNRB_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// A reference that may be subtracted: a row whose scores are all minus infinity or NaN has none.
ATTNRB_DEVICE float reference(float max) { return max == minus_infinity() ? 0.0f : max; }

template <class Sequences = EvenSequences>
ATTNRB_DEVICE RowPlace row_place(const AttentionParameters& p, int64_t key_head, int64_t row) {
  const int64_t query = row / p.group;
  return {Sequences::first_query(p) + query, int(key_head * p.group + (row - query * p.group))};
}

// The position of a query's own key, or -1 where there is none.
template <class Sequences = EvenSequences>
ATTNRB_DEVICE int own_key(const AttentionParameters& p, int64_t batch, int64_t query) {
  const Visibility& visibility = p.problem.visibility;
  const int64_t position = query_slot(visibility, batch, query) - visibility.key_offset;
  return position >= 0 && position < Sequences::keys(p) ? int(position) : -1;
}

// Sum and reference of a row after its sink, if any, joined them.
ATTNRB_DEVICE void join_sink(const AttentionParameters& p, int head, float& max, float& sum, float& boosted) {
  if (p.problem.scoring.sinks == nullptr) return;
  const float sink = p.problem.scoring.sinks[head] * kLog2E, high = fmaxf(max, sink);
  const float keep = exp2f(reference(max) - reference(high));
  boosted *= keep;
  sum = sum * keep + exp2f(sink - reference(high));
  max = high;
}

struct RowPair {
  float max[2], sum[2], boosted[2];  // sum and boosted are this lane's share
  int low[2], high[2];               // visible interval
  bool valid[2], seen[2];
  const bool* mask[2];

  template <class Sequences = EvenSequences>
  ATTNRB_DEVICE void start(const AttentionParameters& p, int64_t batch, int64_t key_head, int64_t first_row) {
    const Visibility& visibility = p.problem.visibility;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row + 8 * i;
      max[i] = minus_infinity();
      sum[i] = boosted[i] = 0.0f;
      seen[i] = false;
      valid[i] = row < Sequences::rows(p);
      Interval interval{0, 0};
      const bool* row_mask = nullptr;
      if (valid[i]) {
        const RowPlace place = row_place<Sequences>(p, key_head, row);
        interval = visible_interval(visibility, batch, place.query, Sequences::keys(p));
        if (visibility.mask != nullptr)
          row_mask = visibility.mask + batch * visibility.mask_strides[0] + place.head * visibility.mask_strides[1] +
                     place.query * visibility.mask_strides[2];
      }
      // Stored once each: see Note: [Loop distribution].
      low[i] = int(interval.low);
      high[i] = int(interval.high);
      mask[i] = row_mask;
    }
  }

  // Whether some row of the warp sees a key of [first, last), as far as intervals tell.
  ATTNRB_DEVICE bool active(int first, int last) const {
    return any((low[0] < last && high[0] > first) || (low[1] < last && high[1] > first));
  }

  // Whether some row of the warp may not see some key of [first, last).
  ATTNRB_DEVICE bool partial(const AttentionParameters& p, int first, int last) const {
    if (p.problem.visibility.mask != nullptr) return true;
    const bool cut0 = valid[0] && (low[0] > first || high[0] < last);
    const bool cut1 = valid[1] && (low[1] > first || high[1] < last);
    return any(cut0 || cut1);
  }

  ATTNRB_DEVICE bool visible(const AttentionParameters& p, int i, int key) const {
    return key >= low[i] && key < high[i] &&
           (mask[i] == nullptr || mask[i][int64_t(key) * p.problem.visibility.mask_strides[3]]);
  }

  // Products become scores in base 2.
  template <class T, int Tiles>
  static ATTNRB_DEVICE void scale_scores(const AttentionParameters& p, float (&s)[Tiles][4]) {
    if (p.cap != 0.0f) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = p.cap * Engine<T>::tanh(s[n][e] * p.inner);
    } else {
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= p.factor;
    }
  }

  // Scores become minus infinity where the row does not see the key. `removed`: by a key bias, in bits 4 n + e.
  template <int Tiles>
  ATTNRB_DEVICE void hide_scores(const AttentionParameters& p, float (&s)[Tiles][4], int first, bool partial_tile,
                                 uint32_t removed = 0) {
    const int column = first + thread_index() % 4 * 2;
    if (!partial_tile) {
      seen[0] = seen[1] = true;
      return;
    }
    // As visible() says of each key; bits like those of `removed`.
    uint32_t hidden = removed;
    unsigned span[2];  // visible keys of the interval,
    int before[2];     // and those of this lane before it
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      before[i] = low[i] - column;
      span[i] = high[i] > low[i] ? unsigned(high[i] - low[i]) : 0u;
    }
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        hidden |= uint32_t(unsigned(8 * n + e % 2 - before[e / 2]) >= span[e / 2]) << (4 * n + e);
    if (p.problem.visibility.mask != nullptr) {
      // Something is loaded for every key, for a hidden one what there certainly is: so no load waits for a branch, and
      // sixteen are under way together.
      const bool* const first_of_all = p.problem.visibility.mask;
      const int64_t stride = p.problem.visibility.mask_strides[3];
      const uint32_t outside = hidden;
#pragma unroll 4
      for (int n = 0; n < Tiles; ++n) {
        uint32_t of_tile = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t at = (column + 8 * n + e % 2) * stride;
          const bool* shows = (outside >> (4 * n + e)) & 1u ? first_of_all : mask[e / 2] + at;
          of_tile |= uint32_t(!*shows) << e;
        }
        hidden |= of_tile << (4 * n);
      }
    }
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool shown = !((hidden >> (4 * n + e)) & 1u);
        seen[e / 2] = seen[e / 2] || shown;
        s[n][e] = shown ? s[n][e] : minus_infinity();
      }
  }

  // Both of them.
  template <class T, int Tiles>
  ATTNRB_DEVICE void finish_scores(const AttentionParameters& p, float (&s)[Tiles][4], int first, bool partial_tile) {
    scale_scores<T>(p, s);
    hide_scores(p, s, first, partial_tile);
  }

  // Scores become probabilities relative to the row's maximum. Returns in `factor` what the rows' sums of values are to
  // be multiplied by, in `largest` the block's maxima.
  template <int Tiles>
  ATTNRB_DEVICE void absorb(float (&s)[Tiles][4], float (&factor)[2], float (&largest)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float block_max = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
      for (int n = 1; n < Tiles; ++n) block_max = fmaxf(block_max, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      largest[i] = quad_max(block_max);
      const float high = fmaxf(max[i], largest[i]), from = reference(high);
      factor[i] = fast_exp2(max[i] - from);
      max[i] = high;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          s[n][e] = fast_exp2(s[n][e] - from);
          added += s[n][e];
        }
      sum[i] = sum[i] * factor[i] + added;
      boosted[i] *= factor[i];
    }
  }
};

}  // namespace attnrb::cuda
