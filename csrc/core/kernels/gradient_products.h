// The five products of a tile (Note: [Gradient products]), each for what the rows of its strips can see.
#pragma once

#include "gradient_engine.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Keys of a block, [first, last), that some row of a strip sees; partial where not every row sees all.
struct KeyRange {
  int64_t first = 0, last = 0;
  bool partial = false;
  bool empty() const { return first >= last; }
};

// This is of engines that read panels.
template <class Engine>
struct GradientProducts {
  using Weights = typename Engine::Weights;
  static constexpr int64_t kRows = Engine::block_rows, kKeys = Engine::block_keys, kStrip = Engine::strip;
  static constexpr int64_t kPanel = Blocking::panel;

  // out[rows, block_keys] = rows times a matrix packed across, where the strips need it.
  static void multiply_rows(const float* rows, const float* across, int64_t width, const KeyRange* ranges,
                            int64_t strips, float* out) {
    const int64_t stride = Engine::row_lanes(width), depth = Engine::lanes(width);
    for (int64_t key = 0; key < kKeys; key += kPanel)
      for (int64_t s = 0; s < strips; ++s) {
        if (ranges[s].empty() || ranges[s].first >= key + kPanel || ranges[s].last <= key) continue;
        const float* panel = across + key * depth;
        const int64_t columns = ranges[s].last - key, head = depth < Engine::chain ? depth : Engine::chain;
        for (int64_t r = s * kStrip; r < (s + 1) * kStrip; r += Blocking::rows) {
          const float* left = rows + r * stride;
          float* tile = out + r * kKeys + key;
          multiply_columns<Engine, Blocking::rows, false, false>(left, stride, panel, columns, tile, kKeys, head);
          for (int64_t d = head; d < depth; d += Engine::chain)
            multiply_columns<Engine, Blocking::rows, false, true>(
                left + d, stride, panel + d * kPanel, columns, tile, kKeys,
                depth - d < Engine::chain ? depth - d : Engine::chain);
        }
      }
  }

  // sums of keys += weights^T times output gradients, and += score gradients^T times queries, packed along.
  static void add_values(const float* p, const Weights& weights, const float* along, int64_t columns,
                         const KeyRange* ranges, int64_t strips, float* sums) {
    multiply_down([&](int64_t row, int64_t key) { return weights.weights_down(p, row, key); }, along, columns, ranges,
                  strips, sums);
  }
  static void add_keys(const float* ds, const Weights& weights, const float* along, int64_t columns,
                       const KeyRange* ranges, int64_t strips, float* sums) {
    multiply_down([&](int64_t row, int64_t key) { return weights.gradients_down(ds, row, key); }, along, columns,
                  ranges, strips, sums);
  }

  // out = factor * the sums of `count` keys, or of `count` rows.
  template <class T>
  static void write_keys(T* out, int64_t stride, int64_t count, const float* sums, int64_t columns, int64_t width,
                         float factor) {
    for (int64_t j = 0; j < count; ++j) write_scaled(out + j * stride, sums + j * columns, width, factor);
  }
  template <class T>
  static void write_rows(T* out, int64_t stride, int64_t count, const float* sums, int64_t columns, int64_t width,
                         float factor) {
    write_keys(out, stride, count, sums, columns, width, factor);
  }

  // sums[rows, columns] += score gradients times keys packed along; fresh ones begin with nothing.
  static void add_rows(const float* gradients, const Weights& weights, const float* along, int64_t columns,
                       const KeyRange* ranges, int64_t rows, float* sums, bool fresh) {
    for (int64_t i = 0; fresh && i < rows * columns; ++i) sums[i] = 0.0f;
    for (int64_t column = 0; column < columns; column += kPanel, along += Engine::lanes(kKeys) * kPanel)
      for (int64_t r = 0; r < rows; r += Blocking::rows) {
        const KeyRange& range = ranges[r / kStrip];
        if (range.empty()) continue;
        const float* left = weights.gradient_rows(gradients, r, range.first);
        const float* right = along + Engine::lanes(range.first) * kPanel;
        const int64_t depth = Engine::lanes(range.last - range.first), left_columns = columns - column;
        float* out = sums + r * columns + column;
        constexpr int64_t stride = Weights::row_stride;
        if (rows - r >= Blocking::rows) {
          multiply_columns<Engine, Blocking::rows, false, true>(left, stride, right, left_columns, out, columns, depth);
        } else {
          for (int64_t each = 0; each < rows - r; ++each)
            multiply_columns<Engine, 1, false, true>(left + each * stride, stride, right, left_columns,
                                                     out + each * columns, columns, depth);
        }
      }
  }

 private:
  // sums[keys, columns] += (a tile)^T times rows packed along: for each few keys over the strips that hold them.
  template <class Left>
  static void multiply_down(Left&& left, const float* along, int64_t columns, const KeyRange* ranges, int64_t strips,
                            float* sums) {
    const int64_t panel_lanes = Engine::lanes(kRows) * kPanel;
    for (int64_t column = 0; column < columns; column += kPanel, along += panel_lanes)
      for (int64_t key = 0; key < kKeys; key += Engine::key_rows)
        for (int64_t s = 0, end = 0; s < strips; s = end + 1) {
          for (end = s; end < strips && ranges[end].first <= key && key < ranges[end].last;) ++end;
          if (end == s) continue;
          multiply_columns<Engine, Engine::key_rows, true, true>(
              left(s * kStrip, key), kKeys, along + Engine::lanes(s * kStrip) * kPanel, columns - column,
              sums + key * columns + column, columns, Engine::lanes((end - s) * kStrip));
        }
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
