// Products of the backward pass on AMX tiles (amx_tiles.h).
//
// Note: [Gradient tiles]
// Of the five products of a tile (Note: [Gradient products]), with S and dW made strip by strip of 32 rows,
//   S = Q K^T    dW = dY V^T     left: rows of Q and dY            right: K and V across, pairs of components
//   dV^T += dY^T P               left: components of dY            right: P, pairs of rows
//   dK^T += Q^T dS               left: components of Q             right: dS, pairs of rows
//   dQ   += dS K                 left: rows of dS                  right: K along, pairs of keys
// neither P nor dS is ever transposed: the gradients of keys and values are added up transposed, and turned over once,
// when a block of keys is done. Q and dY lie in memory both ways, packed once for all blocks of keys.
//
// Operands are blocks of 1024 elements (Note: [AMX tile layouts]), the summed axis innermost:
//   rows        [strip][plane][32 components]        down        [32 components][strip]
//   across      [32 keys][32 components]             along       [32 components][32 keys]
//   P, dS       [32 keys][strip]                     rows of dS  [strip][32 keys]
// sums of rows are [strip][32 components], those of keys [32 keys][32 components], transposed.
#pragma once

#include <algorithm>

#include "amx_tiles.h"
#include "gradient_products.h"

namespace attnrb {
namespace ATTNRB_ISA {

// T is bfloat16, or float16 in two planes.
template <class T>
struct AmxGradientEngine {
  using Input = T;
  static constexpr int planes = two_planes<T> ? 2 : 1;
  static constexpr int exp2_degree = two_planes<T> ? 6 : 4;
  static constexpr int strip = 32;
  static constexpr int block_rows = 256;
  static constexpr int block_keys = 256;
  static constexpr int strips_at_once = 1;
  static constexpr bool packs_rows_once = true;
  static constexpr bool whole_strips = true;
  static constexpr int key_granule = 32;

  using Places = TilePlaces;
  static constexpr int64_t score_row(int64_t r) { return TilePlaces::row(r); }
  static ATTNRB_INLINE int64_t row_place(int64_t r, int64_t d, int64_t columns) {
    return r / 32 * 32 * columns + d / 32 * kBlockSums + r % 32 / 16 * (2 * kTileSums) + d % 32 / 16 * kTileSums +
           r % 16 * 16 + d % 16;
  }
  static ATTNRB_INLINE int64_t key_place(int64_t j, int64_t d, int64_t columns) {
    return j / 32 * 32 * columns + d / 32 * kBlockSums + d % 32 / 16 * (2 * kTileSums) + j % 32 / 16 * kTileSums +
           d % 16 * 16 + j % 16;
  }

  static void start_worker() { start_tiles(); }
  static void stop_worker() { stop_tiles(); }

  // Sizes in 32-bit lanes, two elements each.
  static constexpr int64_t columns(int64_t width) { return round_up(width, 32); }
  static int64_t row_lanes(int64_t width) { return planes * columns(width) / 2; }
  static int64_t across_lanes(int64_t rows, int64_t width) { return rows * row_lanes(width); }
  static int64_t along_lanes(int64_t rows, int64_t width) { return rows * row_lanes(width); }

  static bfloat16* elements(float* lanes) { return reinterpret_cast<bfloat16*>(lanes); }
  static const bfloat16* elements(const float* lanes) { return reinterpret_cast<const bfloat16*>(lanes); }

  static void pack_rows(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width, float factor) {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      for (int64_t r = 0; r < count; ++r) {
        bfloat16* row = elements(out) + (r / 32 * planes + kPlane) * 32 * columns(width) + r % 32 * 32;
        for (int64_t d = 0; d < width; d += 32)
          _mm512_storeu_si512(row + d / 32 * kBlockElements,
                              load_components<kPlane>(rows[r], d, stride, width, factor));
      }
    });
  }

