// Products of bfloat16 with FEAT_BF16 of ARMv8.6, accumulated in float32.
//
// Note: [Products of pairs of rows]
// BFMMLA takes two rows of four numbers from each side and adds the four products of rows to four sums: four times the
// work of a multiply-add. Queries, keys, probabilities and transposed values lie so that a register is two neighbouring
// rows (or columns of the result) and four neighbours on the summed axis:
//   queries        [rows / 2][depth][2][4]            probabilities  [rows / 2][keys / 4][2][4]
//   keys           [keys / 8][depth][4][2][4]         values         [columns / 8][keys / 4][4][2][4]
// with depth = width / 4, rounded up. A tile is 8 rows by 8 columns: 16 sums, to which 4 + 4 registers add 16 products.
// BFDOT, half as much work, serves where rows are few (decode) or come transposed (the backward).
//
// Both round their sums to odd and take subnormal numbers as zeros: an addition errs by up to one unit in the last
// place of float32 instead of half of one, far below the 8 bits of a factor, so chains need no cutting. Probabilities
// are rounded to bfloat16, as PyTorch rounds them.
#pragma once

#include "decode.h"
#include "neon_engine.h"
#include "neon_pairs.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct NeonBf16Probabilities {
  using Probability = bfloat16;
  using Places = InOrder;
  static constexpr int exp2_degree = 4;

  static ATTNRB_INLINE void store_probabilities(Probability* row, int64_t key, Vec a, Vec b) {
    store_halves(row + key, round_pair(a, b));
  }
  static ATTNRB_INLINE float load_probability(const Probability* row, int64_t key) { return to_float(row[key]); }
  static ATTNRB_INLINE void scale_probability(Probability* row, int64_t key, float factor) {
    row[key] = from_float<bfloat16>(to_float(row[key]) * factor);
  }
};

struct NeonBf16Engine : RowByRow, NeonBf16Probabilities {
  using Input = bfloat16;
  static constexpr int key_granule = 8;
  static constexpr int tile = 8;              // rows and columns of a tile
  static constexpr int64_t step = tile * 4;   // elements of a column panel in four summed neighbours
  static constexpr int64_t row_step = 2 * 4;  // of two rows
  static_assert(strip % tile == 0 && block_keys % tile == 0 && key_granule % tile == 0, "blocks hold whole tiles");

  explicit NeonBf16Engine(const Shape& shape)
      : width(shape.width),
        value_width(shape.value_width),
        depth((shape.width + 3) / 4),
        value_columns(round_up(shape.value_width, tile)) {}

  const int64_t width, value_width;
  const int64_t depth;  // of a score, in fours
  const int64_t value_columns;

  int64_t key_block_bytes() const { return block_keys * depth * 4 * int64_t(sizeof(Input)); }
  int64_t value_block_bytes() const { return block_keys * value_columns * int64_t(sizeof(Input)); }
  int64_t query_block_bytes() const { return block_rows * depth * 4 * int64_t(sizeof(Input)); }
  static constexpr int64_t probability_bytes() { return strip * block_keys * int64_t(sizeof(Probability)); }

  int64_t sum_row(int64_t r) const { return r * value_columns; }  // where the sums of a row of a block begin

  void start_worker() const {}
  void stop_worker() const {}

  template <class Rows>
  void pack_keys(void* packed, const Rows& keys, int64_t column_stride, int64_t count) const {
    for (int64_t key = 0; key < round_up(count, tile); key += 2) {
      bfloat16* out = static_cast<bfloat16*>(packed) + key / tile * depth * step + key % tile / 2 * row_step;
      for (int64_t d = 0; d < width; d += 8) {
        const int n = int(smaller(width - d, int64_t(8)));
        const auto load = [&](int64_t k) {
          return k < count ? load_halves(keys[k] + d * column_stride, column_stride, n) : vdupq_n_u16(0);
        };
        uint16x8_t low, high;
        join_quads(load(key), load(key + 1), low, high);
        store_halves(out + d / 4 * step, low);
        if (n > 4) store_halves(out + (d / 4 + 1) * step, high);
      }
    }
  }

  template <class Rows>
  void pack_values(void* packed, const Rows& values, int64_t column_stride, int64_t count) const {
    for (int64_t row = 0; row < round_up(count, key_granule); row += 4)
      for (int64_t d = 0; d < value_columns; d += tile) {
        const int n = int(smaller(value_width - d, int64_t(tile)));
        const auto load = [&](int64_t r) {
          return r < count ? load_halves(values[r] + d * column_stride, column_stride, n) : vdupq_n_u16(0);
        };
        const uint16x8_t a = load(row), b = load(row + 1), c = load(row + 2), e = load(row + 3);
        bfloat16* out = static_cast<bfloat16*>(packed) + d * block_keys + row / 4 * step;
        store_columns(out, vzip1q_u16(a, c), vzip1q_u16(b, e));
        store_columns(out + 2 * row_step, vzip2q_u16(a, c), vzip2q_u16(b, e));
      }
  }

