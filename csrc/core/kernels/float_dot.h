// Products of a few query rows with key and value rows where they lie, for decode.h.
#pragma once

#include "float_engine.h"
#include "pairs.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Rows that will be read next, fetched into the cache a few at a time while others are being used: keys and values
// alternate block by block, which the hardware's own prefetchers take for the end of a stream each time.
struct Upcoming {
  const char* next = nullptr;
  int64_t stride = 0, row_bytes = 0, rows = 0;

  // Adjacent rows become `shares` times as many, for as many walks over a block to fetch them between them.
  void divide(int64_t shares) {
    if (shares == 0 || stride != row_bytes) return;  // no walk: values of width 0
    rows *= shares;
    stride = row_bytes = (row_bytes + shares - 1) / shares;
  }

  // May ask for a line beyond the last row, which harms nothing.
  ATTNRB_INLINE void fetch(int64_t count) {
    if (rows <= 0) return;
    rows -= count;
    const bool adjacent = stride == row_bytes;
    const int64_t runs = adjacent ? 1 : count, bytes = adjacent ? count * row_bytes : row_bytes;
    for (int64_t run = 0; run < runs; ++run, next += adjacent ? bytes : stride)
      for (int64_t byte = 0; byte < bytes; byte += 128) {
        __builtin_prefetch(next + byte, 0, 3);
        __builtin_prefetch(next + byte + 64, 0, 3);
      }
  }
};

// Products of query rows with key and value rows where they lie, for any input type, in float32. Rows are read in
// chunks of two vectors; load_pair may deal out a chunk's components between the two in whatever order is
// cheapest, which packed queries and output sums then follow (`place`).
template <class T>
struct FloatDot : FloatProbabilities {
  using Input = T;
  using Query = float;
  static constexpr int exp2_degree = 6;
  static constexpr int chunk = 2 * Vec::width;
  static constexpr int products = Vec::width;  // of a row and a key that are added up at a time

  // Where component d lies in a row of packed queries or sums.
  static ATTNRB_INLINE int64_t place(int64_t d) { return d / chunk * chunk + pair_place(T(), int(d % chunk)); }

  static void pack_query(Query* out, const T* query, int64_t stride, int64_t width, float factor) {
    for (int64_t d = 0; d < round_up(width, chunk); ++d)
      out[place(d)] = d < width ? factor * to_float(query[d * stride]) : 0.0f;
  }

  // scores[r][0..Keys) for r < Rows with Rows * Keys = Vec::width accumulators in flight.
  template <int Rows>
  static ATTNRB_INLINE void dot(const Query* queries, int64_t query_stride, const T* keys, int64_t key_stride,
                                int64_t width, float* scores, int64_t score_stride) {
    constexpr int Keys = Vec::width / Rows;
    Vec sum[Rows * Keys];
    for (int i = 0; i < Rows * Keys; ++i) sum[i] = Vec::zero();
    int64_t d = 0;
    for (; d + chunk <= width; d += chunk) {
      Vec low[Keys], high[Keys];
      for (int k = 0; k < Keys; ++k) load_pair(keys + k * key_stride + d, low[k], high[k]);
      add_products<Rows, Keys>(sum, queries + d, query_stride, low, high);
    }
    if (d < width) {
      Vec low[Keys], high[Keys];
      for (int k = 0; k < Keys; ++k) load_pair(keys + k * key_stride + d, int(width - d), low[k], high[k]);
      add_products<Rows, Keys>(sum, queries + d, query_stride, low, high);
    }
    float total[Vec::width];
    Vec::sums(sum).store(total);
    for (int r = 0; r < Rows; ++r) std::memcpy(scores + r * score_stride, total + r * Keys, Keys * sizeof(float));
  }

  // sums[r][..] += probabilities[r][0..count) * values over Chunks chunks of columns, of which `columns` exist.
  template <int Rows, int Chunks, bool Whole>
  static ATTNRB_INLINE void mix(const Probability* probabilities, int64_t probability_stride, const T* values,
                                int64_t value_stride, int64_t count, int64_t columns, float* sums, int64_t sum_stride,
                                Upcoming& ahead) {
    constexpr int Vectors = 2 * Chunks;
    Vec sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::load(sums + r * sum_stride + v * Vec::width);
    for (int64_t j = 0; j < count; ++j, values += value_stride) {
      ahead.fetch(1);
      Vec value[Vectors];
      for (int c = 0; c < Chunks; ++c) {
        if (Whole)
          load_pair(values + c * chunk, value[2 * c], value[2 * c + 1]);
        else
          load_pair(values + c * chunk, int(columns - c * chunk), value[2 * c], value[2 * c + 1]);
      }
      for (int r = 0; r < Rows; ++r) {
        const Vec p = Vec::set(probabilities[r * probability_stride + j]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::fma(p, value[v], sum[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v].store(sums + r * sum_stride + v * Vec::width);
  }

 private:
  template <int Rows, int Keys>
  static ATTNRB_INLINE void add_products(Vec* sum, const Query* queries, int64_t query_stride, const Vec* low,
                                         const Vec* high) {
    for (int r = 0; r < Rows; ++r) {
      const Vec query_low = Vec::load(queries + r * query_stride);
      const Vec query_high = Vec::load(queries + r * query_stride + Vec::width);
      for (int k = 0; k < Keys; ++k)
        sum[r * Keys + k] = Vec::fma_pair(query_low, low[k], query_high, high[k], sum[r * Keys + k]);
    }
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
