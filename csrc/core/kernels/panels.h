// Products of query strips with packed blocks of keys and values, in register tiles.
//
// An engine packs keys and values once per key head into panels, in the order in which its inner loop reads them. What
// differs between engines is the element of a panel and how a register of elements is multiplied: `Product` says both.
//   Element: what a panel consists of, 4 bytes, holding `parts` neighbours along the summed axis
//   Factor:  an element of the left-hand side, broadcast; add(factor, column, sum) = sum + factor * column
//   chain:   elements that one sum may run over before it joins the others
//   add_lane: add by a lane of several factors, where vectors can (Note: [Factors by lane])
#pragma once

#include "../problem.h"
#include "lanes.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where the j-th number of a row lies, for numbers that lie one after the other. Any such type has
//   place(j)  of the j-th number; a vector of them is in order from any multiple of its width on
//   pair(j)   the same where j is a multiple of two vectors, the second of which lies `second` behind the first
struct InOrder {
  static constexpr int64_t second = Vec::width;
  static constexpr int64_t place(int64_t j) { return j; }
  static constexpr int64_t pair(int64_t j) { return j; }
};

// Register blocking: rows x vectors accumulators, leaving room for one row of b and a broadcast.
struct Blocking {
  static constexpr int rows = Vec::by_lane ? 8 : 6;
  static constexpr int vectors = Vec::width >= 16 ? 4 : 2;
  static constexpr int panel = vectors * Vec::width;
};