  void pack_query_row(void* packed, int64_t row, const Input* query, int64_t column_stride, float factor) const {
    bfloat16* out = static_cast<bfloat16*>(packed) + row / 2 * depth * row_step + row % 2 * 4;
    for (int64_t d = 0; d < width; d += 8) {
      const int n = int(smaller(width - d, int64_t(8)));
      const uint16x8_t halves =
          query == nullptr ? vdupq_n_u16(0) : times(load_halves(query + d * column_stride, column_stride, n), factor);
      vst1_u16(reinterpret_cast<uint16_t*>(out + d / 4 * row_step), vget_low_u16(halves));
      if (n > 4) vst1_u16(reinterpret_cast<uint16_t*>(out + (d / 4 + 1) * row_step), vget_high_u16(halves));
    }
  }

  // scores[rows, block_keys] of the keys [first, last) (multiples of key_granule) and the query rows from `row` on.
  void scores(const void* queries, int64_t row, int64_t rows, const void* keys, int64_t first, int64_t last,
              float* scores) const {
    const bfloat16* query = static_cast<const bfloat16*>(queries) + row / 2 * depth * row_step;
    for (int64_t key = first; key < last; key += tile)
      for (int64_t r = 0; r < rows; r += tile)
        multiply_tile<false>(query + r / 2 * depth * row_step, depth * row_step,
                             static_cast<const bfloat16*>(keys) + key / tile * depth * step,
                             scores + r * block_keys + key, block_keys, depth);
  }

  // sums[rows, value_columns] += probabilities[rows, first..last) * values.
  void accumulate(const void* probabilities, int64_t rows, const void* values, int64_t first, int64_t last, float* sums,
                  bool /*fresh*/) const {
    const int64_t steps = (last - first) / 4;
    bfloat16 pairs[strip * block_keys];
    for (int64_t r = 0; r < round_up(rows, tile); r += 2)
      pack_probabilities(pairs + r / 2 * steps * row_step,
                         static_cast<const Probability*>(probabilities) + r * block_keys + first, last - first);
    for (int64_t column = 0; column < value_columns; column += tile)
      for (int64_t r = 0; r < rows; r += tile)
        multiply_tile<true>(pairs + r / 2 * steps * row_step, steps * row_step,
                            static_cast<const bfloat16*>(values) + column * block_keys + first / 4 * step,
                            sums + r * value_columns + column, value_columns, steps);
  }

 private:
  // Four rows of values, alternating, become two pairs of columns.
  static ATTNRB_INLINE void store_columns(bfloat16* out, uint16x8_t even, uint16x8_t odd) {
    store_halves(out, vzip1q_u16(even, odd));
    store_halves(out + row_step, vzip2q_u16(even, odd));
  }

  // Two rows of probabilities, `count` (a multiple of 8) of each.
  static ATTNRB_INLINE void pack_probabilities(bfloat16* out, const Probability* row, int64_t count) {
    for (int64_t j = 0; j < count; j += 8, out += 2 * row_step) {
      uint16x8_t low, high;
      join_quads(load_halves(row + j, 8), load_halves(row + block_keys + j, 8), low, high);
      store_halves(out, low);
      store_halves(out + row_step, high);
    }
  }

  // c[8, 8] (+)= a * b over `steps` times four neighbours; pairs of rows of a lie a_stride apart.
  template <bool Accumulate>
  static ATTNRB_INLINE void multiply_tile(const bfloat16* a, int64_t a_stride, const bfloat16* b, float* c,
                                          int64_t c_stride, int64_t steps) {
    constexpr int kPairs = tile / 2;
    float32x4_t sum[kPairs][kPairs];
    for (int p = 0; p < kPairs; ++p)
      for (int q = 0; q < kPairs; ++q) sum[p][q] = vdupq_n_f32(0.0f);
    for (int64_t s = 0; s < steps; ++s, a += row_step, b += step) {
      bfloat16x8_t columns[kPairs];
      for (int q = 0; q < kPairs; ++q) columns[q] = vreinterpretq_bf16_u16(load_halves(b + q * row_step, 8));
      for (int p = 0; p < kPairs; ++p) {
        const bfloat16x8_t rows = vreinterpretq_bf16_u16(load_halves(a + p * a_stride, 8));
        for (int q = 0; q < kPairs; ++q) sum[p][q] = vbfmmlaq_f32(sum[p][q], rows, columns[q]);
      }
    }
    for (int p = 0; p < kPairs; ++p)
      for (int q = 0; q < kPairs; q += 2) {
        float* out = c + 2 * p * c_stride + 2 * q;
        store_sum<Accumulate>(out, {Vec::low_halves(sum[p][q], sum[p][q + 1])});
        store_sum<Accumulate>(out + c_stride, {Vec::high_halves(sum[p][q], sum[p][q + 1])});
      }
  }

