#include "kernels/gradient_sums.h"

#include "gradient.h"
#include "kernels/elementwise_gradient.h"

namespace attnrb::cuda {

void start_shares(const GradientPlan& plan, void* stream) {
  const Shape& shape = plan.parameters.rows.problem.shape;
  const int64_t count = shape.batch * shape.heads * shape.keys;
  launch<shares_kernel<kThreads>>((count + kThreads - 1) / kThreads, kThreads, 0, stream, plan.parameters);
}

void start_head_sums(const GradientPlan& plan, void* stream) {
  launch<head_sums_kernel<kThreads>>(plan.parameters.rows.problem.shape.heads, kThreads,
                                     2 * kThreads * int64_t(sizeof(double)), stream, plan.parameters);
}

void start_gain_sums(const RebalanceGradientParameters& parameters, void* stream) {
  launch<gain_sums_kernel<kThreads>>(parameters.problem.shape.heads, kThreads, kThreads * int64_t(sizeof(double)),
                                     stream, parameters);
}

}  // namespace attnrb::cuda
