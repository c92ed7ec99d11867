// Tile products of the forward on Intel AMX (amx_tiles.h).
//
// Note: [Tiles of the forward]
// Operands are blocks of 1024 elements (Note: [AMX tile layouts]), the summed axis innermost:
//   queries        [strip of 32 rows][plane][32 components]     keys      [32 keys][32 components]
//   probabilities  [32 keys]                                    values    [32 components][32 keys]
// Scores of a strip are [32 keys], its sums [32 components], 1024 floats each. A row of 32 probabilities holds the keys
// 0, 16, 1, 17, ..: two registers of them are rounded and merged without a permutation. Rows i and i + 16 of 32 values
// lie side by side for it.
#pragma once

#include "amx_tiles.h"
#include "float_engine.h"
#include "row_groups.h"

namespace attnrb {
namespace ATTNRB_ISA {

// T is bfloat16, or float16 in two planes.
template <class T>
struct AmxEngine : RowGroups<AmxEngine<T>> {
  using Input = T;
  using Probability = bfloat16;
  using Places = TilePlaces;
  static constexpr int planes = two_planes<T> ? 2 : 1;
  static constexpr int exp2_degree = two_planes<T> ? 6 : 4;
  static constexpr int strip = 32;
  static constexpr int block_rows = 256;
  static constexpr int block_keys = 256;
  static constexpr int key_granule = 32;
  static constexpr bool starts_fresh = true;
  using Group = RowGroup;

  explicit AmxEngine(const Shape& shape)
      : width(shape.width),
        value_width(shape.value_width),
        columns(round_up(shape.width, 32)),
        value_columns(round_up(shape.value_width, 32)) {}

  const int64_t width, value_width;
  const int64_t columns, value_columns;

  // Keys and values come from the second-level cache, so that more rows than fit the first share them where keys far
  // outnumber queries.
  static int64_t rows_at_once(int64_t queries, int64_t keys) {
    return keys >= 4 * queries ? block_rows : block_rows / 2;
  }
  // Rows whose queries and sums find room in the second-level cache beside a block of keys (Note: [Keys packed in
  // passing]): half of 2 MB. More narrow rows than 1,024 gain nothing, and lose where what they collect needs room too.
  int64_t rows_together() const {
    constexpr int64_t kBytes = int64_t(1) << 20, kMost = 1024;
    return smaller(kMost, kBytes / (planes * columns * 2 + value_columns * 4));
  }

  int64_t key_plane() const { return block_keys * columns; }
  int64_t value_plane() const { return block_keys * value_columns; }
  static constexpr int64_t probability_plane = strip * block_keys;

  int64_t key_block_bytes() const { return planes * key_plane() * 2; }
  int64_t value_block_bytes() const { return planes * value_plane() * 2; }
  int64_t query_block_bytes() const { return planes * block_rows * columns * 2; }
  static constexpr int64_t probability_bytes() { return planes * probability_plane * 2; }

  // Where rows of a strip begin, at the key `first`, and where the sums of a row of a block do.
  static ATTNRB_INLINE int64_t score_row(int64_t r, int64_t first) {
    return TilePlaces::row(r) + TilePlaces::place(first);
  }
  static ATTNRB_INLINE int64_t probability_row(int64_t r, int64_t first) {
    return first / 32 * kBlockElements + r / 16 * kTileElements + r % 16 * 32;
  }
  ATTNRB_INLINE int64_t sum_row(int64_t r) const { return r / 32 * 32 * value_columns + TilePlaces::row(r % 32); }

  void start_worker() const { start_tiles(); }
  void stop_worker() const { stop_tiles(); }

  template <class Rows>
  void pack_keys(void* packed, const Rows& keys, int64_t column_stride, int64_t count) const {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      bfloat16* out = static_cast<bfloat16*>(packed) + kPlane * key_plane();
      for (int64_t key = 0; key < round_up(count, key_granule); key += 16)
        for (int64_t d = 0; d < columns; d += 32) {
          // A pair of components is one 32-bit element here: the keys' rows become the tile's columns.
          Vec square[16];
          if (column_stride == 1 && key + 16 <= count && d + 32 <= width)
            for (int i = 0; i < 16; ++i) square[i].v = _mm512_castsi512_ps(load_plane<kPlane>(keys[key + i] + d, 32));
          else
            for (int i = 0; i < 16; ++i)
              square[i].v = _mm512_castsi512_ps(
                  load_components<kPlane>(key + i < count ? keys[key + i] : nullptr, d, column_stride, width));
          Vec::transpose(square);
          store_tile(out + key / 32 * 32 * columns + d / 32 * kBlockElements + key / 16 % 2 * kTileElements, square);
        }
    });
  }

