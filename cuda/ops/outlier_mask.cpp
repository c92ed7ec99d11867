// The outliers of an attention matrix that stands in device memory.
#include "device.h"

namespace attnrb::ops {
namespace {

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
  const DeviceScope scope(weights);
  cuda::start_outlier_mask(problem, scope.stream());
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) { library.impl("outlier_mask", TORCH_BOX(&outlier_mask)); }

}  // namespace attnrb::ops
