// What NEON does otherwise than wider vectors: products where keys and values lie, and the shape of gradient tiles.
#pragma once

#include "float_dot.h"
#include "gradient_engine.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Products of a row and a key that fit into registers while they are added up.
constexpr int kDotProducts = 16;

// Their totals, in rows of kDotProducts / Rows keys. They are named one by one: a loop over their addresses would keep
// them in memory.
template <int Rows>
ATTNRB_INLINE void store_sums(const Vec (&sum)[kDotProducts], float* scores, int64_t score_stride) {
  constexpr int Keys = kDotProducts / Rows;
  float total[kDotProducts];
  Vec::sums(sum[0], sum[1], sum[2], sum[3]).store(total);
  Vec::sums(sum[4], sum[5], sum[6], sum[7]).store(total + 4);
  Vec::sums(sum[8], sum[9], sum[10], sum[11]).store(total + 8);
  Vec::sums(sum[12], sum[13], sum[14], sum[15]).store(total + 12);
  for (int r = 0; r < Rows; ++r) std::memcpy(scores + r * score_stride, total + r * Keys, Keys * sizeof(float));
}

// FloatDot for vectors of four, of which sixteen sums fit into registers, and factors taken from lanes
// (Note: [Factors by lane]). Every sum adds up in the order of FloatDot.
template <class T>
struct NeonDot : FloatDot<T> {
  using Query = float;
  using Probability = float;
  static constexpr int chunk = FloatDot<T>::chunk;
  static constexpr int products = kDotProducts;

  template <int Rows>
  static ATTNRB_INLINE void dot(const Query* queries, int64_t query_stride, const T* keys, int64_t key_stride,
                                int64_t width, float* scores, int64_t score_stride) {
    Vec sum[products];
    for (int i = 0; i < products; ++i) sum[i] = Vec::zero();
    int64_t d = 0;
    for (; d + chunk <= width; d += chunk) add_chunk<Rows>(sum, queries + d, query_stride, keys + d, key_stride);
    if (d < width) {
      constexpr int Keys = products / Rows;
      T rest[Keys * chunk] = {};
      for (int k = 0; k < Keys; ++k)
        for (int64_t i = 0; i < width - d; ++i) rest[k * chunk + i] = keys[k * key_stride + d + i];
      add_chunk<Rows>(sum, queries + d, query_stride, rest, chunk);
    }
    store_sums<Rows>(sum, scores, score_stride);
  }

  template <int Rows, int Chunks, bool Whole>
  static ATTNRB_INLINE void mix(const Probability* probabilities, int64_t probability_stride, const T* values,
                                int64_t value_stride, int64_t count, int64_t columns, float* sums, int64_t sum_stride,
                                Upcoming& ahead) {
    constexpr int Vectors = 2 * Chunks;
    Vec sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::load(sums + r * sum_stride + v * Vec::width);
    int64_t j = 0;
    for (; j + Vec::width <= count; j += Vec::width, values += Vec::width * value_stride) {
      ahead.fetch(Vec::width);
      Vec p[Rows];
      for (int r = 0; r < Rows; ++r) p[r] = Vec::load(probabilities + r * probability_stride + j);
      add_row<0, Chunks, Whole>(p, values, columns, sum);
      add_row<1, Chunks, Whole>(p, values + value_stride, columns, sum);
      add_row<2, Chunks, Whole>(p, values + 2 * value_stride, columns, sum);
      add_row<3, Chunks, Whole>(p, values + 3 * value_stride, columns, sum);
    }
    for (; j < count; ++j, values += value_stride) {
      ahead.fetch(1);
      Vec p[Rows];
      for (int r = 0; r < Rows; ++r) p[r] = Vec::set(probabilities[r * probability_stride + j]);
      add_row<0, Chunks, Whole>(p, values, columns, sum);
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v].store(sums + r * sum_stride + v * Vec::width);
  }

 private:
  // A chunk of the queries with that of each key.
  template <int Rows>
  static ATTNRB_INLINE void add_chunk(Vec (&sum)[products], const Query* queries, int64_t query_stride, const T* keys,
                                      int64_t key_stride) {
    constexpr int Keys = products / Rows;
    Vec query_low[Rows], query_high[Rows];
    for (int r = 0; r < Rows; ++r) {
      query_low[r] = Vec::load(queries + r * query_stride);
      query_high[r] = Vec::load(queries + r * query_stride + Vec::width);
    }
    for (int k = 0; k < Keys; ++k) {
      Vec low, high;
      load_pair(keys + k * key_stride, low, high);
      for (int r = 0; r < Rows; ++r)
        sum[r * Keys + k] = Vec::fma_pair(query_low[r], low, query_high[r], high, sum[r * Keys + k]);
    }
  }

  // sum[r] += lane Lane of p[r] times a row of values.
  template <int Lane, int Chunks, bool Whole, int Rows, int Vectors>
  static ATTNRB_INLINE void add_row(const Vec (&p)[Rows], const T* values, int64_t columns, Vec (&sum)[Rows][Vectors]) {
    Vec value[Vectors];
    for (int c = 0; c < Chunks; ++c) {
      if (Whole)
        load_pair(values + c * chunk, value[2 * c], value[2 * c + 1]);
      else
        load_pair(values + c * chunk, int(columns - c * chunk), value[2 * c], value[2 * c + 1]);
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::fma_lane<Lane>(p[r], value[v], sum[r][v]);
  }
};

template <class T>
struct NeonGradientEngine : FloatGradientEngine<T>, FloatProduct {
  static constexpr int chain = FloatGradientEngine<T>::chain;
};

// What serves an element type: see FloatChoice in table.h.
template <class T>
struct NeonChoice {
  using Engine = FloatEngine<T>;
  using Dot = NeonDot<T>;
  using GradientEngine = NeonGradientEngine<T>;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
