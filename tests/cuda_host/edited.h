// Attention cases with every option of an edit, and the definition of what they give in double precision: Note: [Edited
// attention] (csrc/core/edit.h) on weights that stand in memory, its gradients by the chain rule.
#pragma once

#include <vector>

#include "cases.h"
#include "oracle.h"

namespace attnrb::testing {

// An attention case, and what this adds to it: a key bias, first queries, rule rest, lists that all queries share,
// slots for each sequence, chunks, and outliers found in the same call.
struct EditedCase {
  AttentionCase attention;
  Rule rule = Rule::none;
  bool boosts = false, emits = false, shared_rows = false;
  std::vector<int64_t> query_offsets, first_query;
  std::vector<float> bias;
  int64_t bias_sizes[3] = {0, 0, 0}, bias_strides[3] = {0, 0, 0}, bias_slots = 0;

  explicit EditedCase(uint64_t seed);
  // With results that hold sentinels again.
  AttentionProblem problem();
  ReceivedProblem received_problem(std::vector<float>& received) const;
  std::string describe() const;

 private:
  void place(Visibility& visibility, Edit& edit) const;
};

// Of one row.
struct EditedRow {
  std::vector<double> weights, scores;  // P, and scores before the bias
  std::vector<bool> seen, marked, biased;
  double lse = 0.0, returned_lse = 0.0;
  double mass = 0.0, rest = 1.0;  // m and 1 - m, each summed from its own
  double of_marked = 1.0, of_others = 1.0;
  double error = 0.0;  // of a weight, relative: W_i of Note: [Error bounds] on tensor cores
  bool any = false;
};
EditedRow edited_row(const AttentionProblem& problem, int64_t b, int64_t h, int64_t i);

// What a number is and how far from it the kernels may be.
struct Near {
  double value = 0.0, tolerance = 0.0;
  bool holds(double got) const;
};

struct EditedTruth {
  std::vector<Near> output, lse;
  std::vector<EditedRow> rows;  // of [B, H, M]
};
EditedTruth edited_truth(const AttentionProblem& problem);
std::vector<Near> edited_received(const ReceivedProblem& problem);

struct EditedGradients {
  std::vector<Near> query, key, value, gain, sinks, bias;  // bias: [B, H, slots] with both axes as long as the bias has
};
EditedGradients edited_gradients(const GradientProblem& problem, const int64_t (&bias_sizes)[3]);

}  // namespace attnrb::testing
