// Tile products of the forward on Intel AMX (amx_tiles.h).
#pragma once

#include "amx_tiles.h"
#include "float_engine.h"

namespace attnrb {
namespace ATTNRB_ISA {

// T is bfloat16 (one plane) or float16 (two planes, three products).
template <class T>
struct AmxEngine {
  using Input = T;
  using Probability = bfloat16;
  static constexpr bool two_planes = sizeof(T) == 2 && !std::is_same<T, bfloat16>::value;
  static constexpr int planes = two_planes ? 2 : 1;
  static constexpr int exp2_degree = two_planes ? 6 : 4;
  static constexpr int strip = 32;
  static constexpr int block_rows = 128;
  static constexpr int block_keys = 256;
  static constexpr int key_granule = 32;

  explicit AmxEngine(const Shape& shape)
      : width(shape.width),
        value_width(shape.value_width),
        columns(round_up(shape.width, 32)),
        value_columns(round_up(shape.value_width, 32)) {}

  const int64_t width, value_width;
  const int64_t columns, value_columns;

  int64_t key_plane() const { return block_keys * columns; }
  int64_t value_plane() const { return block_keys * value_columns; }
  int64_t query_plane() const { return block_rows * columns; }
  static constexpr int64_t probability_plane = strip * block_keys;

  int64_t key_block_bytes() const { return planes * key_plane() * 2; }
  int64_t value_block_bytes() const { return planes * value_plane() * 2; }
  int64_t query_block_bytes() const { return planes * query_plane() * 2; }
  static constexpr int64_t probability_bytes() { return planes * probability_plane * 2; }

  void start_worker() const { start_tiles(); }
  void stop_worker() const { stop_tiles(); }

  // Tiles [block_keys / 16][columns / 32], see Note: [AMX tile layouts].
  template <class Rows>
  void pack_keys(void* packed, const Rows& keys, int64_t column_stride, int64_t count) const {
    bfloat16* out = static_cast<bfloat16*>(packed);
    for (int64_t key = 0; key < round_up(count, key_granule); key += 16)
      for (int64_t d = 0; d < columns; d += 32, out += kTileElements) {
        pack_key_tile<0>(out, keys, key, column_stride, count, d);
        if constexpr (two_planes) pack_key_tile<1>(out + key_plane(), keys, key, column_stride, count, d);
      }
  }

  // Tiles [value_columns / 16][block_keys / 32], see Note: [AMX tile layouts].
  template <class Rows>
  void pack_values(void* packed, const Rows& values, int64_t column_stride, int64_t count) const {
    bfloat16* out = static_cast<bfloat16*>(packed);
    for (int64_t d = 0; d < value_columns; d += 32)
      for (int64_t key = 0; key < round_up(count, key_granule); key += 2) {
        bfloat16* row = out + d / 16 * (block_keys / 32) * kTileElements + key / 32 * kTileElements + key % 32 / 2 * 32;
        pack_value_pair<0>(row, values, key, column_stride, count, d);
        if constexpr (two_planes) pack_value_pair<1>(row + value_plane(), values, key, column_stride, count, d);
      }
  }

  void pack_query_row(void* packed, int64_t row, const T* query, int64_t column_stride, float factor) const {
    for (int64_t d = 0; d < columns; d += 32) {
      bfloat16* out = static_cast<bfloat16*>(packed) + row * columns + d;
      T copy[32];
      const T* in = nullptr;
      const int n = query == nullptr ? 0 : components(width, d);
      if (n > 0) {
        in = query + d * column_stride;
        if (column_stride != 1 || factor != 1.0f) {
          for (int i = 0; i < n; ++i) copy[i] = from_float<T>(factor * to_float(in[i * column_stride]));
          in = copy;
        }
      }
      _mm512_storeu_si512(out, n > 0 ? load_plane<0>(in, n) : _mm512_setzero_si512());
      if constexpr (two_planes)
        _mm512_storeu_si512(out + query_plane(), n > 0 ? load_plane<1>(in, n) : _mm512_setzero_si512());
    }
  }

  void scores(const void* queries, int64_t row, int64_t rows, const void* keys, int64_t first, int64_t last,
              float* scores) const {
    const bfloat16* query = static_cast<const bfloat16*>(queries) + row * columns;
    const bfloat16* key = static_cast<const bfloat16*>(keys) + first / 16 * (columns / 32) * kTileElements;
    const int64_t column_tiles = columns / 32 * kTileElements;
    for (int64_t j = first; j < last; j += 32, key += 2 * column_tiles) {
      const Operand a{query, columns * 2, 32, 16 * columns, query_plane()};
      const Operand b{key, 64, kTileElements, column_tiles, key_plane()};
      if (rows > 16) {
        zero_tiles();
        multiply<true>(a, b, columns / 32);
        store_tiles<true>(scores + j, block_keys);
      } else {
        zero_tiles();
        multiply<false>(a, b, columns / 32);
        store_tiles<false>(scores + j, block_keys);
      }
    }
  }

  void accumulate(const Probability* probabilities, int64_t rows, const void* values, int64_t first, int64_t last,
                  float* sums) const {
    const int64_t column_tiles = block_keys / 32 * kTileElements;
    const bfloat16* value = static_cast<const bfloat16*>(values) + first / 32 * kTileElements;
    for (int64_t d = 0; d < value_columns; d += 32, value += 2 * column_tiles) {
      const Operand a{probabilities + first, block_keys * 2, 32, 16 * block_keys, probability_plane};
      const Operand b{value, 64, kTileElements, column_tiles, value_plane()};
      if (rows > 16) {
        load_tiles<true>(sums + d, value_columns);
        multiply<true>(a, b, (last - first) / 32);
        store_tiles<true>(sums + d, value_columns);
      } else {
        load_tiles<false>(sums + d, value_columns);
        multiply<false>(a, b, (last - first) / 32);
        store_tiles<false>(sums + d, value_columns);
      }
    }
  }

