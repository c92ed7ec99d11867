// Products of 32 x 32 blocks on Intel AMX: bfloat16 tiles, accumulated in float32. The forward (amx_engine.h) and the
// backward (amx_gradient_engine.h) pack their operands as these read them.
//
// Note: [AMX tile layouts]
// A product of tiles is C[16,16] += A[16 rows, 32] * B[32, 16 columns], where B is stored as 16 rows of 16 pairs: row p
// holds the elements 2p and 2p+1 of every column side by side. Every tile is one piece of 1 KB, so that no two of its
// rows meet in one set of a cache. A step of a block takes two row tiles of A, which follow each other, and two column
// tiles of B; the steps of a block follow each other too. Its sums are four tiles, of rows 0-15 and 16-31 in turn, and
// of columns 0-15 and 16-31 within: 1024 floats.
//
// Note: [Late tile stores]
// A multiplication waits for stores that come all at the end of a block. So the sums of a block stay in their tiles
// until the next one begins, which stores each of the four right before it takes it. flush() stores the last.
//
// Note: [Operands before tiles]
// GCC 12's tile loads do not say that they read memory: a plain store to an operand may legally be moved behind the
// load that wants it. settle_operands() stands between writing operands and loading them as tiles.
//
// Note: [float16 in two halves]
// A float16 number has 11 significant bits, a bfloat16 number 8. x = high + low with high = bfloat16(x) and low the
// rest, of at most 3 bits, is exact. x*y = high*high + high*low + low*high up to low*low, which is 2^-16 of the product
// at most and is left out: three tile products give float16 inputs float32-like accuracy. An operand of halves has two
// planes, the high and the low ones.
#pragma once

#include <type_traits>

#include "bf16_pairs.h"
#include "driver.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr int64_t kTileElements = 512;  // of an operand, 16 x 32 bfloat16
constexpr int64_t kTileSums = 256;      // 16 x 16 float32
constexpr int64_t kBlockElements = 2 * kTileElements, kBlockSums = 4 * kTileSums;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC 12 believes that loading it reads eight bytes: of an object on the stack it may write the rest later, or never.
inline constexpr TileConfig kTileConfig;

ATTNRB_INLINE void start_tiles() { _tile_loadconfig(&kTileConfig); }
ATTNRB_INLINE void stop_tiles() { _tile_release(); }

// See Note: [Operands before tiles].
ATTNRB_INLINE void settle_operands() { __asm__ volatile("" ::: "memory"); }

// Where the score of key j lies in its row, counted from a block of 32 keys on, and where a row of a strip of 32
// begins.
struct TilePlaces {
  static constexpr int64_t second = kTileSums;
  static ATTNRB_INLINE int64_t place(int64_t j) { return (j >> 5) * kBlockSums + (j >> 4 & 1) * kTileSums + (j & 15); }
  static ATTNRB_INLINE int64_t pair(int64_t j) { return j * (kBlockSums / 32); }
  static ATTNRB_INLINE int64_t row(int64_t r) { return (r >> 4) * (2 * kTileSums) + (r & 15) * 16; }
};

// The left or the right side of a block: `plane` is how far the low halves lie behind the high ones.
struct TileOperand {
  const bfloat16* data;
  int64_t plane;
};

// Tiles 0-3 accumulate a block, 4 and 5 hold the two row tiles, 6 and 7 the two column tiles. See Note: [Late tile
// stores].
//   Streamed: the right sides are too many for the first-level cache, and do not drive the rest out of it
//   TwoRows:  there are more than 16 rows; else the row tile of the others, and their sums, are left alone
template <bool TwoPlanes, bool Streamed = false, bool TwoRows = true>
class TileBlocks {
 public:
  // sums = left * right over so many steps, or are added to.
  template <bool Add>
  ATTNRB_INLINE void multiply(const TileOperand& left, const TileOperand& right, int64_t steps, float* sums) {
    const bfloat16 *a = left.data, *b = right.data;
    begin<Add>(a, b, sums);
    if constexpr (TwoPlanes) add_low(a, left.plane, b, right.plane);
    for (int64_t k = 1; k < steps; ++k) {
      a += kBlockElements;
      b += kBlockElements;
      step(a, b);
      if constexpr (TwoPlanes) add_low(a, left.plane, b, right.plane);
    }
  }

  ATTNRB_INLINE void flush() {
    _tile_stored(0, previous_, 64);
    _tile_stored(1, previous_ + kTileSums, 64);
    if constexpr (TwoRows) {
      _tile_stored(2, previous_ + 2 * kTileSums, 64);
      _tile_stored(3, previous_ + 3 * kTileSums, 64);
    }
    previous_ = nothing_;
  }

