// Products of the backward pass with BFDOT, which multiplies pairs by a lane. A lane of Note: [Gradient products] is a
// pair of neighbours on the summed axis: two components, two rows or two keys.
#pragma once

#include "gradient_engine.h"
#include "neon_pairs.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct NeonBf16GradientEngine : PanelGradientEngine {
  using Input = bfloat16;
  static constexpr int chain = 128;
  static constexpr int exp2_degree = 4;
  static_assert(Blocking::panel == 8 && key_granule == 8, "a panel has what two registers of pairs hold");

  using Element = float;
  using Column = Vec;
  static ATTNRB_INLINE Vec load(const float* p) { return Vec::load(p); }
  template <int Lane>
  static ATTNRB_INLINE Vec add_lane(Vec factors, Vec column, Vec sum) {
    return add_pairs_by_lane<Lane>(halves(factors), halves(column), sum);
  }
  static ATTNRB_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return add_pairs(halves(a), halves(b), c); }

  static constexpr int64_t lanes(int64_t elements) { return (elements + 1) / 2; }
  static constexpr int64_t columns(int64_t width) { return round_up(width, Vec::width); }

  static constexpr int64_t row_lanes(int64_t width) { return round_up(width, 8) / 2; }
  static int64_t across_lanes(int64_t rows, int64_t width) { return round_up(rows, Blocking::panel) * lanes(width); }
  static int64_t along_lanes(int64_t rows, int64_t width) {
    return (rows + 1) / 2 * round_up(columns(width), Blocking::panel);
  }

  static void pack_rows(float* out, const Input* const* rows, int64_t count, int64_t stride, int64_t width,
                        float factor) {
    for (int64_t r = 0; r < count; ++r, out += row_lanes(width))
      for (int64_t d = 0; d < width; d += 8) pairs(load(rows[r], d, stride, width, factor)).store(out + d / 2);
  }

  // A pair is one 32-bit element here: the rows become columns.
  static void pack_across(float* out, const Input* const* rows, int64_t count, int64_t stride, int64_t width) {
    constexpr int W = Vec::width;
    for (int64_t key = 0; key < round_up(count, Blocking::panel); key += W) {
      float* columns = out + key / Blocking::panel * Blocking::panel * lanes(width) + key % Blocking::panel;
      for (int64_t d = 0; d < width; d += 2 * W) {
        Vec square[W];
        for (int i = 0; i < W; ++i)
          square[i] = pairs(load(key + i < count ? rows[key + i] : nullptr, d, stride, width, 1.0f));
        Vec::transpose(square);
        const int64_t left = lanes(width) - d / 2;
        for (int i = 0; i < W && i < left; ++i) square[i].store(columns + (d / 2 + i) * Blocking::panel);
      }
    }
  }

  template <int Rows>
  static void pack_along(float* out, const Input* const* rows, int64_t count, int64_t stride, int64_t width) {
    constexpr int64_t panel = Blocking::panel;
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t d = 0; d < width; d += panel) {
        const uint16x8_t even = load(rows[r], d, stride, width, 1.0f);
        const uint16x8_t odd = load(r + 1 < count ? rows[r + 1] : nullptr, d, stride, width, 1.0f);
        float* to = out + (d / panel * (Rows / 2) + r / 2) * panel;
        pairs(vzip1q_u16(even, odd)).store(to);
        pairs(vzip2q_u16(even, odd)).store(to + Vec::width);
      }
  }

  // Both as bfloat16: pairs of rows for the transposed products, pairs of keys for the other.
  struct Weights {
    static constexpr int64_t plane = block_rows / 2 * block_keys;
    static constexpr int64_t lanes() { return 3 * plane; }
    explicit Weights(float* memory) : weights_(memory), gradients_(memory + plane), rows_(memory + 2 * plane) {}

    void convert(const float* p, const float* ds, int64_t row, int64_t first, int64_t last) const {
      for (int64_t r = row; r < row + strip; r += 2) {
        const float *even_p = p + (r - row) * block_keys, *even_ds = ds + (r - row) * block_keys;
        for (int64_t j = first; j < last; j += 8) {
          store_pairs(weights_ + r / 2 * block_keys + j, narrow(even_p + j), narrow(even_p + block_keys + j));
          const uint16x8_t even = narrow(even_ds + j), odd = narrow(even_ds + block_keys + j);
          store_pairs(gradients_ + r / 2 * block_keys + j, even, odd);
          pairs(even).store(rows_ + r * row_stride + j / 2);
          pairs(odd).store(rows_ + (r + 1) * row_stride + j / 2);
        }
      }
    }
    const float* weights_down(const float*, int64_t row, int64_t key) const {
      return weights_ + row / 2 * block_keys + key;
    }
    const float* gradients_down(const float*, int64_t row, int64_t key) const {
      return gradients_ + row / 2 * block_keys + key;
    }
    static constexpr int64_t row_stride = block_keys / 2;
    const float* gradient_rows(const float*, int64_t row, int64_t key) const {
      return rows_ + row * row_stride + key / 2;
    }

   private:
    float *weights_, *gradients_, *rows_;
  };

 private:
  static ATTNRB_INLINE uint16x8_t halves(Vec pairs) { return vreinterpretq_u16_f32(pairs.v); }
  static ATTNRB_INLINE Vec pairs(uint16x8_t halves) { return {vreinterpretq_f32_u16(halves)}; }

  static ATTNRB_INLINE uint16x8_t narrow(const float* p) { return round_pair(Vec::load(p), Vec::load(p + Vec::width)); }

  // Lane i becomes (even[i], odd[i]).
  static ATTNRB_INLINE void store_pairs(float* out, uint16x8_t even, uint16x8_t odd) {
    pairs(vzip1q_u16(even, odd)).store(out);
    pairs(vzip2q_u16(even, odd)).store(out + Vec::width);
  }

  // 8 components from d on; zeros beyond the width, and for a null row.
  static ATTNRB_INLINE uint16x8_t load(const Input* row, int64_t d, int64_t stride, int64_t width, float factor) {
    if (row == nullptr) return vdupq_n_u16(0);
    return times(load_halves(row + d * stride, stride, int(smaller(width - d, int64_t(8)))), factor);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
