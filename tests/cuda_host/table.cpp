#include "table.h"

#include <algorithm>
#include <vector>

#include "gradient.h"
#include "launch.h"
#include "sparse.h"

namespace attnrb {
namespace {

cuda::Device device(int multiprocessors) {
  cuda::Device device;
  device.multiprocessors = multiprocessors;
  // Of capability 8.6, the least, and of 9.0, the most: with a third buffer for keys (Note: [Two stages]).
  device.shared_bytes = (multiprocessors == 0 ? 99 : 227) * 1024;
  device.capability = 86;
  return device;
}

// Exactly as large as asked for, and NaN at first.
struct Workspace {
  explicit Workspace(int64_t bytes) : memory(size_t(bytes), 0xff) {}
  std::vector<unsigned char> memory;
};

template <int multiprocessors>
Status attention(const AttentionProblem& problem, const ThreadPool&, Scratch&) {
  AttentionProblem allowed = problem;
  if (allowed.edit.capacity == 0) allowed.edit.indices = nullptr;
  cuda::AttentionPlan plan = cuda::plan_attention(allowed, device(multiprocessors));
  Workspace workspace(plan.workspace_bytes);
  int32_t status = int32_t(Status::ok);
  cuda::start_attention(plan, workspace.memory.data(), &status, nullptr);
  return Status(status);
}

template <int multiprocessors>
void received_attention(const ReceivedProblem& problem, const ThreadPool&, Scratch&) {
  cuda::ReceivedPlan plan = cuda::plan_received(problem, device(multiprocessors));
  Workspace workspace(plan.workspace_bytes);
  cuda::start_received(plan, workspace.memory.data(), nullptr);
}

Status gradient(const GradientProblem& problem, const ThreadPool&, Scratch&) {
  GradientProblem allowed = problem;
  if (allowed.edit.capacity == 0) allowed.edit.indices = nullptr;
  cuda::GradientPlan plan = cuda::plan_gradient(allowed, device(0));
  Workspace workspace(plan.workspace_bytes);
  int32_t status = int32_t(Status::ok);
  cuda::start_gradient(plan, workspace.memory.data(), &status, nullptr);
  return Status(status);
}

void outlier_mask(const OutlierMaskProblem& problem, const ThreadPool&) { cuda::start_outlier_mask(problem, nullptr); }

void rebalance(const RebalanceProblem& problem, const ThreadPool&) { cuda::start_rebalance(problem, 1, 0.0f, nullptr); }

void rebalance_gradient(const RebalanceGradientProblem& problem, const ThreadPool&) {
  cuda::start_rebalance_gradient(problem, 1, nullptr);
}

}  // namespace

const Kernels emulated_cuda_kernels = {"cuda",       attention<0>, received_attention<0>, gradient,
                                       outlier_mask, rebalance,    rebalance_gradient};
const Kernels emulated_cuda_split_kernels = {
    "cuda", attention<1000>, received_attention<1000>, nullptr, outlier_mask, rebalance, nullptr};

Status add_sparse_part(const AttentionProblem& problem, const cuda::DensePart& dense) {
  cuda::SparsePlan plan = cuda::plan_sparse(problem, dense, device(0));
  std::vector<int32_t> doubtful(size_t(plan.doubtful_numbers), 0);
  int32_t status = int32_t(Status::ok);
  cuda::start_sparse(plan, doubtful.data(), &status, nullptr);
  return Status(status);
}

Status add_sparse_gradient(const GradientProblem& problem, const cuda::DenseGradientViews& dense, int32_t most_parts) {
  cuda::SparseGradientPlan plan = cuda::plan_sparse_gradient(problem, dense, device(0));
  plan.parameters.most_parts = std::min(plan.parameters.most_parts, most_parts);
  Workspace workspace(plan.workspace_bytes);
  std::vector<int32_t> zeros(size_t(plan.zero_numbers), 0);
  int32_t status = int32_t(Status::ok);
  cuda::start_sparse_gradient(plan, workspace.memory.data(), zeros.data(), &status, nullptr);
  return Status(status);
}

}  // namespace attnrb
