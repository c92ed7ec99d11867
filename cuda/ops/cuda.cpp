// The ops on the device: its kernels under the checks that every device shares.
#include "dense.h"
#include "library.h"
#include "ops/attention.h"
#include "ops/attention_backward.h"
#include "ops/paged_attention.h"
#include "ops/received_attention.h"
#include "ops/weights.h"
#include "ops/write_keys.h"
#include "sparse_gradient.h"
#include "tables.h"

namespace attnrb::ops {
namespace {

struct CudaDevice {
  using Gain = DeviceGain;
  using Paging = DevicePaging;
  static constexpr bool values_on_host = false;
  static const float* numbers(const DeviceGain& gain) { return gain.data; }
  static void clear(const Tensor& tensor) {
    Tensor zeros = tensor;
    torch::stable::zero_(zeros);
  }

  static Tensor attend(AttentionProblem& problem, const Operand& /*query*/, const AttentionTensors& tensors,
                       const DeviceGain* gain) {
    const Tensor output =
        attend_on_device(problem, tensors.query, tensors.key, tensors.value, gain == nullptr ? 1 : gain->stride);
    return tensors.rows_first ? torch::stable::transpose(output, 1, 2) : output;
  }

  static void attend_in_blocks(const AttentionProblem& problem, const DevicePaging& paging,
                               const Attended& /*attended*/, const Operand& query, const DeviceGain* gain,
                               bool own_output) {
    if (problem.shape.queries * problem.shape.heads == 0) return;
    const DeviceScope scope(query);
    cuda::AttentionPlan plan = cuda::plan_attention(problem, scope.device(), true, gain == nullptr ? 1 : gain->stride);
    plan.parameters.skipped = own_output ? cuda::Skipped::cleared : cuda::Skipped::told;
    const Tensor workspace = scope.bytes(plan.workspace_bytes);
    const DeviceStatus status(problem.edit, query);
    paging.start(scope.stream());
    cuda::start_attention(plan, workspace.mutable_data_ptr(), status.data(), scope.stream());
    status.check(scope.stream());
  }

  static void write_keys(const WriteProblem& problem, const Operand& key) { write_keys_on_device(problem, key); }

  static void receive(const ReceivedProblem& problem, const Operand& query) {
    const DeviceScope scope(query);
    cuda::ReceivedPlan plan = cuda::plan_received(problem, scope.device());
    const Tensor workspace = scope.bytes(plan.workspace_bytes);
    cuda::start_received(plan, workspace.mutable_data_ptr(), scope.stream());
  }

  static void differentiate(const GradientProblem& problem, const Operand& query, const DeviceGain* gain,
                            const BackwardTensors* tensors) {
    const DeviceScope scope(query);
    const int gain_stride = gain == nullptr ? 1 : gain->stride;
    if (tensors != nullptr && differentiate_parts(problem, query, gain_stride, *tensors, scope)) return;
    cuda::GradientPlan plan = cuda::plan_gradient(problem, scope.device(), gain_stride);
    const Tensor workspace = scope.bytes(plan.workspace_bytes);
    DeviceStatus status(problem.edit, query);
    cuda::start_gradient(plan, workspace.mutable_data_ptr(), status.data(), scope.stream());
    status.check(scope.stream());
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

 private:
  // The dense part by PyTorch's flash backward, where it takes the case; returns whether it did.
  static bool differentiate_parts(const GradientProblem& problem, const Operand& query, int gain_stride,
                                  const BackwardTensors& tensors, const DeviceScope& scope) {
    if (problem.shape.queries < kFewestQueries || !cuda::sparse_suits(problem) ||
        !Operand("lse", tensors.lse).is_contiguous())
      return false;
    const std::optional<DenseGradients> dense =
        differentiate_densely(tensors.grad_output, tensors.query, tensors.key, tensors.value, tensors.output,
                              tensors.lse, problem.visibility.causal, double(problem.scoring.scale));
    if (!dense) return false;
    const auto view = [](const Tensor& tensor) { return view_of(Operand("dense", tensor)); };
    const cuda::DenseGradientViews views{view(dense->query), view(dense->key), view(dense->value)};
    if (!cuda::dense_suits(problem, views)) return false;
    cuda::SparseGradientPlan plan = cuda::plan_sparse_gradient(problem, views, scope.device(), gain_stride);
    const Tensor workspace = scope.bytes(plan.workspace_bytes);
    Tensor zeros = empty<1>({plan.zero_numbers}, dtype_codes().int32, query);
    torch::stable::zero_(zeros);
    const DeviceStatus status(problem.edit, query);
    cuda::start_sparse_gradient(plan, workspace.mutable_data_ptr(), static_cast<int32_t*>(zeros.mutable_data_ptr()),
                                status.data(), scope.stream());
    status.check(scope.stream());
    return true;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("attention", &boxed<&attention<CudaDevice>>);
  library.impl("attention.output", &boxed<&attention_output<CudaDevice>>);
  library.impl("attention.output_heads_first", &boxed<&attention_output_heads_first<CudaDevice>>);
  library.impl("attention.into", &boxed<&attention_into<CudaDevice>>);
  library.impl("attention.output_into", &boxed<&attention_output_into<CudaDevice>>);
  library.impl("write_keys", &boxed<&write_keys<CudaDevice>>);
  library.impl("attention_training", &boxed<&attention_training<CudaDevice>>);
  library.impl("attention_backward", &boxed<&attention_backward<CudaDevice>>);
  library.impl("source_attention", &boxed<&source_attention<CudaDevice>>);
  library.impl("rebalanced_attention", &boxed<&rebalanced_attention<CudaDevice>>);
  library.impl("received_attention", &boxed<&received_attention<CudaDevice>>);
  library.impl("received_attention_training", &boxed<&received_attention_training<CudaDevice>>);
  library.impl("received_attention.edited", &boxed<&received_attention<CudaDevice>>);
  library.impl("outlier_mask", TORCH_BOX(&outlier_mask<CudaDevice>));
  library.impl("rebalance", TORCH_BOX(&rebalance_uniform<CudaDevice>));
  library.impl("rebalance.per_head", TORCH_BOX(&rebalance_per_head<CudaDevice>));
  library.impl("rebalance_backward", TORCH_BOX(&rebalance_backward<CudaDevice>));
  library.impl("received_attention_backward", &boxed<&received_attention_backward<CudaDevice>>);
}

}  // namespace attnrb::ops
