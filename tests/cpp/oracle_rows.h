// What the oracles of the forward and of the backward share: one row of weights, and how errors add up.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/problem.h"

namespace attnrb::testing {

constexpr double kRounding = 0x1p-24;

// See Note: [Error bounds] in oracle.h.
double sum_error(int64_t terms);
double tile_probability_rounding(DType dtype);
double cuda_probability_rounding(DType dtype);
double cut_off_error(int64_t terms);  // of tensor cores, in a sum

// The tolerance of a value computed within `error` and then stored.
double stored(DType dtype, double value, double error);

double element(const View& view, DType dtype, int64_t a, int64_t b, int64_t c, int64_t d);

// An operand as doubles, read once: an oracle asks for each element many times.
class Loaded {
 public:
  Loaded(const View& view, DType dtype, const std::array<int64_t, 4>& sizes);

  // Row c of [a, b], all its columns.
  const double* row(int64_t a, int64_t b, int64_t c) const {
    return elements_.data() + ((a * sizes_[1] + b) * sizes_[2] + c) * sizes_[3];
  }

 private:
  std::array<int64_t, 4> sizes_;
  std::vector<double> elements_;
};

// What the rows of an attention problem, fused or received, have in common.
struct RowSource {
  const Shape& shape;
  DType dtype;
  Loaded query, key;
  const Visibility& visibility;
  const Scoring& scoring;
  const Edit& edit;  // for its bias
};

// Of any problem with a shape, queries, keys, a visibility, a scoring and an edit.
template <class Problem>
RowSource row_source(const Problem& problem) {
  const Shape& shape = problem.shape;
  return {shape,
          problem.dtype,
          Loaded(problem.query, problem.dtype, {shape.batch, shape.heads, shape.queries, shape.width}),
          Loaded(problem.key, problem.dtype, {shape.batch, shape.key_heads, shape.keys, shape.width}),
          problem.visibility,
          problem.scoring,
          problem.edit};
}

struct RowTruth {
  std::vector<double> weights, scores;  // [N]; scores before the bias
  std::vector<bool> visible, biased;    // [N]
  double lse = -std::numeric_limits<double>::infinity();
  double error = 0.0, tile_error = 0.0, cuda_error = 0.0;  // W_i
};

// Outliers of a row, by key position; how each part of Note: [Edited attention] is weighed.
struct RowEdit {
  std::vector<bool> marked;                 // [N]
  double mass = 0.0, rest = 0.0;            // m, and 1 - m summed from the others
  double of_marked = 1.0, of_others = 1.0;  // a + b, and a
  double ratio = 0.0;                       // g m / (1 - m), under rule rest
  double divisor = 1.0;                     // 1 + g m, under rule row
  bool hopeless = false;                    // the others have next to no mass: float32 may not see any
};

RowEdit row_edit(const Edit& edit, const Shape& shape, const Visibility& visibility, const Scoring& scoring,
                 const RowTruth& row, int64_t b, int64_t h, int64_t i);

RowTruth row_truth(const RowSource& source, int64_t b, int64_t h, int64_t i);

}  // namespace attnrb::testing
