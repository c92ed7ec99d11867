// Note: [Outlier capacity]
// A softmax row sums to 1, so strictly fewer than 1/threshold entries can exceed the threshold: at most
// ceil(1/threshold) - 1, and never more than there are keys. Rounding can push one entry more over the line (a hundred
// equal weights of 0.01 computed in float32); kernels therefore stop at the capacity.
#pragma once

#include <cmath>
#include <cstdint>

namespace attnrb {

// The smallest thresholds have a reciprocal beyond int64: no row is that long.
inline int64_t outlier_capacity(double threshold) {
  return int64_t(std::fmin(std::ceil(1.0 / threshold), 9007199254740992.0)) - 1;
}

inline int64_t outlier_capacity(double threshold, int64_t keys) {
  const int64_t bound = outlier_capacity(threshold);
  return bound < keys ? bound : keys;
}

}  // namespace attnrb
