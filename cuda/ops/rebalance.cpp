// Re-balances an attention matrix that stands in device memory.
#include "device.h"

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("rebalance", TORCH_BOX(&rebalance_uniform));
  library.impl("rebalance.per_head", TORCH_BOX(&rebalance_per_head));
}

}  // namespace attnrb::ops
