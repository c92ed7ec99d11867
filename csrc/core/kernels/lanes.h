// Tile products where a multiply-add takes its factor from a lane of a register (`Vec::by_lane`).
//
// Note: [Factors by lane]
// AVX broadcasts each number of the left-hand side as it reads it, which costs nothing beside the load. On ARM a
// broadcast takes a slot of the very units that multiply, one for each row and step, whereas FMLA and BFDOT multiply by
// a lane: four numbers of a row are read at once, and each serves one of the next four steps. A tile of 8 rows by 2
// vectors then issues 64 multiply-adds for 8 loads of rows and 8 of columns, and its 16 sums keep four units busy for
// the four cycles that an addition takes.
//
// A Product has load(p), a register of elements, and add_lane<Lane>(factors, column, sum).
#pragma once

#include "../types.h"

namespace attnrb {
namespace ATTNRB_ISA {

// One step: a row of the panel by the same lane of every row's factors.
template <class Product, int Lane, int Rows, int Vectors>
ATTNRB_INLINE void add_lane(const typename Product::Column (&factors)[Rows], const typename Product::Element* b,
                            Vec (&sum)[Rows][Vectors]) {
  typename Product::Column column[Vectors];
  for (int v = 0; v < Vectors; ++v) column[v] = Product::load(b + v * Vec::width);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Product::template add_lane<Lane>(factors[r], column[v], sum[r][v]);
}

// Four steps over rows of `a` that lie a_stride apart and rows of `b` that lie b_stride apart.
template <class Product, int Rows, int Vectors>
ATTNRB_INLINE void add_lanes(const typename Product::Element* a, int64_t a_stride, const typename Product::Element* b,
                             int64_t b_stride, Vec (&sum)[Rows][Vectors]) {
  typename Product::Column factors[Rows];
  for (int r = 0; r < Rows; ++r) factors[r] = Product::load(a + r * a_stride);
  add_lane<Product, 0>(factors, b, sum);
  add_lane<Product, 1>(factors, b + b_stride, sum);
  add_lane<Product, 2>(factors, b + 2 * b_stride, sum);
  add_lane<Product, 3>(factors, b + 3 * b_stride, sum);
}

// One step where the rows of `a` are neighbours, as those of a transposed matrix.
template <class Product, int Rows, int Vectors>
ATTNRB_INLINE void add_neighbours(const typename Product::Element* a, const typename Product::Element* b,
                                  Vec (&sum)[Rows][Vectors]) {
  static_assert(Rows % 4 == 0, "a register holds four rows");
  typename Product::Column column[Vectors];
  for (int v = 0; v < Vectors; ++v) column[v] = Product::load(b + v * Vec::width);
  for (int r = 0; r < Rows; r += 4) {
    const typename Product::Column factors = Product::load(a + r);
    for (int v = 0; v < Vectors; ++v) {
      sum[r][v] = Product::template add_lane<0>(factors, column[v], sum[r][v]);
      sum[r + 1][v] = Product::template add_lane<1>(factors, column[v], sum[r + 1][v]);
      sum[r + 2][v] = Product::template add_lane<2>(factors, column[v], sum[r + 2][v]);
      sum[r + 3][v] = Product::template add_lane<3>(factors, column[v], sum[r + 3][v]);
    }
  }
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
