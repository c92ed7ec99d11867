// What blocks of rows bring to the five products of a tile (Note: [Gradient products]).
#pragma once

#include "gradient_engine.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Both operands that queries make, and both of the output's gradients.
struct GradientRowOperands {
  float *query_rows, *query_along, *output_rows, *output_along;
};

// Where they lie: those of one tile, or those of every block of rows where they are packed once.
template <class Engine>
class PackedGradientRows {
  static constexpr int64_t kRows = Engine::block_rows;

 public:
  PackedGradientRows(const Shape& shape, bool received)
      : sizes_{kRows * Engine::row_lanes(shape.width), Engine::along_lanes(kRows, shape.width),
               received ? 0 : kRows * Engine::row_lanes(shape.value_width),
               received ? 0 : Engine::along_lanes(kRows, shape.value_width)} {}

  // Of a block of rows in shared memory.
  int64_t lanes() const { return Engine::packs_rows_once ? sizes_[0] + sizes_[1] + sizes_[2] + sizes_[3] : 0; }

  GradientRowOperands take(Carver& carver, int64_t blocks) const {
    GradientRowOperands all;
    all.query_rows = carver.take<float>(blocks * sizes_[0]);
    all.query_along = carver.take<float>(blocks * sizes_[1]);
    all.output_rows = carver.take<float>(blocks * sizes_[2]);
    all.output_along = carver.take<float>(blocks * sizes_[3]);
    return all;
  }

  GradientRowOperands of_block(const GradientRowOperands& all, int64_t block) const {
    return {all.query_rows + block * sizes_[0], all.query_along + block * sizes_[1],
            all.output_rows + block * sizes_[2], all.output_along + block * sizes_[3]};
  }

 private:
  const int64_t sizes_[4];
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
