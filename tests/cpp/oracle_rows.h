// What the oracles of the forward and of the backward share: one row of weights, and how errors add up.
#pragma once

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

// What the rows of an attention problem, fused or received, have in common.
struct RowSource {
  const Shape& shape;
  DType dtype;
  const View &query, &key;
  const Visibility& visibility;
  const Scoring& scoring;
};

struct RowTruth {
  std::vector<double> weights, scores;  // [N]
  std::vector<bool> visible;            // [N]
  double lse = -std::numeric_limits<double>::infinity();
  double error = 0.0, tile_error = 0.0, cuda_error = 0.0;  // W_i
};

RowTruth row_truth(const RowSource& source, int64_t b, int64_t h, int64_t i);

}  // namespace attnrb::testing