 private:
  template <bool Add>
  ATTNRB_INLINE void begin(const bfloat16* a, const bfloat16* b, float* sums) {
    float* const previous = previous_;
    _tile_stored(0, previous, 64);
    if constexpr (Add)
      _tile_loadd(0, sums, 64);
    else
      _tile_zero(0);
    _tile_loadd(4, a, 64);
    load_right<6>(b);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(1, previous + kTileSums, 64);
    if constexpr (Add)
      _tile_loadd(1, sums + kTileSums, 64);
    else
      _tile_zero(1);
    load_right<7>(b + kTileElements);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TwoRows) {
      _tile_stored(2, previous + 2 * kTileSums, 64);
      if constexpr (Add)
        _tile_loadd(2, sums + 2 * kTileSums, 64);
      else
        _tile_zero(2);
      _tile_loadd(5, a + kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_stored(3, previous + 3 * kTileSums, 64);
      if constexpr (Add)
        _tile_loadd(3, sums + 3 * kTileSums, 64);
      else
        _tile_zero(3);
      _tile_dpbf16ps(3, 5, 7);
    }
    previous_ = sums;
  }

  static ATTNRB_INLINE void step(const bfloat16* a, const bfloat16* b) {
    _tile_loadd(4, a, 64);
    load_right<6>(b);
    _tile_dpbf16ps(0, 4, 6);
    load_right<7>(b + kTileElements);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TwoRows) {
      _tile_loadd(5, a + kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // low * high with the high column tiles that are loaded, then high * low.
  static ATTNRB_INLINE void add_low(const bfloat16* a, int64_t a_plane, const bfloat16* b, int64_t b_plane) {
    _tile_loadd(4, a + a_plane, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TwoRows) {
      _tile_loadd(5, a + a_plane + kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    step(a, b + b_plane);
  }

  // The instructions name their tile.
  template <int Tile>
  static ATTNRB_INLINE void load_right(const bfloat16* b) {
    static_assert(Tile == 6 || Tile == 7, "column tiles");
    if constexpr (Tile == 6 && Streamed)
      _tile_stream_loadd(6, b, 64);
    else if constexpr (Tile == 6)
      _tile_loadd(6, b, 64);
    else if constexpr (Streamed)
      _tile_stream_loadd(7, b, 64);
    else
      _tile_loadd(7, b, 64);
  }

  alignas(64) float nothing_[kBlockSums];  // takes what tiles hold before the first block
  float* previous_ = nothing_;
};

// ---------------------------------------------------------------------------------------------- loading for operands

template <class T>
constexpr bool two_planes = std::is_same<T, float16>::value;

// 32 components as bfloat16: the numbers themselves, or the high or low halves of float16 ones; zeros from the n-th on.
template <int Plane>
ATTNRB_INLINE __m512i load_plane(const bfloat16* p, int n) {
  static_assert(Plane == 0, "bfloat16 has one plane");
  return load_halves(p, n);
}

ATTNRB_INLINE Vec widen_low(__m512i pair) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair)), 16))};
}
ATTNRB_INLINE Vec widen_high(__m512i pair) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1)), 16))};
}

// See Note: [float16 in two halves].
template <int Plane>
ATTNRB_INLINE __m512i split(Vec a, Vec b) {
  const __m512i high = round_pair(a, b);
  if (Plane == 0) return high;
  return round_pair(a - widen_low(high), b - widen_high(high));
}

template <int Plane>
ATTNRB_INLINE __m512i load_plane(const float16* p, int n) {
  const __m512i halves = load_halves(p, n);
  return split<Plane>(Vec{_mm512_cvtph_ps(_mm512_castsi512_si256(halves))},
                      Vec{_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))});
}

// The same from a row of `width` components, from component d on; a null row is zeros. A factor is 1, 0 or -1.
template <int Plane, class T>
ATTNRB_INLINE __m512i load_components(const T* row, int64_t d, int64_t stride, int64_t width, float factor = 1.0f) {
  const int n = int(smaller(width - d, int64_t(32)));
  if (row == nullptr || n <= 0) return _mm512_setzero_si512();
  if (stride == 1 && factor == 1.0f) return load_plane<Plane>(row + d, n);
  T copy[32];
  for (int i = 0; i < n; ++i) copy[i] = from_float<T>(factor * to_float(row[(d + i) * stride]));
  return load_plane<Plane>(copy, n);
}

// Calls each(plane) for the planes of T, as constants.
template <class T, class Each>
ATTNRB_INLINE void for_planes(Each&& each) {
  each(std::integral_constant<int, 0>());
  if constexpr (two_planes<T>) each(std::integral_constant<int, 1>());
}

// TilePlaces of rows of a strip and keys.
ATTNRB_INLINE __m512i score_places(__m512i r, __m512i j) {
  const auto part = [](__m512i x, int from, int mask, int to) {
    return _mm512_slli_epi32(_mm512_and_si512(_mm512_srli_epi32(x, unsigned(from)), _mm512_set1_epi32(mask)),
                             unsigned(to));
  };
  const __m512i row = _mm512_or_si512(part(r, 4, 1, 9), part(r, 0, 15, 4));
  return _mm512_or_si512(_mm512_or_si512(row, part(j, 0, 15, 0)),
                         _mm512_or_si512(part(j, 4, 1, 8), part(j, 5, -1, 10)));
}

ATTNRB_INLINE void store_tile(bfloat16* tile, const Vec* rows) {
  for (int i = 0; i < 16; ++i) rows[i].store(reinterpret_cast<float*>(tile) + 16 * i);
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
