// Tile products in float32, for every vector width and every input type: everything is converted on the way in.
#pragma once

#include "driver.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct FloatProduct {
  using Element = float;
  using Column = Vec;
  static constexpr int parts = 1;
  static constexpr int chain = 32;

  static ATTNRB_INLINE Column load(const Element* p) { return Vec::load(p); }
  static ATTNRB_INLINE Column broadcast(const Element* p) { return Vec::set(*p); }
  static ATTNRB_INLINE Vec add(Column x, Column column, Vec sum) { return Vec::fma(x, column, sum); }
  template <int Lane>
  static ATTNRB_INLINE Vec add_lane(Column factors, Column column, Vec sum) {
    return Vec::fma_lane<Lane>(factors, column, sum);
  }
};

// Probabilities as plain floats, for whatever multiplies in float32.
struct FloatProbabilities {
  using Probability = float;
  using Places = InOrder;

  static ATTNRB_INLINE void store_probabilities(Probability* row, int64_t key, Vec a, Vec b) {
    a.store(row + key);
    b.store(row + key + Vec::width);
  }
  static ATTNRB_INLINE float load_probability(const Probability* row, int64_t key) { return row[key]; }
  static ATTNRB_INLINE void scale_probability(Probability* row, int64_t key, float factor) { row[key] *= factor; }
};

template <class T>
struct FloatEngine : PanelEngine<FloatProduct>, FloatProbabilities {
  using Input = T;
  static constexpr int exp2_degree = 6;
  using PanelEngine::PanelEngine;

  // Keys [count, width] become panels [block_keys / panel][width][panel]; the last panel is filled with zeros.
  template <class Rows>
  void pack_keys(void* packed, const Rows& keys, int64_t column_stride, int64_t count) const {
    constexpr int W = Vec::width;
    float* out = static_cast<float*>(packed);
    for (int64_t key = 0; key < round_up(count, panel); key += W) {
      float* columns = out + key / panel * panel * width + key % panel;
      for (int64_t d = 0; d < width; d += W) {
        const int n = int(width - d < W ? width - d : W);
        Vec rows[W];
        for (int i = 0; i < W; ++i)
          rows[i] = key + i < count ? load_strided(keys[key + i] + d * column_stride, column_stride, n) : Vec::zero();
        Vec::transpose(rows);
        for (int i = 0; i < n; ++i) rows[i].store(columns + (d + i) * panel);
      }
    }
  }

  // Values [count, value_width] become panels [value_columns / panel][block_keys][panel]; the rest is zeros.
  template <class Rows>
  void pack_values(void* packed, const Rows& values, int64_t column_stride, int64_t count) const {
    float* out = static_cast<float*>(packed);
    const int64_t filled = round_up(count, key_granule);
    for (int64_t row = 0; row < filled; ++row)
      for (int64_t d = 0; d < value_columns; d += Vec::width) {
        const int n = int(value_width - d < Vec::width ? value_width - d : Vec::width);
        const Vec x = row < count ? load_strided(values[row] + d * column_stride, column_stride, n) : Vec::zero();
        x.store(out + (d / panel * block_keys + row) * panel + d % panel);
      }
  }

  void pack_query_row(void* packed, int64_t row, const T* query, int64_t column_stride, float factor) const {
    float* out = static_cast<float*>(packed) + row * width;
    for (int64_t d = 0; d < width; d += Vec::width) {
      const int n = int(width - d < Vec::width ? width - d : Vec::width);
      const Vec x =
          query == nullptr ? Vec::zero() : load_strided(query + d * column_stride, column_stride, n) * Vec::set(factor);
      x.store(out + d, n);
    }
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
