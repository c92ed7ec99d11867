// Lays a backward out for a device and starts its kernels.
#include "gradient.h"

#include <algorithm>

#include "kernels/elementwise_parameters.h"
#include "layout.h"

namespace attnrb::cuda {
namespace {

const GradientLaunches& launches(DType dtype) {
  return dtype == DType::float32    ? float32_gradients
         : dtype == DType::bfloat16 ? bfloat16_gradients
                                    : float16_gradients;
}

int64_t carve(GradientParameters& g, void* workspace) {
  const Shape& shape = g.rows.problem.shape;
  const int64_t rows = shape.batch * shape.heads * shape.queries;
  Carver carver(workspace);
  g.words = carver.take<uint32_t>(8 * rows);
  const Edit& edit = g.rows.problem.edit;
  if (edit.indices != nullptr) g.gain_rows = carver.take<float>(rows);
  if (edit.indices != nullptr && edit.rule == Rule::rest) g.rest_rows = carver.take<float>(2 * rows);
  if (g.grad_bias != nullptr) g.bias_keys = carver.take<float>(shape.batch * shape.heads * shape.keys);
  if (g.grad_received != nullptr) g.shares = carver.take<float>(shape.batch * shape.heads * shape.keys);
  return carver.taken();
}

}  // namespace

AttentionProblem row_problem(const GradientProblem& problem) {
  AttentionProblem rows;
  rows.shape = problem.shape;
  rows.dtype = problem.dtype;
  rows.query = problem.query;
  rows.key = problem.key;
  rows.value = problem.value;
  rows.visibility = problem.visibility;
  rows.scoring = problem.scoring;
  rows.edit = problem.edit;
  return rows;
}

GradientPlan plan_gradient(const GradientProblem& problem, const Device& device, int gain_stride) {
  check_capability(device);
  const Shape& shape = problem.shape;
  if (shape.keys > std::numeric_limits<int32_t>::max() - 256)
    refuse("key: expected fewer than 2^31 - 256 keys, got ", shape.keys);
  GradientPlan plan;
  GradientParameters& g = plan.parameters;
  g.output = operand_of(problem.output, shape.value_width, problem.dtype);
  g.grad_output = operand_of(problem.grad_output, shape.value_width, problem.dtype);
  g.lse = problem.lse;
  g.grad_lse = problem.grad_lse;
  g.grad_received = problem.grad_received;
  g.grad_query = problem.grad_query;
  g.grad_key = problem.grad_key;
  g.grad_value = problem.grad_value;
  g.grad_gain = problem.grad_gain;
  g.grad_sinks = problem.grad_sinks;
  g.grad_bias = problem.grad_bias;
  std::copy_n(problem.grad_bias_strides, 3, g.grad_bias_strides);
  while (((shape.keys - 1) >> g.bucket_shift) >= 64) ++g.bucket_shift;

  AttentionParameters& p = g.rows;
  p.problem = row_problem(problem);
  set_rows(p, problem, shape.value_width, gain_stride);

  const int64_t widest = std::max(shape.width, shape.value_width), size = element_size(problem.dtype);
  const Edit& edit = problem.edit;
  plan.edited = edit.key_bias != nullptr || (edit.indices != nullptr && edit.rule == Rule::rest);
  plan.width = widest <= 64 && problem.grad_received == nullptr && !plan.edited && size == 2 ? 64 : 128;
  g.chunks = int32_t(divide_up(widest, plan.width));
  p.columns = int32_t(round_up(std::min<int64_t>(shape.width, plan.width), 16));
  p.value_columns = int32_t(round_up(std::min<int64_t>(shape.value_width, plan.width), 16));
  p.slices = g.chunks;
  const int64_t inner = problem.dtype == DType::float32 ? GradientTile<float>::inner : GradientTile<bfloat16>::inner;
  plan.shared_bytes = (kTileRows + 2 * inner) * ((p.columns + p.value_columns) * size + 2 * 16);
  check_shared("query", plan.shared_bytes, device);

  const int64_t heads = shape.batch * shape.key_heads;
  plan.query_blocks = check_blocks(heads * p.row_tiles * p.slices);
  plan.key_blocks = check_blocks(heads * divide_up(shape.keys, kTileRows) * p.slices);
  if (problem.grad_bias != nullptr) {
    check_blocks(plan.key_blocks * p.group);
    check_blocks(divide_up(shape.batch * shape.heads * edit.bias_slots, kThreads));
  }
  check_blocks(divide_up(shape.batch * shape.heads * std::max(shape.queries, shape.keys), kWarps));
  plan.workspace_bytes = carve(g, nullptr);
  return plan;
}

void start_gradient_rows(GradientPlan& plan, void* workspace, int32_t* status, void* stream) {
  GradientParameters& g = plan.parameters;
  carve(g, workspace);
  g.rows.status = status;
  launches(g.rows.problem.dtype).rows(plan, stream);
}

void start_gradient_tiles(const GradientPlan& plan, void* stream) {
  const GradientParameters& g = plan.parameters;
  const GradientLaunches& start = launches(g.rows.problem.dtype);
  if (g.grad_received != nullptr) {
    start_shares(plan, stream);
    start.task(plan, GradientTask::received_deltas, stream);
    start.task(plan, GradientTask::received_queries, stream);
    start.task(plan, GradientTask::received_keys, stream);
  } else {
    if (g.rest_rows != nullptr) start.task(plan, GradientTask::rest, stream);
    start.task(plan, GradientTask::queries, stream);
    start.task(plan, GradientTask::keys, stream);
  }
  if (g.grad_bias != nullptr) {
    start.task(plan, GradientTask::bias, stream);
    start_bias_sums(plan, stream);
  }
  if (g.grad_gain != nullptr || g.grad_sinks != nullptr) start_head_sums(plan, stream);
}

void start_gradient(GradientPlan& plan, void* workspace, int32_t* status, void* stream) {
  start_gradient_rows(plan, workspace, status, stream);
  start_gradient_tiles(plan, stream);
}

void start_rebalance_gradient(const RebalanceGradientProblem& problem, int gain_stride, void* stream) {
  RebalanceGradientParameters parameters;
  parameters.problem = problem;
  parameters.gain_stride = gain_stride;
  parameters.aligned = whole_rows(problem.weights, problem) && whole_rows(problem.grad_output, problem) &&
                       reinterpret_cast<uintptr_t>(problem.grad_weights) % 16 == 0;
  launches(problem.dtype).rebalance(parameters, row_blocks(problem.shape), stream);
  start_gain_sums(parameters, stream);
}

}  // namespace attnrb::cuda
