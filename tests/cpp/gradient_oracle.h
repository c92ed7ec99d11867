// Gradients of attention in double precision, by the formulas of docs/method.md on weights that stand in memory, and
// how far from them a kernel may be.
//
// Note: [Error bounds of gradients]
// With W_i, u and the error of sums as in Note: [Error bounds], and y and LSE given to the kernel as the truth rounded:
//   weight         P_ij, within W_i + 4u |LSE_i|, relative
//   its gradient   dW_ij = sum_d dy_d v_d, within the error of that sum
//   delta_i        the error of a sum of Dv products, and |dy_d| times the rounding of y_d
//   score          dS = P (w dW - delta) slope: P (w |dW| + |delta|) times that of the weight, P times those of the
//   two,
//                  and with a softcap |P (w dW - delta)| times the slope's 2 |tanh| (W_i / cap + 4u) + 4u
// Under rule rest (Note: [Gradients of shared rows]) the mean q of dW over the others errs as a sum of them does, a
// ratio of masses as two weights, and terms that a difference takes apart count with the size of both. Sums over keys
// or rows add the error of their length. Kernels that multiply in bfloat16 round P and dS to 2^-8; those that multiply
// float16 in two halves leave 2^-16 of each product out of dW, and err by 2^-15 of P and dS. CUDA's round in float16 to
// 2^-11 and there to 2^-25 at least.
#pragma once

#include <vector>

#include "oracle.h"

namespace attnrb::testing {

struct GradientTruth {
  std::vector<Bounded> query;        // [B, H, M, D]
  std::vector<Bounded> key;          // [B, Hk, N, D]
  std::vector<Bounded> value;        // [B, Hk, N, Dv]
  std::vector<Bounded> gain, sinks;  // [H]
  std::vector<Bounded> bias;         // as grad_bias lies
};

// `output` and `lse` of the problem are not read.
GradientTruth gradient_truth(const GradientProblem& problem);

}  // namespace attnrb::testing
