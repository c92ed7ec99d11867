// How a row's weight is dealt out under rule rest.
//
// Note: [Rule rest on the device]
// What a row's outliers and what all others get is known when the last key was seen. So the first pass computes the
// softmax of the others (as the running one, sinks included) and of the outliers the maximum and the sum alone:
// R, l_R and l_S. Then m = S / (S + R) of both sums, and with s = (1 + g) m the row is
// (1 - s) R / l_R + s U / l_S: what is left adds s U / l_S from the tiles that hold outliers, scores computed anew. The
// mass of the others is summed from themselves; where there is none, s is 1. Blocks that share the keys of a row leave
// both softmaxes, which the merge puts together.
#pragma once

#include "rows.h"

namespace attnrb::cuda {

struct RestShares {
  float of_chosen, of_rest;  // what all outliers get, and all others; together 1
  float max, sum;            // of the whole row's softmax
};

// From the softmax of the others and that of the outliers, in base 2 and each relative to its maximum.
ATTNRB_DEVICE RestShares rest_shares(float rest_max, float rest_sum, float chosen_max, float chosen_sum, float gain) {
  constexpr float kSmallest = 1.17549435e-38f;  // normal number of float32
  const float max = fmaxf(rest_max, chosen_max), from = reference(max);
  const float rest = rest_sum * exp2f(rest_max - from), chosen = chosen_sum * exp2f(chosen_max - from);
  const float sum = rest + chosen, mass = sum == 0.0f ? 0.0f : chosen / sum;
  // Nothing can share where the others have no mass.
  if (rest < kSmallest) return {sum == 0.0f ? 0.0f : 1.0f, 0.0f, max, sum};
  return {(1.0f + gain) * mass, rest / sum - gain * mass, max, sum};
}

}  // namespace attnrb::cuda