// c[Rows, Columns] (+)= a[Rows, depth] * b[depth, Columns] with Columns = Vectors * width: `a` is read by broadcast,
// `b` is (the left part of) a packed panel, the accumulators never leave their registers. They start from zero even
// where c is added to: rounding errors grow with the length of a chain of additions, so chains are kept short.
template <class Product, int Rows, int Vectors, bool Accumulate>
ATTNRB_INLINE void multiply_tile(const typename Product::Element* a, int64_t a_stride,
                                 const typename Product::Element* b, float* c, int64_t c_stride, int64_t depth) {
  // The panel comes from the second-level cache faster when it is asked for a few kilobytes ahead.
  constexpr int kPrefetch = 1024;
  Vec sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::zero();
  int64_t k = 0;
  if constexpr (Vec::by_lane)
    for (; k + Vec::width <= depth; k += Vec::width, b += Vec::width * Blocking::panel)
      add_lanes<Product>(a + k, a_stride, b, Blocking::panel, sum);
  for (; k < depth; ++k, b += Blocking::panel) {
    typename Product::Column column[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      __builtin_prefetch(b + kPrefetch + v * Vec::width);
      column[v] = Product::load(b + v * Vec::width);
    }
    for (int r = 0; r < Rows; ++r) {
      const typename Product::Column x = Product::broadcast(a + r * a_stride + k);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Product::add(x, column[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* out = c + r * c_stride + v * Vec::width;
      (Accumulate ? Vec::load(out) + sum[r][v] : sum[r][v]).store(out);
    }
}

// The same for `rows` rows (rounded up to whole tiles) and the first `columns` columns of a panel, at most its width.
template <class Product, bool Accumulate>
void multiply_panel(const typename Product::Element* a, int64_t a_stride, int64_t rows,
                    const typename Product::Element* b, int64_t columns, float* c, int64_t c_stride, int64_t depth) {
  constexpr int R = Blocking::rows, V = Blocking::vectors;
  for (int64_t r = 0; r < rows; r += R, a += R * a_stride, c += R * c_stride) {
    if (columns > (V - 1) * Vec::width)
      multiply_tile<Product, R, V, Accumulate>(a, a_stride, b, c, c_stride, depth);
    else if (V > 3 && columns > 2 * Vec::width)
      multiply_tile<Product, R, 3, Accumulate>(a, a_stride, b, c, c_stride, depth);
    else if (V > 2 && columns > Vec::width)
      multiply_tile<Product, R, 2, Accumulate>(a, a_stride, b, c, c_stride, depth);
    else
      multiply_tile<Product, R, 1, Accumulate>(a, a_stride, b, c, c_stride, depth);
  }
}

// Where every row is absorbed by itself.
struct NoGroup {
  static constexpr int kRows = 1;
};

// What engines share whose scores and probabilities lie row by row and are absorbed one row at a time.
struct RowByRow {
  static constexpr int strip = 24;       // query rows multiplied at a time: scores stay in the first-level cache
  static constexpr int block_rows = 96;  // query rows that share one walk over the keys
  static constexpr int block_keys = 256;
  static constexpr bool starts_fresh = false;  // whether sums need not be zeros before the first block
  using Group = NoGroup;                       // of rows that are absorbed at once
  static int64_t rows_at_once(int64_t /*queries*/, int64_t /*keys*/) { return block_rows; }
  static int64_t rows_together() { return 0; }  // keys are always packed beforehand

  // Where rows of a strip begin, at the key `first`.
  static constexpr int64_t score_row(int64_t r, int64_t first) { return r * block_keys + first; }
  static constexpr int64_t probability_row(int64_t r, int64_t first) { return r * block_keys + first; }
};

// The part of an engine that its element type does not change. Keys lie in panels [block_keys / panel][depth][panel],
// values in panels [value_columns / panel][block_keys / parts][panel], queries and probabilities in rows.
template <class Product>
struct PanelEngine : RowByRow {
  using Element = typename Product::Element;
  static constexpr int parts = Product::parts;
  static constexpr int panel = Blocking::panel;
  static constexpr int key_granule = 2 * Vec::width;  // blocks of keys are cut to multiples of this
  static_assert(block_keys % panel == 0 && strip % Blocking::rows == 0, "blocks hold whole tiles");

  explicit PanelEngine(const Shape& shape)
      : width(shape.width),
        value_width(shape.value_width),
        depth((shape.width + parts - 1) / parts),
        value_columns(round_up(shape.value_width, Vec::width)) {}

  const int64_t width, value_width;
  const int64_t depth;          // elements of a key
  const int64_t value_columns;  // accumulator row length

  int64_t key_block_bytes() const { return block_keys * depth * int64_t(sizeof(Element)); }
  int64_t value_block_bytes() const {
    return block_keys / parts * round_up(value_columns, panel) * int64_t(sizeof(Element));
  }
  int64_t query_block_bytes() const { return block_rows * depth * int64_t(sizeof(Element)); }
  static constexpr int64_t probability_bytes() { return strip * block_keys / parts * int64_t(sizeof(Element)); }

  int64_t sum_row(int64_t r) const { return r * value_columns; }  // where the sums of a row of a block begin

  void start_worker() const {}
  void stop_worker() const {}

  // scores[rows, block_keys] of the keys [first, last) (multiples of key_granule) and the query rows from `row` on.
  void scores(const void* queries, int64_t row, int64_t rows, const void* keys, int64_t first, int64_t last,
              float* scores) const {
    constexpr int64_t chain = Product::chain;
    const Element* query = static_cast<const Element*>(queries) + row * depth;
    for (int64_t key = first / panel * panel; key < last; key += panel) {
      const Element* panel_keys = static_cast<const Element*>(keys) + key * depth;
      multiply_panel<Product, false>(query, depth, rows, panel_keys, last - key, scores + key, block_keys,
                                     depth < chain ? depth : chain);
      for (int64_t d = chain; d < depth; d += chain)
        multiply_panel<Product, true>(query + d, depth, rows, panel_keys + d * panel, last - key, scores + key,
                                      block_keys, depth - d < chain ? depth - d : chain);
    }
  }

  // sums[rows, value_columns] += probabilities[rows, first..last) * values.
  void accumulate(const void* probabilities, int64_t rows, const void* values, int64_t first, int64_t last, float* sums,
                  bool /*fresh*/) const {
    const Element* left = static_cast<const Element*>(probabilities) + first / parts;
    for (int64_t column = 0; column < value_columns; column += panel)
      multiply_panel<Product, true>(
          left, block_keys / parts, rows,
          static_cast<const Element*>(values) + column * (block_keys / parts) + first / parts * panel,
          value_columns - column, sums + column, value_columns, (last - first) / parts);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
