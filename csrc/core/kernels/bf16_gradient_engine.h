// Products of the backward pass with AVX-512's bfloat16 instruction, which multiplies pairs and adds up in float32. A
// lane of Note: [Gradient products] is a pair of neighbours on the summed axis: two components, two rows or two keys.
#pragma once

#include "bf16_pairs.h"
#include "gradient_engine.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct Bf16GradientEngine : PanelGradientEngine {
  using Input = bfloat16;
  static constexpr int chain = 128;
  static constexpr int exp2_degree = 4;

  static constexpr int64_t lanes(int64_t elements) { return (elements + 1) / 2; }
  static constexpr int64_t columns(int64_t width) { return round_up(width, Vec::width); }

  static ATTNRB_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
  }

  static constexpr int64_t row_lanes(int64_t width) { return round_up(width, 32) / 2; }
  static int64_t across_lanes(int64_t rows, int64_t width) { return round_up(rows, Blocking::panel) * lanes(width); }
  static int64_t along_lanes(int64_t rows, int64_t width) {
    return (rows + 1) / 2 * round_up(columns(width), Blocking::panel);
  }

  static void pack_rows(float* out, const Input* const* rows, int64_t count, int64_t stride, int64_t width,
                        float factor) {
    for (int64_t r = 0; r < count; ++r, out += row_lanes(width))
      for (int64_t d = 0; d < width; d += 32) _mm512_storeu_si512(out + d / 2, load(rows[r], d, stride, width, factor));
  }

  // A pair is one 32-bit element here: the rows become columns.
  static void pack_across(float* out, const Input* const* rows, int64_t count, int64_t stride, int64_t width) {
    for (int64_t key = 0; key < round_up(count, Blocking::panel); key += 16) {
      float* columns = out + key / Blocking::panel * Blocking::panel * lanes(width) + key % Blocking::panel;
      for (int64_t d = 0; d < width; d += 32) {
        Vec square[16];
        for (int i = 0; i < 16; ++i)
          square[i].v = _mm512_castsi512_ps(load(key + i < count ? rows[key + i] : nullptr, d, stride, width, 1.0f));
        Vec::transpose(square);
        const int64_t left = lanes(width) - d / 2;
        for (int i = 0; i < 16 && i < left; ++i) square[i].store(columns + (d / 2 + i) * Blocking::panel);
      }
    }
  }

  template <int Rows>
  static void pack_along(float* out, const Input* const* rows, int64_t count, int64_t stride, int64_t width) {
    constexpr int64_t panel = Blocking::panel;
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t d = 0; d < width; d += 32) {
        const __m512i even = load(rows[r], d, stride, width, 1.0f);
        const __m512i odd = load(r + 1 < count ? rows[r + 1] : nullptr, d, stride, width, 1.0f);
        float* pairs = out + (d / panel * (Rows / 2) + r / 2) * panel + d % panel;
        __m512i low, high;
        interleave(even, odd, low, high);
        _mm512_storeu_si512(pairs, low);
        // 32 columns never straddle a panel; the second half exists where the panel does.
        _mm512_storeu_si512(pairs + 16, high);
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
        for (int64_t j = first; j < last; j += 16) {
          store_pairs(weights_ + r / 2 * block_keys + j, even_p + j, even_p + block_keys + j);
          store_pairs(gradients_ + r / 2 * block_keys + j, even_ds + j, even_ds + block_keys + j);
        }
        for (int64_t each = 0; each < 2; ++each)
          for (int64_t j = first; j < last; j += 32) {
            const float* in = even_ds + each * block_keys + j;
            _mm512_storeu_si512(rows_ + (r + each) * row_stride + j / 2, narrow(in, in + 16));
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
  static ATTNRB_INLINE __m512i narrow(const float* low, const float* high) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
  }

  // Lane i becomes (even[i], odd[i]).
  static ATTNRB_INLINE void store_pairs(float* out, const float* even, const float* odd) {
    _mm512_storeu_si512(out, alternate(narrow(even, odd)));
  }

  // 32 components from d on; zeros beyond the width, and for a null row.
  static ATTNRB_INLINE __m512i load(const Input* row, int64_t d, int64_t stride, int64_t width, float factor) {
    if (row == nullptr) return _mm512_setzero_si512();
    const int n = int(width - d < 32 ? width - d : 32);
    if (stride == 1 && factor == 1.0f) return load_halves(row + d, n);
    alignas(64) Input copy[32] = {};
    for (int i = 0; i < n; ++i) copy[i] = from_float<Input>(factor * to_float(row[(d + i) * stride]));
    return _mm512_load_si512(copy);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
