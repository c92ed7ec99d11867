// Finding and re-balancing in an attention matrix that stands in memory. Fused attention does both without one:
// attention.h. A Device has Gain and numbers() as there, outlier_mask(problem, like), rebalance(problem, gain, like)
// and rebalance_gradient(problem, gain, like), which lends the rows of the gain's gradient.
#pragma once

#include <tuple>

#include "ops/arguments.h"

namespace attnrb::ops {

template <class Device>
Tensor outlier_mask(const Tensor& weights_tensor, double threshold, int64_t query_offset) {
  const Operand weights("weights", weights_tensor);
  OutlierMaskProblem problem;
  problem.dtype = check_element_type(weights);
  problem.shape = check_weights(weights);
  const Shape& shape = problem.shape;
  check_threshold(threshold);
  check_slots("query_offset", query_offset, shape.queries, std::numeric_limits<int32_t>::min());

  Tensor mask = empty<4>({shape.batch, shape.heads, shape.queries, shape.keys}, dtype_codes().boolean, weights);
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) return mask;

  problem.weights = view_of(weights);
  problem.threshold = threshold;
  problem.query_offset = query_offset;
  problem.mask = static_cast<bool*>(mask.mutable_data_ptr());
  Device::outlier_mask(problem, weights);
  return mask;
}

// `gain` is a number, or a tensor with one for all heads or one each.
template <class Device, class Gain>
Tensor rebalance(const Tensor& weights_tensor, const Tensor& mask_tensor, const Gain& gain, bool normalize) {
  const Operand weights("weights", weights_tensor), mask("mask", mask_tensor);
  RebalanceProblem problem;
  problem.dtype = check_element_type(weights);
  problem.shape = check_weights(weights);
  const Shape& shape = problem.shape;
  check_dtype(mask, dtype_codes().boolean);
  check_device(mask, weights);
  check_broadcast(mask, shape, problem.mask.strides);
  const typename Device::Gain gains(gain, shape, weights);

  Tensor output = empty<4>({shape.batch, shape.heads, shape.queries, shape.keys}, weights.dtype, weights);
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) return output;

  problem.weights = view_of(weights);
  problem.mask.data = mask.data();
  problem.gain = Device::numbers(gains);
  problem.normalize = normalize;
  problem.output = output.mutable_data_ptr();
  Device::rebalance(problem, gains, weights);
  return output;
}

template <class Device>
Tensor rebalance_uniform(const Tensor& weights, const Tensor& mask, double gain, bool normalize) {
  return rebalance<Device>(weights, mask, gain, normalize);
}

template <class Device>
Tensor rebalance_per_head(const Tensor& weights, const Tensor& mask, const Tensor& gain, bool normalize) {
  return rebalance<Device>(weights, mask, gain, normalize);
}

template <class Device>
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
  const typename Device::Gain gains(gain, shape, weights);

  Tensor grad_weights = empty<4>({shape.batch, shape.heads, shape.queries, shape.keys}, weights.dtype, weights);
  Tensor grad_gain = empty<1>({shape.heads}, dtype_codes().float32, weights);
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) {
    torch::stable::zero_(grad_gain);
    return {std::move(grad_weights), std::move(grad_gain)};
  }
  problem.weights = view_of(weights);
  problem.grad_output = view_of(grad_output);
  problem.mask.data = mask.data();
  problem.gain = Device::numbers(gains);
  problem.normalize = normalize;
  problem.grad_weights = grad_weights.mutable_data_ptr();
  problem.grad_gain = static_cast<float*>(grad_gain.mutable_data_ptr());
  Device::rebalance_gradient(problem, gains, weights);
  return {std::move(grad_weights), std::move(grad_gain)};
}

}  // namespace attnrb::ops
