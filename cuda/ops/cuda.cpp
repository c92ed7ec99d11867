// The ops on the device: its kernels under the checks that every device shares.
#include "gradient.h"
#include "library.h"
#include "ops/attention.h"
#include "ops/received_attention.h"
#include "ops/weights.h"

namespace attnrb::ops {
namespace {

struct CudaDevice {
  using Gain = DeviceGain;
  static const float* numbers(const DeviceGain& gain) { return gain.data; }

  static Tensor attend(AttentionProblem& problem, const Operand& /*query*/, const AttentionTensors& tensors,
                       const DeviceGain* gain) {
    return attend_on_device(problem, tensors.query, tensors.key, tensors.value, gain == nullptr ? 1 : gain->stride);
  }

  static void receive(const ReceivedProblem& problem, const Operand& query) {
    const DeviceScope scope(query);
    cuda::ReceivedPlan plan = cuda::plan_received(problem, scope.device());
    const Tensor workspace = scope.bytes(plan.workspace_bytes);
    cuda::start_received(plan, workspace.mutable_data_ptr(), scope.stream());
  }

  static void outlier_mask(const OutlierMaskProblem& problem, const Operand& weights) {
    const DeviceScope scope(weights);
    cuda::start_outlier_mask(problem, scope.stream());
  }

  static void rebalance(const RebalanceProblem& problem, const DeviceGain& gain, const Operand& weights) {
    const DeviceScope scope(weights);
    cuda::start_rebalance(problem, gain.stride, gain.value, scope.stream());
  }

  static void rebalance_gradient(RebalanceGradientProblem& problem, const DeviceGain& gain, const Operand& weights) {
    const DeviceScope scope(weights);
    const int64_t rows = problem.shape.batch * problem.shape.heads * problem.shape.queries;
    const Tensor gain_rows = scope.bytes(rows * int64_t(sizeof(double)));
    problem.gain_rows = static_cast<double*>(gain_rows.mutable_data_ptr());
    cuda::start_rebalance_gradient(problem, gain.stride, scope.stream());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("source_attention", TORCH_BOX(&source_attention<CudaDevice>));
  library.impl("source_attention_training", TORCH_BOX(&source_attention<CudaDevice>));
  library.impl("rebalanced_attention", TORCH_BOX(&rebalanced_attention<CudaDevice>));
  library.impl("rebalanced_attention_training", TORCH_BOX(&rebalanced_attention_training<CudaDevice>));
  library.impl("received_attention", TORCH_BOX(&received_attention<CudaDevice>));
  library.impl("received_attention_training", TORCH_BOX(&received_attention_training<CudaDevice>));
  library.impl("outlier_mask", TORCH_BOX(&outlier_mask<CudaDevice>));
  library.impl("rebalance", TORCH_BOX(&rebalance_uniform<CudaDevice>));
  library.impl("rebalance.per_head", TORCH_BOX(&rebalance_per_head<CudaDevice>));
  library.impl("rebalance_backward", TORCH_BOX(&rebalance_backward<CudaDevice>));
}

}  // namespace attnrb::ops
