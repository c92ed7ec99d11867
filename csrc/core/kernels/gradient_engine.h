// Products of the backward pass, in float32, for every vector width and every input type.
//
// Note: [Gradient products]
// A tile of the backward pass, R query rows by K keys, takes five products:
//   scores  S = Q K^T        weight gradients  dW = dY V^T
//   dV += P^T dY             dK += dS^T Q      dQ += dS K
// The right-hand sides are packed into panels of `panel` columns, the summed axis outermost, in two ways: `across`
// makes a column of every row of the matrix (K and V in the first two), `along` keeps its columns (dY, Q and K in the
// others). The left-hand sides are read by broadcast, row by row, or down the columns for the transposed ones; nothing
// is ever transposed but K and V, once.
//
// Everything is counted in lanes of 32 bits along the summed axis: one float here, a pair of bfloat16 in
// bf16_gradient_engine.h.
#pragma once

#include "float_engine.h"

namespace attnrb {
namespace ATTNRB_ISA {

// c[Rows, Vectors * width] (+)= left * right over `depth` lanes, `right` being (the left part of) a packed panel. The
// rows of `left` lie a_stride lanes apart; those of a Transposed one are neighbours, and its summed lanes lie a_stride
// apart.
template <class Engine, int Rows, int Vectors, bool Transposed, bool Accumulate>
ATTNRB_INLINE void multiply_lanes(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                                  int64_t depth) {
  const int64_t row_stride = Transposed ? 1 : a_stride, step = Transposed ? a_stride : 1;
  Vec sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::zero();
  int64_t k = 0;
  if constexpr (Vec::by_lane && Transposed)
    for (; k < depth; ++k, a += step, b += Blocking::panel) add_neighbours<Engine>(a, b, sum);
  if constexpr (Vec::by_lane)
    for (; k + Vec::width <= depth; k += Vec::width, a += Vec::width, b += Vec::width * Blocking::panel)
      add_lanes<Engine>(a, a_stride, b, Blocking::panel, sum);
  for (; k < depth; ++k, a += step, b += Blocking::panel) {
    Vec column[Vectors];
    for (int v = 0; v < Vectors; ++v) column[v] = Vec::load(b + v * Vec::width);
    for (int r = 0; r < Rows; ++r) {
      const Vec x = Vec::set(a[r * row_stride]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Engine::multiply_add(x, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* out = c + r * c_stride + v * Vec::width;
      (Accumulate ? Vec::load(out) + sum[r][v] : sum[r][v]).store(out);
    }
}

// The same for the first `columns` columns of a panel, at most its width, rounded up to whole vectors.
template <class Engine, int Rows, bool Transposed, bool Accumulate>
ATTNRB_INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t columns, float* c,
                                    int64_t c_stride, int64_t depth) {
  constexpr int V = Blocking::vectors;
  if (columns > (V - 1) * Vec::width)
    multiply_lanes<Engine, Rows, V, Transposed, Accumulate>(a, a_stride, b, c, c_stride, depth);
  else if (V > 3 && columns > 2 * Vec::width)
    multiply_lanes<Engine, Rows, 3, Transposed, Accumulate>(a, a_stride, b, c, c_stride, depth);
  else if (V > 2 && columns > Vec::width)
    multiply_lanes<Engine, Rows, 2, Transposed, Accumulate>(a, a_stride, b, c, c_stride, depth);
  else
    multiply_lanes<Engine, Rows, 1, Transposed, Accumulate>(a, a_stride, b, c, c_stride, depth);
}

// What engines that read panels share: sizes, and scores and sums that lie row by row.
struct PanelGradientEngine {
  static constexpr int strip = 24;                           // query rows that share a range of keys
  static constexpr int block_rows = 96;                      // query rows of a tile
  static constexpr int block_keys = 128;                     // keys of a tile
  static constexpr int strips_at_once = block_rows / strip;  // strips of a tile whose scores are made in one go
  static constexpr bool packs_rows_once = false;             // or for each tile
  static constexpr bool whole_strips = false;                // whether sums have rows for all rows of a strip
  static constexpr int key_granule = 2 * Vec::width;
  static constexpr int key_rows = Vec::by_lane ? 8 : 4;  // keys multiplied at a time where they are the rows
  static_assert(block_keys % Blocking::panel == 0 && strip % Blocking::rows == 0 && strip % 2 == 0 &&
                    key_granule % key_rows == 0,
                "blocks hold whole tiles and pairs");

  using Places = InOrder;
  static constexpr int64_t score_row(int64_t r) { return r * block_keys; }
  // Where sums of a query row lie, and those of a key.
  static constexpr int64_t row_place(int64_t r, int64_t d, int64_t columns) { return r * columns + d; }
  static constexpr int64_t key_place(int64_t j, int64_t d, int64_t columns) { return j * columns + d; }

  static void start_worker() {}
  static void stop_worker() {}
};

template <class T>
struct FloatGradientEngine : PanelGradientEngine {
  using Input = T;
  static constexpr int chain = 32;  // lanes of a score that are summed in one go, see float_engine.h
  static constexpr int exp2_degree = 6;

  static constexpr int64_t lanes(int64_t elements) { return elements; }
  // A vector of columns read `along`, and rows of that many.
  static constexpr int64_t columns(int64_t width) { return round_up(width, Vec::width); }

  static ATTNRB_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return Vec::fma(a, b, c); }

  // Sizes of packed matrices of `rows` rows, in lanes.
  static int64_t row_lanes(int64_t width) { return columns(width); }
  static int64_t across_lanes(int64_t rows, int64_t width) { return round_up(rows, Blocking::panel) * width; }
  static int64_t along_lanes(int64_t rows, int64_t width) { return rows * round_up(columns(width), Blocking::panel); }

  // Left-hand rows [rows][columns(width)], multiplied by `factor`. A null row is zeros, here and below.
  static void pack_rows(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width, float factor) {
    const Vec by = Vec::set(factor);
    for (int64_t r = 0; r < count; ++r, out += columns(width))
      for (int64_t d = 0; d < width; d += Vec::width) {
        const int n = int(width - d < Vec::width ? width - d : Vec::width);
        (rows[r] == nullptr ? Vec::zero() : load_strided(rows[r] + d * stride, stride, n) * by).store(out + d);
      }
  }

  // Panels [rows / panel][width][panel]; the last one is filled with zeros.
  static void pack_across(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width) {
    constexpr int W = Vec::width;
    for (int64_t key = 0; key < round_up(count, Blocking::panel); key += W) {
      float* columns = out + key / Blocking::panel * Blocking::panel * width + key % Blocking::panel;
      for (int64_t d = 0; d < width; d += W) {
        const int n = int(width - d < W ? width - d : W);
        Vec square[W];
        for (int i = 0; i < W; ++i)
          square[i] = key + i < count && rows[key + i] != nullptr ? load_strided(rows[key + i] + d * stride, stride, n)
                                                                  : Vec::zero();
        Vec::transpose(square);
        for (int i = 0; i < n; ++i) square[i].store(columns + (d + i) * Blocking::panel);
      }
    }
  }

  // Panels [columns / panel][Rows][panel] of a matrix of up to Rows rows, of which `count` are filled.
  template <int Rows>
  static void pack_along(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width) {
    constexpr int64_t panel = Blocking::panel;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < width; d += Vec::width) {
        const int n = int(width - d < Vec::width ? width - d : Vec::width);
        const Vec x = rows[r] == nullptr ? Vec::zero() : load_strided(rows[r] + d * stride, stride, n);
        x.store(out + (d / panel * Rows + r) * panel + d % panel);
      }
  }

  // The weights and score gradients of a tile, as the last three products read them: where they are.
  struct Weights {
    static constexpr int64_t lanes() { return 0; }
    explicit Weights(float* /*memory*/) {}

    // Of the strip from `row` on, which begins at p and ds.
    void convert(const float* /*p*/, const float* /*ds*/, int64_t /*row*/, int64_t /*first*/, int64_t /*last*/) const {}
    // Transposed left-hand sides, from a row and a key on: keys are neighbours, summed lanes block_keys apart.
    const float* weights_down(const float* p, int64_t row, int64_t key) const { return p + row * block_keys + key; }
    const float* gradients_down(const float* ds, int64_t row, int64_t key) const { return ds + row * block_keys + key; }
    // Rows of score gradients, row_stride lanes apart, from a key on.
    static constexpr int64_t row_stride = block_keys;
    const float* gradient_rows(const float* ds, int64_t row, int64_t key) const { return ds + row * block_keys + key; }
  };
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