  template <bool Accumulate>
  static ATTNRB_INLINE void store_sum(float* out, Vec sum) {
    (Accumulate ? Vec::load(out) + sum : sum).store(out);
  }
};

// Products of query rows with key and value rows where they lie; see NeonDot.
struct NeonBf16Dot : NeonBf16Probabilities {
  using Input = bfloat16;
  using Query = bfloat16;
  static constexpr int chunk = 8;
  static constexpr int products = kDotProducts;

  static ATTNRB_INLINE int64_t place(int64_t d) { return d; }

  static void pack_query(Query* out, const Input* query, int64_t stride, int64_t width, float factor) {
    for (int64_t d = 0; d < width; d += chunk)
      store_halves(out + d, times(load_halves(query + d * stride, stride, int(width - d)), factor));
  }

  template <int Rows>
  static ATTNRB_INLINE void dot(const Query* queries, int64_t query_stride, const Input* keys, int64_t key_stride,
                                int64_t width, float* scores, int64_t score_stride) {
    Vec sum[products];
    for (int i = 0; i < products; ++i) sum[i] = Vec::zero();
    int64_t d = 0;
    for (; d + chunk <= width; d += chunk) add_chunk<Rows>(sum, queries + d, query_stride, keys + d, key_stride, chunk);
    if (d < width) add_chunk<Rows>(sum, queries + d, query_stride, keys + d, key_stride, int(width - d));
    store_sums<Rows>(sum, scores, score_stride);
  }

  template <int Rows, int Chunks, bool Whole>
  static ATTNRB_INLINE void mix(const Probability* probabilities, int64_t probability_stride, const Input* values,
                                int64_t value_stride, int64_t count, int64_t columns, float* sums, int64_t sum_stride,
                                Upcoming& ahead) {
    constexpr int Vectors = 2 * Chunks;
    Vec sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::load(sums + r * sum_stride + v * Vec::width);
    int64_t j = 0;
    for (; j + 8 <= count; j += 8, values += 8 * value_stride) {
      ahead.fetch(8);
      uint16x8_t p[Rows];
      for (int r = 0; r < Rows; ++r) p[r] = load_halves(probabilities + r * probability_stride + j, 8);
      add_rows<0, Chunks, Whole>(p, values, values + value_stride, columns, sum);
      add_rows<1, Chunks, Whole>(p, values + 2 * value_stride, values + 3 * value_stride, columns, sum);
      add_rows<2, Chunks, Whole>(p, values + 4 * value_stride, values + 5 * value_stride, columns, sum);
      add_rows<3, Chunks, Whole>(p, values + 6 * value_stride, values + 7 * value_stride, columns, sum);
    }
    for (; j < count; j += 2, values += 2 * value_stride) {
      const int pair = int(smaller(count - j, int64_t(2)));
      ahead.fetch(pair);
      uint16x8_t p[Rows];
      for (int r = 0; r < Rows; ++r) p[r] = load_halves(probabilities + r * probability_stride + j, pair);
      add_rows<0, Chunks, Whole>(p, values, pair == 2 ? values + value_stride : nullptr, columns, sum);
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v].store(sums + r * sum_stride + v * Vec::width);
  }

 private:
  // n components of the queries with those of each key.
  template <int Rows>
  static ATTNRB_INLINE void add_chunk(Vec (&sum)[products], const Query* queries, int64_t query_stride,
                                      const Input* keys, int64_t key_stride, int n) {
    constexpr int Keys = products / Rows;
    uint16x8_t query[Rows];
    for (int r = 0; r < Rows; ++r) query[r] = load_halves(queries + r * query_stride, chunk);
    for (int k = 0; k < Keys; ++k) {
      const uint16x8_t key = load_halves(keys + k * key_stride, n);
      for (int r = 0; r < Rows; ++r) sum[r * Keys + k] = add_pairs(query[r], key, sum[r * Keys + k]);
    }
  }

  // sum[r] += pair Lane of p[r] times two rows of values; a null row is zeros.
  template <int Lane, int Chunks, bool Whole, int Rows, int Vectors>
  static ATTNRB_INLINE void add_rows(const uint16x8_t (&p)[Rows], const Input* even, const Input* odd, int64_t columns,
                                     Vec (&sum)[Rows][Vectors]) {
    uint16x8_t pairs[Vectors];
    for (int c = 0; c < Chunks; ++c) {
      const int n = Whole ? chunk : int(columns - c * chunk);
      const uint16x8_t a = load_halves(even + c * chunk, n);
      const uint16x8_t b = odd == nullptr ? vdupq_n_u16(0) : load_halves(odd + c * chunk, n);
      pairs[2 * c] = vzip1q_u16(a, b);
      pairs[2 * c + 1] = vzip2q_u16(a, b);
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = add_pairs_by_lane<Lane>(p[r], pairs[v], sum[r][v]);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
