// Strips of a tile of the backward, differentiated in one go where the engine and the problem allow it.
#pragma once

#include "gradient_products.h"
#include "gradient_rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// A strip of a tile: scores and gradients of weights as the engine's products left them. Keys are counted from the
// first of the tile.
struct TileStrip {
  int64_t batch, head;
  int64_t query, row;  // of its first row: among those of the head, and among all rows
  int64_t rows;        // how many there are
  int64_t number;      // of the strip in its tile
  int64_t key;         // position of the tile's first key
  KeyRange range;
  float *scores, *products;
};

// This is of engines that take rows one by one (gradient_scores.h).
template <class Engine>
struct GradientStrips {
  GradientStrips(const GradientProblem&, const RowRules&, const GradientRows<typename Engine::Input>&) {}

  // Whether strips of a head can be taken in one go.
  static constexpr bool fit(int64_t) { return false; }
  void carve(Carver&) {}
  void copy_lists(int64_t, int64_t, int64_t, int64_t) const {}
  void prefetch(int64_t, int64_t) const {}
  double differentiate(const TileStrip&, const typename Engine::Weights&) const { return 0.0; }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
