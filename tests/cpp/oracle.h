// The definition of every core operation in double precision, one obvious loop each, and how far a kernel may be from
// it.
//
// Note: [Error bounds]
// u = 2^-24 is float32's rounding. A sum of n terms computed in float32, in any order, is within
// (6 sqrt(n) + 3) u of the sum of their absolute values, but for a chance of 1e-7 (Higham and Mary, A New Approach to
// Probabilistic Rounding Error Analysis, 2019, with lambda = 6; the 3 pays for the roundings around the sum).
//   score    e_ij = (6 sqrt(D) + 3) u scale sum_d |q_d k_d| + 4u |s_ij| + 4u cap
//   row      E_i = max_j e_ij + 4u max_j |s_ij|, the error of an exponent; 2^x itself is within 4u
//   weight   W_i = 2 E_i + 4u + (6 sqrt(N) + 3) u, relative
//   output   sum_j w_ij A_ij |v_j| W_i + half a unit of the output dtype in its last place
//   LSE      W_i + 2u |LSE|
// An entry within (W_i + 2u |LSE_i|) threshold of the threshold may fall either way.
//
// Kernels that multiply in tiles of bfloat16 add to W_i, for float16 in two halves, 2^-15 max_j scale sum_d |q_d k_d|
// (low times low is left out of each score, twice), and for bfloat16 a shorter polynomial's 3e-6; and their
// probabilities are rounded once more, to 2^-8 in bfloat16 and 2^-15 in two halves.
//
// CUDA's tensor cores cut additions off where float32 rounds: 2u for each step of 8 or 16 products, which adds to e_ij
// (D/8 + 4) u scale sum_d |q_d k_d| and to an output (N/8 + 4) u of its sum of absolute values. Probabilities are
// rounded to 2^-8 in bfloat16 and 2^-11 in float16, and there to 2^-25 of a largest weight at least. Both kinds divide
// a normalised row by rounded ones, which its output and its LSE bear once more.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace attnrb::testing {

// A value and how far from it a kernel may be.
struct Bounded {
  double value = 0.0;
  double tolerance = 0.0;
  double tile_tolerance = 0.0;  // of kernels that multiply in tiles of bfloat16
  double cuda_tolerance = 0.0;  // of kernels on CUDA's tensor cores
};

struct AttentionTruth {
  std::vector<Bounded> output;   // [B, H, M, Dv]
  std::vector<Bounded> lse;      // [B, H, M]
  std::vector<Bounded> weights;  // [B, H, M, N], before strengthening
  std::vector<bool> visible;     // [B, H, M, N]
};

bool visible(const Visibility& visibility, int64_t batch, int64_t head, int64_t query, int64_t key);

AttentionTruth attention_truth(const AttentionProblem& problem);

// [B, H, N]
std::vector<Bounded> received_truth(const ReceivedProblem& problem);

// [B, H, M, N]
std::vector<Bounded> rebalance_truth(const RebalanceProblem& problem);

struct RebalanceGradientTruth {
  std::vector<Bounded> weights;  // [B, H, M, N]
  std::vector<Bounded> gain;     // [H]
};

RebalanceGradientTruth rebalance_gradient_truth(const RebalanceGradientProblem& problem);

}  // namespace attnrb::testing
