// Products of bfloat16 pairs with AVX512-BF16, accumulated in float32.
//
// Note: [Pair products]
// VDPBF16PS adds to each of 16 float32 sums the products of a pair of bfloat16 numbers: twice the work of a
// multiply-add. Keys are packed so that a column is a key and a pair is two neighbouring components, values so that a
// column is a component and a pair is two neighbouring keys; queries and probabilities lie in rows, of which a pair is
// broadcast. Sums keep float32 rounding whereas every factor has 8 significant bits, so chains need no cutting.
// Probabilities are rounded to bfloat16, as PyTorch rounds them.
#pragma once

#include <cstring>

#include "bf16_pairs.h"
#include "decode.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct Bf16Product {
  using Element = uint32_t;
  using Column = __m512i;
  static constexpr int parts = 2;
  static constexpr int64_t chain = int64_t(1) << 40;

  static ATTNRB_INLINE Column load(const Element* p) { return _mm512_loadu_si512(p); }
  // Rows are written as halves and read as pairs, which only memcpy may do.
  static ATTNRB_INLINE Column broadcast(const void* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static ATTNRB_INLINE Vec add(Column x, Column column, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)column)};
  }
};

struct Bf16Probabilities {
  using Probability = bfloat16;
  using Places = InOrder;
  static constexpr int exp2_degree = 4;

  static ATTNRB_INLINE void store_probabilities(Probability* row, int64_t key, Vec a, Vec b) {
    _mm512_storeu_si512(row + key, round_pair(a, b));
  }
  static ATTNRB_INLINE float load_probability(const Probability* row, int64_t key) { return to_float(row[key]); }
  static ATTNRB_INLINE void scale_probability(Probability* row, int64_t key, float factor) {
    const __m128 scaled = _mm_set_ss(to_float(row[key]) * factor);
    row[key].bits = uint16_t(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(scaled)));
  }
};

struct Bf16Engine : PanelEngine<Bf16Product>, Bf16Probabilities {
  using Input = bfloat16;
  using PanelEngine::PanelEngine;

  template <class Rows>
  void pack_keys(void* packed, const Rows& keys, int64_t column_stride, int64_t count) const {
    for (int64_t key = 0; key < round_up(count, panel); key += 16) {
      Element* columns = static_cast<Element*>(packed) + key / panel * panel * depth + key % panel;
      for (int64_t d = 0; d < width; d += 32) {
        const int n = int(width - d < 32 ? width - d : 32);
        Vec rows[16];
        for (int i = 0; i < 16; ++i)
          rows[i].v =
              _mm512_castsi512_ps(key + i < count ? load_halves(keys[key + i] + d * column_stride, column_stride, n)
                                                  : _mm512_setzero_si512());
        Vec::transpose(rows);
        for (int i = 0; i < (n + 1) / 2; ++i) _mm512_storeu_ps(columns + (d / 2 + i) * panel, rows[i].v);
      }
    }
  }

  template <class Rows>
  void pack_values(void* packed, const Rows& values, int64_t column_stride, int64_t count) const {
    const int64_t filled = round_up(count, key_granule);
    for (int64_t row = 0; row < filled; row += 2)
      for (int64_t d = 0; d < value_columns; d += 32) {
        const int n = int(value_width - d < 32 ? value_width - d : 32);
        const auto load = [&](int64_t r) {
          return r < count ? load_halves(values[r] + d * column_stride, column_stride, n) : _mm512_setzero_si512();
        };
        const __m512i even = load(row), odd = load(row + 1);
        __m512i low, high;
        interleave(even, odd, low, high);
        Element* out = static_cast<Element*>(packed) + (d / panel * (block_keys / parts) + row / 2) * panel + d % panel;
        _mm512_storeu_si512(out, low);
        _mm512_storeu_si512(out + 16, high);
      }
  }

  // A factor is 1, 0 or -1, so the product is exact.
  void pack_query_row(void* packed, int64_t row, const Input* query, int64_t column_stride, float factor) const {
    Element* out = static_cast<Element*>(packed) + row * depth;
    for (int64_t d = 0; d < width; d += 32) {
      const int n = int(width - d < 32 ? width - d : 32);
      const __m512i halves = query == nullptr ? _mm512_setzero_si512()
                                              : times(load_halves(query + d * column_stride, column_stride, n), factor);
      _mm512_mask_storeu_epi32(out + d / 2, Vec::first((n + 1) / 2), halves);
    }
  }

