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

void start_bias_sums(const GradientPlan& plan, void* stream) {
  const GradientParameters& g = plan.parameters;
  const Shape& shape = g.rows.problem.shape;
  const int64_t count = (g.grad_bias_strides[0] == 0 ? 1 : shape.batch) *
                        (g.grad_bias_strides[1] == 0 ? 1 : shape.heads) * g.rows.problem.edit.bias_slots;
  launch<bias_sums_kernel<kThreads>>((count + kThreads - 1) / kThreads, kThreads, 0, stream, g);
}

void start_gain_sums(const RebalanceGradientParameters& parameters, void* stream) {
  launch<gain_sums_kernel<kThreads>>(parameters.problem.shape.heads, kThreads, kThreads * int64_t(sizeof(double)),
                                     stream, parameters);
}

}  // namespace attnrb::cuda
