// What the kernels on weight matrices are started with.
#pragma once

#include "core/problem.h"

namespace attnrb::cuda {

struct OutlierMaskParameters {
  OutlierMaskProblem problem;
  float bound = 0.0f;  // the largest float32 that is not above the threshold
  bool aligned = false;
};

struct RebalanceParameters {
  RebalanceProblem problem;
  int32_t gain_stride = 1;
  float gain = 0.0f;  // for all heads, where problem.gain is null
  bool aligned = false;
};

struct RebalanceGradientParameters {
  RebalanceGradientProblem problem;
  int32_t gain_stride = 1;
  bool aligned = false;
};

}  // namespace attnrb::cuda
