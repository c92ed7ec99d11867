// Tile products in float32, for every vector width and every input type.
//
// An engine packs keys and values once per key head into the order in which its inner loop reads them, and multiplies
// strips of query rows with blocks of keys. This one converts everything to float32 on the way in.
#pragma once

#include "../problem.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// c[Rows, Columns] (+)= a[Rows, depth] * b[depth, Columns] with Columns = Vectors * width: `a` is read by broadcast,
// `b` is (the left part of) a packed panel, the accumulators never leave their registers. They start from zero even
// where c is added to: rounding errors grow with the length of a chain of additions, so chains are kept short.
template <int Rows, int Vectors, bool Accumulate>
ATTNRB_INLINE void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                 int64_t c_stride, int64_t depth) {
  // The panel comes from the second-level cache faster when it is asked for a few kilobytes ahead.
  constexpr int kPrefetch = 1024;
  Vec sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::zero();
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vec column[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      __builtin_prefetch(b + kPrefetch + v * Vec::width);
      column[v] = Vec::load(b + v * Vec::width);
    }
    for (int r = 0; r < Rows; ++r) {
      const Vec x = Vec::set(a[r * a_stride + k]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::fma(x, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* out = c + r * c_stride + v * Vec::width;
      (Accumulate ? Vec::load(out) + sum[r][v] : sum[r][v]).store(out);
    }
}

// Register blocking: rows x vectors accumulators, leaving room for one row of b and a broadcast.
struct Blocking {
  static constexpr int rows = 6;
  static constexpr int vectors = Vec::width >= 16 ? 4 : 2;
  static constexpr int panel = vectors * Vec::width;
};

// The same for `rows` rows (rounded up to whole tiles) and the first `columns` columns of a panel, at most its width.
template <bool Accumulate>
void multiply_panel(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t columns, float* c,
                    int64_t c_stride, int64_t depth) {
  constexpr int R = Blocking::rows, V = Blocking::vectors;
  for (int64_t r = 0; r < rows; r += R, a += R * a_stride, c += R * c_stride) {
    if (columns > (V - 1) * Vec::width)
      multiply_tile<R, V, Accumulate>(a, a_stride, b, Blocking::panel, c, c_stride, depth);
    else if (V > 3 && columns > 2 * Vec::width)
      multiply_tile<R, 3, Accumulate>(a, a_stride, b, Blocking::panel, c, c_stride, depth);
    else if (V > 2 && columns > Vec::width)
      multiply_tile<R, 2, Accumulate>(a, a_stride, b, Blocking::panel, c, c_stride, depth);
    else
      multiply_tile<R, 1, Accumulate>(a, a_stride, b, Blocking::panel, c, c_stride, depth);
  }
}

// Probabilities as plain floats, for whatever multiplies in float32.
struct FloatProbabilities {
  using Probability = float;

  static ATTNRB_INLINE void store_probabilities(Probability* row, int64_t key, Vec a, Vec b) {
    a.store(row + key);
    b.store(row + key + Vec::width);
  }
  static ATTNRB_INLINE float load_probability(const Probability* row, int64_t key) { return row[key]; }
  static ATTNRB_INLINE void scale_probability(Probability* row, int64_t key, float factor) { row[key] *= factor; }
};

template <class T>
struct FloatEngine : FloatProbabilities {
  using Input = T;
  static constexpr int exp2_degree = 6;
  static constexpr int strip = 24;       // query rows multiplied at a time: scores stay in the first-level cache
  static constexpr int block_rows = 96;  // query rows that share one walk over the keys
  static constexpr int block_keys = 256;
  static constexpr int panel = Blocking::panel;
  static constexpr int chain = 32;                    // components of a score that are summed in one go
  static constexpr int key_granule = 2 * Vec::width;  // blocks of keys are cut to multiples of this
  static_assert(block_keys % panel == 0 && strip % Blocking::rows == 0, "blocks hold whole tiles");

  explicit FloatEngine(const Shape& shape)
      : width(shape.width), value_width(shape.value_width), value_columns(round_up(shape.value_width, Vec::width)) {}

  const int64_t width, value_width;
  const int64_t value_columns;  // accumulator row length

  int64_t key_block_bytes() const { return block_keys * width * int64_t(sizeof(float)); }
  int64_t value_block_bytes() const { return block_keys * round_up(value_columns, panel) * int64_t(sizeof(float)); }
  int64_t query_block_bytes() const { return block_rows * width * int64_t(sizeof(float)); }
  static constexpr int64_t probability_bytes() { return strip * block_keys * int64_t(sizeof(Probability)); }

  void start_worker() const {}
  void stop_worker() const {}

  // Keys [count, width] become panels [block_keys / panel][width][panel]; the last panel is filled with zeros.
  void pack_keys(void* packed, const T* keys, int64_t row_stride, int64_t column_stride, int64_t count) const {
    constexpr int W = Vec::width;
    float* out = static_cast<float*>(packed);
    for (int64_t key = 0; key < round_up(count, panel); key += W) {
      float* columns = out + key / panel * panel * width + key % panel;
      for (int64_t d = 0; d < width; d += W) {
        const int n = int(width - d < W ? width - d : W);
        Vec rows[W];
        for (int i = 0; i < W; ++i)
          rows[i] =
              key + i < count ? load(keys + (key + i) * row_stride + d * column_stride, column_stride, n) : Vec::zero();
        Vec::transpose(rows);
        for (int i = 0; i < n; ++i) rows[i].store(columns + (d + i) * panel);
      }
    }
  }

  // Values [count, value_width] become panels [value_columns / panel][block_keys][panel]; the rest is zeros.
  void pack_values(void* packed, const T* values, int64_t row_stride, int64_t column_stride, int64_t count) const {
    float* out = static_cast<float*>(packed);
    const int64_t filled = round_up(count, key_granule);
    for (int64_t row = 0; row < filled; ++row)
      for (int64_t d = 0; d < value_columns; d += Vec::width) {
        const int n = int(value_width - d < Vec::width ? value_width - d : Vec::width);
        const Vec x = row < count ? load(values + row * row_stride + d * column_stride, column_stride, n) : Vec::zero();
        x.store(out + (d / panel * block_keys + row) * panel + d % panel);
      }
  }

  void pack_query_row(void* packed, int64_t row, const T* query, int64_t column_stride, float factor) const {
    float* out = static_cast<float*>(packed) + row * width;
    for (int64_t d = 0; d < width; d += Vec::width) {
      const int n = int(width - d < Vec::width ? width - d : Vec::width);
      const Vec x =
          query == nullptr ? Vec::zero() : load(query + d * column_stride, column_stride, n) * Vec::set(factor);
      if (n == Vec::width)
        x.store(out + d);
      else
        x.store(out + d, n);
    }
  }

  // scores[rows, block_keys] of the keys [first, last) (multiples of key_granule) and the query rows from `row` on.
  void scores(const void* queries, int64_t row, int64_t rows, const void* keys, int64_t first, int64_t last,
              float* scores) const {
    const float* query = static_cast<const float*>(queries) + row * width;
    for (int64_t key = first / panel * panel; key < last; key += panel) {
      const float* panel_keys = static_cast<const float*>(keys) + key * width;
      multiply_panel<false>(query, width, rows, panel_keys, last - key, scores + key, block_keys,
                            width < chain ? width : chain);
      for (int64_t d = chain; d < width; d += chain)
        multiply_panel<true>(query + d, width, rows, panel_keys + d * panel, last - key, scores + key, block_keys,
                             width - d < chain ? width - d : chain);
    }
  }

  // sums[rows, value_columns] += probabilities[rows, first..last) * values.
  void accumulate(const Probability* probabilities, int64_t rows, const void* values, int64_t first, int64_t last,
                  float* sums) const {
    for (int64_t column = 0; column < value_columns; column += panel)
      multiply_panel<true>(probabilities + first, block_keys, rows,
                           static_cast<const float*>(values) + column * block_keys + first * panel,
                           value_columns - column, sums + column, value_columns, last - first);
  }

 private:
  // The first n <= Vec::width elements; zeros follow.
  static ATTNRB_INLINE Vec load(const T* p, int64_t stride, int n) {
    if (stride == 1) return n == Vec::width ? Vec::load(p) : Vec::load(p, n);
    float lanes[Vec::width] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i * stride]);
    return Vec::load(lanes);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