  // 32 rows become a step: pairs of rows are 32-bit elements, and those turn over.
  template <int Rows>
  static void pack_down(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width) {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      for (int64_t r = 0; r < count; r += 32)
        for (int64_t d = 0; d < width; d += 32) {
          Vec low[16], high[16];
          for (int i = 0; i < 16; ++i) load_pair_of_rows<kPlane>(rows + r + 2 * i, d, stride, width, low[i], high[i]);
          Vec::transpose(low);
          Vec::transpose(high);
          bfloat16* block =
              elements(out) + kPlane * Rows * columns(width) + (d / 32 * (Rows / 32) + r / 32) * kBlockElements;
          store_tile(block, low);
          store_tile(block + kTileElements, high);
        }
    });
  }

  // Pairs of components are 32-bit elements: the rows become columns.
  static void pack_across(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width) {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      for (int64_t r = 0; r < count; r += 16)
        for (int64_t d = 0; d < width; d += 32) {
          Vec square[16];
          for (int i = 0; i < 16; ++i)
            square[i].v = _mm512_castsi512_ps(load_components<kPlane>(rows[r + i], d, stride, width));
          Vec::transpose(square);
          store_tile(elements(out) + kPlane * count * columns(width) + r / 32 * 32 * columns(width) +
                         d / 32 * kBlockElements + r / 16 % 2 * kTileElements,
                     square);
        }
    });
  }

  template <int Rows>
  static void pack_along(float* out, const T* const* rows, int64_t count, int64_t stride, int64_t width) {
    for_planes<T>([&](auto plane) {
      constexpr int kPlane = decltype(plane)::value;
      for (int64_t r = 0; r < count; r += 2)
        for (int64_t d = 0; d < width; d += 32) {
          Vec low, high;
          load_pair_of_rows<kPlane>(rows + r, d, stride, width, low, high);
          bfloat16* tile = elements(out) + kPlane * Rows * columns(width) +
                           (d / 32 * (Rows / 32) + r / 32) * kBlockElements + r % 32 / 2 * 32;
          low.store(reinterpret_cast<float*>(tile));
          high.store(reinterpret_cast<float*>(tile + kTileElements));
        }
    });
  }

  struct Weights {
    static constexpr int64_t plane = block_rows * block_keys;
    static constexpr int64_t lanes() { return 3 * planes * plane / 2; }
    explicit Weights(float* memory)
        : weights(elements(memory)), gradients(weights + planes * plane), rows(gradients + planes * plane) {}

    // Two rows of 32 keys: [row][half of the keys].
    using TwoRows = Vec[2][2];

    // Of the strip from `row` on, which begins at p and ds.
    void convert(const float* p, const float* ds, int64_t row, int64_t first, int64_t last) const {
      for (int64_t r = 0; r < strip; r += 2)
        for (int64_t j = first; j < last; j += 32) {
          TwoRows two_p, two_ds;
          for (int each = 0; each < 2; ++each)
            for (int half = 0; half < 2; ++half) {
              const int64_t at = TilePlaces::row(r + each) + TilePlaces::place(j) + half * kTileSums;
              two_p[each][half] = short_nan(Vec::load(p + at));
              two_ds[each][half] = short_nan(Vec::load(ds + at));
            }
          store(row / strip, r, j, two_p, two_ds);
        }
    }

    // Rows r and r + 1 of a strip, from key j on; a NaN is short (bf16_pairs.h).
    ATTNRB_INLINE void store(int64_t strip_number, int64_t r, int64_t j, const TwoRows& p, const TwoRows& ds) const {
      const int64_t down = (j / 32 * (block_rows / 32) + strip_number) * kBlockElements + r * 16;
      const int64_t along = (strip_number * (block_keys / 32) + j / 32) * kBlockElements + r * 32;
      for (int half = 0; half < 2; ++half) {
        store_pairs(weights + down + half * kTileElements, p[0][half], p[1][half]);
        store_pairs(gradients + down + half * kTileElements, ds[0][half], ds[1][half]);
      }
      for_planes<T>([&](auto which) {
        constexpr int kPlane = decltype(which)::value;
        for (int each = 0; each < 2; ++each)
          _mm512_storeu_si512(rows + kPlane * plane + along + each * 32, split<kPlane>(ds[each][0], ds[each][1]));
      });
    }

    bfloat16 *weights, *gradients, *rows;

   private:
    static ATTNRB_INLINE void store_pairs(bfloat16* out, Vec even, Vec odd) {
      _mm512_storeu_si512(out, round_alternate(even, odd));
      if constexpr (two_planes<T>)
        _mm512_storeu_si512(out + plane, round_alternate(even - round_float(even), odd - round_float(odd)));
    }
  };

 private:
  template <int Plane>
  static ATTNRB_INLINE void load_pair_of_rows(const T* const* rows, int64_t d, int64_t stride, int64_t width, Vec& low,
                                              Vec& high) {
    const __m512i even = load_components<Plane>(rows[0], d, stride, width),
                  odd = load_components<Plane>(rows[1], d, stride, width);
    __m512i first, last;
    interleave(even, odd, first, last);
    low.v = _mm512_castsi512_ps(first);
    high.v = _mm512_castsi512_ps(last);
  }
};

template <class T>
struct GradientProducts<AmxGradientEngine<T>> {
  using Engine = AmxGradientEngine<T>;
  using Weights = typename Engine::Weights;
  // Left sides are met again and again while the right ones go by.
  using Blocks = TileBlocks<two_planes<T>, true>;
  static constexpr int64_t kRows = Engine::block_rows, kKeys = Engine::block_keys;
  static constexpr int64_t kStrips = kRows / 32, kKeySteps = kKeys / 32;

