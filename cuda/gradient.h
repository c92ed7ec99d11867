// Starting the kernels of the backward; the rules are those of launch.h.
#pragma once

#include "core/problem.h"
#include "kernels/gradient_parameters.h"
#include "launch.h"

namespace attnrb::cuda {

// A backward laid out for a device.
struct GradientPlan {
  GradientParameters parameters;
  int width = 64;       // class of widths
  bool edited = false;  // a key bias, or outliers under rule rest
  int64_t query_blocks = 0, key_blocks = 0;
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;  // device memory the caller has to lend until the work is done
};

// Throws std::invalid_argument where the device cannot run the kernels on such a problem. `gain_stride` 0: one gain for
// all heads.
GradientPlan plan_gradient(const GradientProblem& problem, const Device& device, int gain_stride = 1);
// `status`, if any, is set to what is wrong with outlier rows; it has to be Status::ok before.
void start_gradient(GradientPlan& plan, void* workspace, int32_t* status, void* stream);

// The two halves of start_gradient(): what is known of each row; then the gradients.
void start_gradient_rows(GradientPlan& plan, void* workspace, int32_t* status, void* stream);
void start_gradient_tiles(const GradientPlan& plan, void* stream);
// The rows of a backward as a problem of the forward.
AttentionProblem row_problem(const GradientProblem& problem);

// problem.gain_rows is device memory that the caller lends. `gain_stride` 0: one gain for all heads.
void start_rebalance_gradient(const RebalanceGradientProblem& problem, int gain_stride, void* stream);

// What each dtype's translation unit defines (gradient_types.h).
struct GradientLaunches {
  void (*rows)(const GradientPlan& plan, void* stream);
  void (*task)(const GradientPlan& plan, GradientTask task, void* stream);
  void (*rebalance)(const struct RebalanceGradientParameters& parameters, int64_t blocks, void* stream);
};
extern const GradientLaunches float32_gradients, bfloat16_gradients, float16_gradients;

// Of all dtypes (gradient_sums.cu).
void start_shares(const GradientPlan& plan, void* stream);
void start_head_sums(const GradientPlan& plan, void* stream);
void start_bias_sums(const GradientPlan& plan, void* stream);
void start_gain_sums(const struct RebalanceGradientParameters& parameters, void* stream);

}  // namespace attnrb::cuda