  static ATTNRB_INLINE void store_probabilities(Probability* row, int64_t key, Vec a, Vec b) {
    _mm512_storeu_si512(row + key, split<0>(a, b));
    if constexpr (two_planes) _mm512_storeu_si512(row + probability_plane + key, split<1>(a, b));
  }
  static ATTNRB_INLINE float load_probability(const Probability* row, int64_t key) {
    const float high = to_float(row[key]);
    return two_planes ? high + to_float(row[probability_plane + key]) : high;
  }
  static ATTNRB_INLINE void scale_probability(Probability* row, int64_t key, float factor) {
    const float scaled = load_probability(row, key) * factor;
    row[key] = from_float<bfloat16>(scaled);
    if (two_planes) row[probability_plane + key] = from_float<bfloat16>(scaled - to_float(row[key]));
  }

 private:
  // Where the tiles of a factor lie: bytes between tile rows, elements to the next tile along the summed axis, to the
  // second tile along the other axis, and to the plane of low halves.
  struct Operand {
    const bfloat16* data;
    int64_t row_bytes, next, second, plane;
  };

  static int components(int64_t total, int64_t d) { return int(total - d < 32 ? (total - d > 0 ? total - d : 0) : 32); }

  // Gathers strided components so that load_plane can read them.
  template <int Plane>
  static ATTNRB_INLINE __m512i load_components(const T* p, int64_t column_stride, int n) {
    if (n <= 0) return _mm512_setzero_si512();
    if (column_stride == 1) return load_plane<Plane>(p, n);
    T copy[32];
    for (int i = 0; i < n; ++i) copy[i] = p[i * column_stride];
    return load_plane<Plane>(copy, n);
  }

  template <int Plane, class Rows>
  void pack_key_tile(bfloat16* tile, const Rows& keys, int64_t key, int64_t column_stride, int64_t count,
                     int64_t d) const {
    // A pair of components is one 32-bit element here: the keys' rows become the tile's columns.
    Vec rows[16];
    const int n = components(width, d);
    for (int i = 0; i < 16; ++i)
      rows[i].v = _mm512_castsi512_ps(key + i < count
                                          ? load_components<Plane>(keys[key + i] + d * column_stride, column_stride, n)
                                          : _mm512_setzero_si512());
    Vec::transpose(rows);
    for (int i = 0; i < 16; ++i) rows[i].store(reinterpret_cast<float*>(tile) + 16 * i);
  }

  template <int Plane, class Rows>
  void pack_value_pair(bfloat16* row, const Rows& values, int64_t key, int64_t column_stride, int64_t count,
                       int64_t d) const {
    const int n = components(value_width, d);
    const auto load = [&](int64_t r) {
      return r < count ? load_components<Plane>(values[r] + d * column_stride, column_stride, n)
                       : _mm512_setzero_si512();
    };
    const __m512i even = load(key), odd = load(key + 1);
    __m512i low, high;
    interleave(even, odd, low, high);
    _mm512_storeu_si512(row, low);
    _mm512_storeu_si512(row + block_keys / 32 * kTileElements, high);
  }

  static ATTNRB_INLINE void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  template <bool TwoRowTiles>
  static ATTNRB_INLINE void load_tiles(const float* c, int64_t stride) {
    _tile_loadd(0, c, stride * 4);
    _tile_loadd(1, c + 16, stride * 4);
    if (TwoRowTiles) {
      _tile_loadd(2, c + 16 * stride, stride * 4);
      _tile_loadd(3, c + 16 * stride + 16, stride * 4);
    }
  }

  template <bool TwoRowTiles>
  static ATTNRB_INLINE void store_tiles(float* c, int64_t stride) {
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    if (TwoRowTiles) {
      _tile_stored(2, c + 16 * stride, stride * 4);
      _tile_stored(3, c + 16 * stride + 16, stride * 4);
    }
  }

  // Accumulators 0..3 += a * b over `depth` tiles. Tiles 4, 5 hold a's two row tiles, 6, 7 b's two column tiles.
  template <bool TwoRowTiles>
  static ATTNRB_INLINE void multiply(const Operand& a, const Operand& b, int64_t depth) {
    const bfloat16 *pa = a.data, *pb = b.data;
    for (int64_t k = 0; k < depth; ++k, pa += a.next, pb += b.next) {
      _tile_loadd(4, pa, a.row_bytes);
      _tile_loadd(6, pb, b.row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, pb + b.second, b.row_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if (TwoRowTiles) {
        _tile_loadd(5, pa + a.second, a.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if constexpr (two_planes) {
        // low * high while b's high halves are loaded, then high * low.
        const bfloat16 *low_a = pa + a.plane, *low_b = pb + b.plane;
        _tile_loadd(4, low_a, a.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TwoRowTiles) {
          _tile_loadd(5, low_a + a.second, a.row_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(4, pa, a.row_bytes);
        _tile_loadd(6, low_b, b.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, low_b + b.second, b.row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (TwoRowTiles) {
          _tile_loadd(5, pa + a.second, a.row_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