  static void multiply_rows(const float* rows, const float* across, int64_t width, const KeyRange* ranges,
                            int64_t strips, float* out) {
    const int64_t columns = Engine::columns(width);
    Blocks blocks;
    settle_operands();
    for (int64_t s = 0; s < strips; ++s, rows += 32 * Engine::row_lanes(width), out += 32 * kKeys) {
      const TileOperand left{Engine::elements(rows), 32 * columns};
      for (int64_t j = ranges[s].first; j < ranges[s].last; j += 32)
        blocks.template multiply<false>(left, {Engine::elements(across) + j * columns, kKeys * columns}, columns / 32,
                                        out + TilePlaces::place(j));
    }
    blocks.flush();
  }

  static void add_values(const float* /*p*/, const Weights& weights, const float* down, int64_t columns,
                         const KeyRange* ranges, int64_t strips, float* sums) {
    multiply_down(Engine::elements(down), weights.weights, columns, ranges, strips, sums);
  }
  static void add_keys(const float* /*ds*/, const Weights& weights, const float* down, int64_t columns,
                       const KeyRange* ranges, int64_t strips, float* sums) {
    multiply_down(Engine::elements(down), weights.gradients, columns, ranges, strips, sums);
  }

  // Fresh: sums begin with what is added.
  static void add_rows(const float* /*ds*/, const Weights& weights, const float* along, int64_t columns,
                       const KeyRange* ranges, int64_t rows, float* sums, bool fresh) {
    if (fresh)
      multiply_strips<false>(weights, along, columns, ranges, rows, sums);
    else
      multiply_strips<true>(weights, along, columns, ranges, rows, sums);
  }

  static void write_rows(T* out, int64_t stride, int64_t count, const float* sums, int64_t columns, int64_t width,
                         float factor) {
    const Vec by = Vec::set(factor);
    for (int64_t r = 0; r < count; ++r, out += stride)
      for (int64_t d = 0; d < width; d += Vec::width)
        store_some(out + d, Vec::load(sums + Engine::row_place(r, d, columns)) * by, width - d);
  }

  static void write_keys(T* out, int64_t stride, int64_t count, const float* sums, int64_t columns, int64_t width,
                         float factor) {
    const Vec by = Vec::set(factor);
    for (int64_t j = 0; j < count; j += 16)
      for (int64_t d = 0; d < width; d += Vec::width) {
        const float* tile = sums + Engine::key_place(j, d, columns);
        Vec square[16];
        for (int i = 0; i < 16; ++i) square[i] = Vec::load(tile + 16 * i) * by;
        Vec::transpose(square);
        for (int64_t i = 0; i < smaller(count - j, int64_t(16)); ++i)
          store_some(out + (j + i) * stride + d, square[i], width - d);
      }
  }

 private:
  template <bool Add>
  static void multiply_strips(const Weights& weights, const float* along, int64_t columns, const KeyRange* ranges,
                              int64_t rows, float* sums) {
    Blocks blocks;
    settle_operands();
    for (int64_t s = 0; s * 32 < rows; ++s) {
      float* const strip = sums + Engine::row_place(32 * s, 0, columns);
      const int64_t first = ranges[s].first / 32, steps = ranges[s].last / 32 - first;
      if (ranges[s].empty()) {
        if (!Add) std::fill_n(strip, 32 * columns, 0.0f);
        continue;
      }
      const TileOperand left{weights.rows + (s * kKeySteps + first) * kBlockElements, Weights::plane};
      for (int64_t d = 0; d < columns; d += 32) {
        float* const block = strip + TilePlaces::place(d);
        if (Add && 32 * (s + 1) < rows) prefetch_block(block + 32 * columns);
        blocks.template multiply<Add>(
            left, {Engine::elements(along) + (d / 32 * kKeySteps + first) * kBlockElements, kKeys * columns}, steps,
            block);
      }
    }
    blocks.flush();
  }

  // Sums of rows lie in the last cache or behind, where they were left many tiles ago.
  static ATTNRB_INLINE void prefetch_block(const float* sums) {
    for (int64_t i = 0; i < kBlockSums; i += 16) __builtin_prefetch(sums + i, 1, 2);
  }

  // sums of keys, transposed, += rows packed down times pairs of rows: for 32 keys over the strips that hold them.
  static void multiply_down(const bfloat16* down, const bfloat16* pairs, int64_t columns, const KeyRange* ranges,
                            int64_t strips, float* sums) {
    Blocks blocks;
    settle_operands();
    for (int64_t d = 0; d < columns; d += 32)
      for (int64_t j = 0; j < kKeys; j += 32)
        for (int64_t s = 0, end = 0; s < strips; s = end + 1) {
          for (end = s; end < strips && ranges[end].first <= j && j < ranges[end].last;) ++end;
          if (end == s) continue;
          blocks.template multiply<true>({down + (d / 32 * kStrips + s) * kBlockElements, kRows * columns},
                                         {pairs + (j / 32 * kStrips + s) * kBlockElements, Weights::plane}, end - s,
                                         sums + Engine::key_place(j, d, columns));
        }
    blocks.flush();
  }

  static ATTNRB_INLINE void store_some(T* out, Vec x, int64_t left) {
    if (left >= Vec::width)
      x.store(out);
    else
      x.store(out, int(left));
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
