// Probabilities times values: what a tile of keys adds to the sums of a warp's sixteen rows.
#pragma once

#include "fragments.h"
#include "tile.h"

namespace attnrb::cuda {

// Rows of a tile of values in shared memory.
// `Common`: whether there is code for whole rows.
template <class T, int Width, bool Common>
struct ValueTile {
  using Tiles = Tile<T, Width>;
  using Scores = float[Tiles::score_tiles][4];
  using Sums = float[Tiles::value_tiles][4];
  static constexpr int kKeys = Tiles::keys;

  const T* values;
  int stride, columns, lane;

  // sums = factor * sums + probabilities times the values.
  ATTNRB_DEVICE void accumulate(Sums& sums, const Scores& s, const float (&factor)[2], bool partial) const {
    if (any(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n][e] *= factor[e / 2];
    }
    // A hidden value of NaN or infinity must not meet a probability of zero: their product is NaN.
    if (partial && !all_finite()) {
      multiply_values<true, false>(sums, s);
      add_non_finite(sums, s);
    } else if (Common && columns == Width) {
      multiply_values<false, true>(sums, s);
    } else {
      multiply_values<false, false>(sums, s);
    }
  }

  // `Finite`: what is not finite in the values counts as zero. `Whole`: there are as many columns as there may be.
  template <bool Finite, bool Whole>
  ATTNRB_DEVICE void multiply_values(Sums& sums, const Scores& s) const {
#pragma unroll
    for (int step = 0; step < kKeys / Tiles::step; ++step) {
      uint32_t a[4];
      Engine<T>::probabilities(a, s, step);
#pragma unroll
      for (int n = 0; n < Tiles::value_tiles; n += 2) {
        if (!Whole && n * 8 >= columns) break;
        uint32_t b[4];
        Engine<T>::values(b, values, Whole ? row_stride<T>(Width) : stride, step, n * 8, lane);
        if (Finite) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] = Engine<T>::finite_part(b[i]);
        }
        Engine<T>::multiply(sums[n], a, b[0], b[1]);
        Engine<T>::multiply(sums[n + 1], a, b[2], b[3]);
      }
    }
  }

  // Adds the values that are not finite to the rows that see them: rare, and so one at a time.
  ATTNRB_DEVICE void add_non_finite(Sums& sums, const Scores& s) const {
    uint64_t sees[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (s[n][e] != 0.0f) sees[e / 2] |= uint64_t(1) << (8 * n + lane % 4 * 2 + e % 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sees[i] |= shuffle_xor(sees[i], 1);
      sees[i] |= shuffle_xor(sees[i], 2);
    }
#pragma unroll
    for (int n = 0; n < Tiles::value_tiles; ++n) {
      if (n * 8 >= columns) break;
#pragma unroll 1
      for (int key = 0; key < kKeys; ++key)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = widen(values[key * stride + 8 * n + lane % 4 * 2 + e]);
          if (value - value == 0.0f) continue;
          if ((sees[0] >> key) & 1) sums[n][e] += value;
          if ((sees[1] >> key) & 1) sums[n][2 + e] += value;
        }
    }
  }

  // Each warp looks at the whole tile; only tiles with hidden keys are looked at.
  ATTNRB_DEVICE bool all_finite() const {
    bool finite = true;
    for (int key = 0; key < kKeys; ++key)
      for (int column = lane; column < columns; column += 32) {
        const float value = widen(values[key * stride + column]);
        finite = finite && value - value == 0.0f;
      }
    return !any(!finite);
  }
};

}  // namespace attnrb::cuda
