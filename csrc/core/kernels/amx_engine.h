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
            interleave(load(key + i, d), load(key + i + 16, d), low, high);
            bfloat16* tile = out + (d / 32 * (block_keys / 32) + key / 32) * kBlockElements + i * 32;
            _mm512_storeu_si512(tile, low);
            _mm512_storeu_si512(tile + kTileElements, high);
          }
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
  // Of 16 rows, whose probabilities begin here: those in `rows` multiply that of one key, their lane of `keys`, by
  // their lane of `factor`. Returns by how much they grew. A pair of probabilities is a lane of 32 bits.
  static ATTNRB_INLINE Vec scale_probabilities(Probability* probabilities, __m512i keys, __mmask16 rows, Vec factor) {
    const __m512i of_row = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    const __m512i place = _mm512_add_epi32(_mm512_add_epi32(of_row, _mm512_and_si512(keys, _mm512_set1_epi32(15))),
                                           _mm512_slli_epi32(_mm512_srli_epi32(keys, 5), 9));
    const __mmask16 second = _mm512_test_epi32_mask(keys, _mm512_set1_epi32(16));
    int* const high = reinterpret_cast<int*>(probabilities);
    const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), rows, place, high, 4);
    Vec before = half_of(pairs, second);
    if constexpr (two_planes<T>) {
      int* const low = reinterpret_cast<int*>(probabilities + probability_plane);
      const __m512i rest = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), rows, place, low, 4);
      before = before + half_of(rest, second);
      const Vec scaled = before * factor;
      const __m512i rounded = put_half(pairs, second, scaled);
      const Vec kept = half_of(rounded, second);
      const __m512i rounded_rest = put_half(rest, second, scaled - kept);
      _mm512_mask_i32scatter_epi32(high, rows, place, rounded, 4);
      _mm512_mask_i32scatter_epi32(low, rows, place, rounded_rest, 4);
      return Vec::select(rows, kept + half_of(rounded_rest, second) - before, Vec::zero());
    } else {
      const __m512i rounded = put_half(pairs, second, before * factor);
      _mm512_mask_i32scatter_epi32(high, rows, place, rounded, 4);
      return Vec::select(rows, half_of(rounded, second) - before, Vec::zero());
    }
  }

 private:
  static ATTNRB_INLINE Vec half_of(__m512i pairs, __mmask16 second) {
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_mask_and_epi32(_mm512_slli_epi32(pairs, 16), second, pairs, high))};
  }
  static ATTNRB_INLINE __m512i put_half(__m512i pairs, __mmask16 second, Vec x) {
    const __m512i high = _mm512_set1_epi32(int(0xffff0000u)), low = _mm512_set1_epi32(0xffff);
    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x.v));
    return _mm512_or_si512(_mm512_and_si512(pairs, _mm512_mask_blend_epi32(second, high, low)),
                           _mm512_mask_slli_epi32(half, second, half, 16));
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