  static ATTNRB_INLINE __m512i times(__m512i halves, float factor) {
    if (factor == 1.0f) return halves;
    const Vec by = Vec::set(factor);
    const __m512i odd = _mm512_set1_epi32(int(0xffff0000u));
    const Vec low = Vec{_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16))} * by;
    const Vec high = Vec{_mm512_castsi512_ps(_mm512_and_si512(halves, odd))} * by;
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low.v), 16),
                           _mm512_and_si512(_mm512_castps_si512(high.v), odd));
  }
};

// Products of query rows with key and value rows where they lie; see FloatDot.
struct Bf16Dot : Bf16Probabilities {
  using Input = bfloat16;
  using Query = bfloat16;
  static constexpr int chunk = 32;
  static constexpr int products = Vec::width;

  // Interleaving two rows of values within each 128 bits costs one operation a register, and leaves components 8i to
  // 8i + 3 of a chunk in its first register of sums, 8i + 4 to 8i + 7 in its second.
  static ATTNRB_INLINE int64_t place(int64_t d) {
    const int64_t in_chunk = d % chunk, lane = in_chunk / 8, in_lane = in_chunk % 8;
    return d - in_chunk + in_lane / 4 * 16 + lane * 4 + in_lane % 4;
  }

  static void pack_query(Query* out, const Input* query, int64_t stride, int64_t width, float factor) {
    for (int64_t d = 0; d < width; d += chunk)
      _mm512_storeu_si512(out + d, Bf16Engine::times(load_halves(query + d * stride, stride, int(width - d)), factor));
  }

  template <int Rows>
  static ATTNRB_INLINE void dot(const Query* queries, int64_t query_stride, const Input* keys, int64_t key_stride,
                                int64_t width, float* scores, int64_t score_stride) {
    constexpr int Keys = Vec::width / Rows;
    Vec sum[Rows * Keys];
    for (int i = 0; i < Rows * Keys; ++i) sum[i] = Vec::zero();
    for (int64_t d = 0; d < width; d += chunk) {
      const int n = width - d < chunk ? int(width - d) : chunk;
      __m512i key[Keys];
      for (int k = 0; k < Keys; ++k) key[k] = load_halves(keys + k * key_stride + d, n);
      for (int r = 0; r < Rows; ++r) {
        const __m512i query = _mm512_loadu_si512(queries + r * query_stride + d);
        for (int k = 0; k < Keys; ++k) sum[r * Keys + k] = Bf16Product::add(query, key[k], sum[r * Keys + k]);
      }
    }
    float total[Vec::width];
    Vec::sums(sum).store(total);
    for (int r = 0; r < Rows; ++r) std::memcpy(scores + r * score_stride, total + r * Keys, Keys * sizeof(float));
  }

  template <int Rows, int Chunks, bool Whole>
  static ATTNRB_INLINE void mix(const Probability* probabilities, int64_t probability_stride, const Input* values,
                                int64_t value_stride, int64_t count, int64_t columns, float* sums, int64_t sum_stride,
                                Upcoming& ahead) {
    constexpr int Vectors = 2 * Chunks;
    Vec sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::load(sums + r * sum_stride + v * Vec::width);
    for (int64_t j = 0; j < count; j += 2, values += 2 * value_stride) {
      ahead.fetch(2);
      __m512i pair[Vectors];
      for (int c = 0; c < Chunks; ++c) {
        const int n = Whole ? chunk : int(columns - c * chunk);
        const __m512i even = load_halves(values + c * chunk, n);
        // Behind the last key there may be no row of values, nor a number for its probability.
        const __m512i odd = j + 1 < count ? load_halves(values + value_stride + c * chunk, n) : _mm512_setzero_si512();
        pair[2 * c] = _mm512_unpacklo_epi16(even, odd);
        pair[2 * c + 1] = _mm512_unpackhi_epi16(even, odd);
      }
      for (int r = 0; r < Rows; ++r) {
        const Probability* from = probabilities + r * probability_stride + j;
        const __m512i p = j + 1 < count ? Bf16Product::broadcast(from) : _mm512_set1_epi32(from->bits);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = Bf16Product::add(p, pair[v], sum[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v].store(sums + r * sum_stride + v * Vec::width);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
