// Gradients of the three attention ops on the device.
#include "ops/attention_backward.h"

#include "device.h"
#include "gradient.h"

namespace attnrb::ops {
namespace {

struct CudaDevice {
  using Gain = DeviceGain;
  static const float* numbers(const DeviceGain& gain) { return gain.data; }
  static void differentiate(const GradientProblem& problem, const Operand& query, const DeviceGain* gain) {
    const DeviceScope scope(query);
    cuda::GradientPlan plan = cuda::plan_gradient(problem, scope.device(), gain == nullptr ? 1 : gain->stride);
    const Tensor workspace = scope.bytes(plan.workspace_bytes);
    DeviceStatus status(problem.boost, query);
    cuda::start_gradient(plan, workspace.mutable_data_ptr(), status.data(), scope.stream());
    status.check(scope.stream());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("source_attention_backward", TORCH_BOX(&source_attention_backward<CudaDevice>));
  library.impl("rebalanced_attention_backward", TORCH_BOX(&rebalanced_attention_backward<CudaDevice>));
  library.impl("received_attention_backward", TORCH_BOX(&received_attention_backward<CudaDevice>));
}

}  // namespace attnrb::ops