  template <class Rows>
  void pack_values(void* packed, const Rows& values, int64_t column_stride, int64_t count) const {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      const auto load = [&](int64_t r, int64_t d) {
        return load_components<kPlane>(r < count ? values[r] : nullptr, d, column_stride, value_width);
      };
      bfloat16* out = static_cast<bfloat16*>(packed) + kPlane * value_plane();
      for (int64_t key = 0; key < round_up(count, key_granule); key += 32)
        for (int64_t i = 0; i < 16; ++i)
          for (int64_t d = 0; d < value_columns; d += 32) {
            __m512i low, high;
            if (column_stride == 1 && key + 32 <= count && d + 32 <= value_width)
              interleave(load_plane<kPlane>(values[key + i] + d, 32), load_plane<kPlane>(values[key + i + 16] + d, 32),
                         low, high);
            else
              interleave(load(key + i, d), load(key + i + 16, d), low, high);
            bfloat16* tile = out + (d / 32 * (block_keys / 32) + key / 32) * kBlockElements + i * 32;
            _mm512_storeu_si512(tile, low);
            _mm512_storeu_si512(tile + kTileElements, high);
          }
    });
  }

  // 16 rows of queries that follow each other, as many times.
  void pack_query_rows(void* packed, int64_t row, const T* query, int64_t row_stride, int64_t column_stride,
                       float factor) const {
    if (column_stride != 1 || factor != 1.0f || width != columns) {
      for (int64_t r = 0; r < 16; ++r) pack_query_row(packed, row + r, query + r * row_stride, column_stride, factor);
      return;
    }
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      bfloat16* out = static_cast<bfloat16*>(packed) + (row / 32 * planes + kPlane) * 32 * columns + row % 32 * 32;
      for (int64_t r = 0; r < 16; ++r)
        for (int64_t d = 0; d < columns; d += 32)
          _mm512_storeu_si512(out + d * (kBlockElements / 32) + r * 32,
                              load_plane<kPlane>(query + r * row_stride + d, 32));
    });
  }

  void pack_query_row(void* packed, int64_t row, const T* query, int64_t column_stride, float factor) const {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      bfloat16* out = static_cast<bfloat16*>(packed) + (row / 32 * planes + kPlane) * 32 * columns + row % 32 * 32;
      for (int64_t d = 0; d < columns; d += 32)
        _mm512_storeu_si512(out + d / 32 * kBlockElements,
                            load_components<kPlane>(query, d, column_stride, width, factor));
    });
  }

  void scores(const void* queries, int64_t row, int64_t rows, const void* keys, int64_t first, int64_t last,
              float* scores) const {
    if (rows > 16)
      multiply_keys<true>(queries, row, keys, first, last, scores);
    else
      multiply_keys<false>(queries, row, keys, first, last, scores);
  }

  // sums += probabilities * values, or are that where they are fresh.
  void accumulate(const Probability* probabilities, int64_t rows, const void* values, int64_t first, int64_t last,
                  float* sums, bool fresh) const {
    if (rows > 16 && fresh)
      multiply_values<true, false>(probabilities, values, first, last, sums);
    else if (rows > 16)
      multiply_values<true, true>(probabilities, values, first, last, sums);
    else if (fresh)
      multiply_values<false, false>(probabilities, values, first, last, sums);
    else
      multiply_values<false, true>(probabilities, values, first, last, sums);
  }

  // 16 rows of outputs: their sums, each row times its factor.
  void write_rows(T* out, int64_t row_stride, const float* sums, Vec factors) const {
    alignas(64) float factor[16];
    factors.store(factor);
    for (int r = 0; r < 16; ++r, out += row_stride, sums += 16) {
      const Vec by = Vec::set(factor[r]);
      int64_t d = 0;
      for (; d + 32 <= value_width; d += 32) {
        const float* const at = sums + TilePlaces::pair(d);
        store_pair(out + d, Vec::load(at) * by, Vec::load(at + TilePlaces::second) * by);
      }
      if (d < value_width) write_scaled<TilePlaces>(out + d, sums + TilePlaces::pair(d), value_width - d, factor[r]);
    }
  }

  static ATTNRB_INLINE void store_probabilities(Probability* row, int64_t key, Vec a, Vec b) {
    row += key / 32 * kBlockElements;
    if constexpr (two_planes<T>) {
      _mm512_storeu_si512(row, alternate(split<0>(a, b)));
      _mm512_storeu_si512(row + probability_plane, alternate(split<1>(a, b)));
    } else {
      // A NaN may become a number, but the row's sum, which divides it, stays NaN.
      _mm512_storeu_si512(row, round_alternate(a, b));
    }
  }
  static ATTNRB_INLINE float load_probability(const Probability* row, int64_t key) {
    const Probability* at = row + probability_place(key);
    return two_planes<T> ? to_float(at[0]) + to_float(at[probability_plane]) : to_float(at[0]);
  }
  static ATTNRB_INLINE void scale_probability(Probability* row, int64_t key, float factor) {
    const float scaled = load_probability(row, key) * factor;
    Probability* at = row + probability_place(key);
    at[0] = from_float<bfloat16>(scaled);
    if (two_planes<T>) at[probability_plane] = from_float<bfloat16>(scaled - to_float(at[0]));
  }
  // Of the 32 probabilities that lie here, those of keys that have a bit are multiplied. Returns by how much they grew.
  static ATTNRB_INLINE Vec scale_probabilities(Probability* row, uint32_t keys, Vec factor) {
    Vec first, last;
    load_probabilities(row, first, last);
    const Vec a{_mm512_mask_mul_ps(first.v, __mmask16(keys), first.v, factor.v)};
    const Vec b{_mm512_mask_mul_ps(last.v, __mmask16(keys >> 16), last.v, factor.v)};
    _mm512_storeu_si512(row, alternate(split<0>(a, b)));
    if constexpr (two_planes<T>) _mm512_storeu_si512(row + probability_plane, alternate(split<1>(a, b)));
    Vec first_now, last_now;
    load_probabilities(row, first_now, last_now);
    return (first_now - first) + (last_now - last);
  }

 private:
  // Of the keys 0 to 15, and 16 to 31.
  static ATTNRB_INLINE void load_probabilities(const Probability* row, Vec& first, Vec& last) {
    Vec::load_even_odd(row, first, last);
    if constexpr (two_planes<T>) {
      Vec first_low, last_low;
      Vec::load_even_odd(row + probability_plane, first_low, last_low);
      first = first + first_low;
      last = last + last_low;
    }
  }

  static ATTNRB_INLINE void store_pair(bfloat16* out, Vec a, Vec b) { _mm512_storeu_si512(out, round_pair(a, b)); }
  static ATTNRB_INLINE void store_pair(float16* out, Vec a, Vec b) {
    a.store(out);
    b.store(out + 16);
  }

  static ATTNRB_INLINE int64_t probability_place(int64_t key) {
    return key / 32 * kBlockElements + key % 16 * 2 + key / 16 % 2;
  }

  template <bool TwoRows>
  void multiply_keys(const void* queries, int64_t row, const void* keys, int64_t first, int64_t last,
                     float* scores) const {
    TileBlocks<two_planes<T>, true, TwoRows> blocks;
    settle_operands();
    const TileOperand left{static_cast<const bfloat16*>(queries) + row * planes * columns, 32 * columns};
    for (int64_t j = first; j < last; j += 32)
      blocks.template multiply<false>(left, {static_cast<const bfloat16*>(keys) + j * columns, key_plane()},
                                      columns / 32, scores + TilePlaces::place(j));
    blocks.flush();
  }

  template <bool TwoRows, bool Add>
  void multiply_values(const Probability* probabilities, const void* values, int64_t first, int64_t last,
                       float* sums) const {
    TileBlocks<two_planes<T>, true, TwoRows> blocks;
    settle_operands();
    const TileOperand left{probabilities + first / 32 * kBlockElements, probability_plane};
    const bfloat16* right = static_cast<const bfloat16*>(values) + first / 32 * kBlockElements;
    for (int64_t d = 0; d < value_columns; d += 32)
      blocks.template multiply<Add>(left, {right + d * block_keys, value_plane()}, (last - first) / 32,
                                    sums + TilePlaces::place(d));
    blocks.flush();
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
