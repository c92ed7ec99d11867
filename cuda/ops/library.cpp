#include "library.h"

#include "dense.h"
#include "sparse.h"

namespace attnrb::ops {
namespace {

// A result brought to where the op's schema has it.
Tensor in_layout(const Tensor& output, const OutputLayout& layout, const Operand& like) {
  Tensor copy = empty_output(layout, like);
  torch::stable::copy_(copy, output);
  return copy;
}

// What a dense kernel left becomes what the problem asks for; returns the output.
Tensor add_sparse_part(AttentionProblem& problem, const DenseAttention& dense, const DeviceScope& scope,
                       const Operand& query, int gain_stride) {
  const OutputLayout layout(problem.shape);
  const Operand found("output", dense.output), lse("lse", dense.lse);
  const bool lies_so = std::equal(layout.strides.begin(), layout.strides.end(), found.strides);
  // What strengthens outliers reads and writes every element: it may as well write another layout.
  const bool moved = !lies_so && cuda::dense_suits(problem, view_of(found));
  const Tensor output = lies_so ? dense.output
                        : moved ? empty_output(layout, query)
                                : in_layout(dense.output, layout, query);
  set_output(problem, layout, output);
  const View view = view_of(moved ? found : Operand("output", output));
  const cuda::DensePart part{
      view, static_cast<const float*>(lse.data()), {lse.strides[0], lse.strides[1], lse.strides[2]}};
  cuda::SparsePlan plan = cuda::plan_sparse(problem, part, scope.device(), gain_stride);
  Tensor doubtful = empty<1>({plan.doubtful_numbers}, dtype_codes().int32, query);
  torch::stable::zero_(doubtful);
  const DeviceStatus status(problem.edit, query);
  cuda::start_sparse(plan, static_cast<int32_t*>(doubtful.mutable_data_ptr()), status.data(), scope.stream());
  status.check(scope.stream());
  return output;
}

void attend_alone(const AttentionProblem& problem, const DeviceScope& scope, const Operand& query, int gain_stride) {
  cuda::AttentionPlan plan = cuda::plan_attention(problem, scope.device(), true, gain_stride);
  const Tensor workspace = scope.bytes(plan.workspace_bytes);
  const DeviceStatus status(problem.edit, query);
  cuda::start_attention(plan, workspace.mutable_data_ptr(), status.data(), scope.stream());
  status.check(scope.stream());
}

}  // namespace

Tensor attend_on_device(AttentionProblem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                        int gain_stride) {
  const Operand like("query", query);
  const DeviceScope scope(like);
  // Plain attention, where there is no outlier set at all, is left to the kernels that the tests compare it with.
  const bool sparse = problem.emit.indices != nullptr || problem.edit.indices != nullptr;
  if (sparse && problem.shape.queries >= kFewestQueries && cuda::sparse_suits(problem)) {
    const std::optional<DenseAttention> dense =
        attend_densely(query, key, value, problem.visibility.causal, double(problem.scoring.scale));
    if (dense) return add_sparse_part(problem, *dense, scope, like, gain_stride);
  }
  const OutputLayout layout(problem.shape);
  Tensor output = empty_output(layout, like);
  set_output(problem, layout, output);
  attend_alone(problem, scope, like, gain_stride);
  return output;
}

}  // namespace attnrb::ops
