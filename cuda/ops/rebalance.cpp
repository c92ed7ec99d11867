// Re-balances an attention matrix that stands in device memory.
#include <tuple>

#include "device.h"
#include "gradient.h"

namespace attnrb::ops {
namespace {

// `gain` is a number, or a tensor with one for all heads or one each.
template <class Gain>
Tensor rebalance(const Tensor& weights_tensor, const Tensor& mask_tensor, const Gain& gain, bool normalize) {
  const Operand weights("weights", weights_tensor), mask("mask", mask_tensor);
  RebalanceProblem problem;
  problem.dtype = check_element_type(weights);
  problem.shape = check_weights(weights);
  const Shape& shape = problem.shape;
  check_dtype(mask, dtype_codes().boolean);
  check_device(mask, weights);
  check_broadcast(mask, shape, problem.mask.strides);
  const DeviceGain gains(gain, shape, weights);

  Tensor output = empty<4>({shape.batch, shape.heads, shape.queries, shape.keys}, weights.dtype, weights);
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) return output;

  problem.weights = view_of(weights);
  problem.mask.data = mask.data();
  problem.gain = gains.data;
  problem.normalize = normalize;
  problem.output = output.mutable_data_ptr();
  const DeviceScope scope(weights);
  cuda::start_rebalance(problem, gains.stride, gains.value, scope.stream());
  return output;
}

Tensor rebalance_uniform(const Tensor& weights, const Tensor& mask, double gain, bool normalize) {
  return rebalance(weights, mask, gain, normalize);
}

Tensor rebalance_per_head(const Tensor& weights, const Tensor& mask, const Tensor& gain, bool normalize) {
  return rebalance(weights, mask, gain, normalize);
}

std::tuple<Tensor, Tensor> rebalance_backward(const Tensor& grad_output_tensor, const Tensor& weights_tensor,
                                              const Tensor& mask_tensor, const Tensor& gain, bool normalize) {
  const Operand grad_output("grad_output", grad_output_tensor), weights("weights", weights_tensor),
      mask("mask", mask_tensor);
  RebalanceGradientProblem problem;
  problem.dtype = check_element_type(weights);
  problem.shape = check_weights(weights);
  const Shape& shape = problem.shape;
  check_shape(grad_output, {shape.batch, shape.heads, shape.queries, shape.keys}, "[B, H, M, N] of weights");
  check_companion(grad_output, weights);
  check_dtype(mask, dtype_codes().boolean);
  check_device(mask, weights);
  check_broadcast(mask, shape, problem.mask.strides);
  const DeviceGain gains(gain, shape, weights);

  Tensor grad_weights = empty<4>({shape.batch, shape.heads, shape.queries, shape.keys}, weights.dtype, weights);
  Tensor grad_gain = empty<1>({shape.heads}, dtype_codes().float32, weights);
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) {
    torch::stable::zero_(grad_gain);
    return {std::move(grad_weights), std::move(grad_gain)};
  }
  problem.weights = view_of(weights);
  problem.grad_output = view_of(grad_output);
  problem.mask.data = mask.data();
  problem.gain = gains.data;
  problem.normalize = normalize;
  problem.grad_weights = grad_weights.mutable_data_ptr();
  problem.grad_gain = static_cast<float*>(grad_gain.mutable_data_ptr());
  const DeviceScope scope(weights);
  const Tensor gain_rows = scope.bytes(shape.batch * shape.heads * shape.queries * int64_t(sizeof(double)));
  problem.gain_rows = static_cast<double*>(gain_rows.mutable_data_ptr());
  cuda::start_rebalance_gradient(problem, gains.stride, scope.stream());
  return {std::move(grad_weights), std::move(grad_gain)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("rebalance", TORCH_BOX(&rebalance_uniform));
  library.impl("rebalance.per_head", TORCH_BOX(&rebalance_per_head));
  library.impl("rebalance_backward", TORCH_BOX(&rebalance_backward));
}

}  // namespace attnrb::ops
