// Selecting and strengthening outliers beside a dense kernel of another library.
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/correction.h"
#include "kernels/select.h"
#include "layout.h"

namespace attnrb::cuda {
namespace {

constexpr int64_t kWidest = 256;
// Libraries give batch elements and heads a dimension of the grid each.
constexpr int64_t kMostBlocks = 65535;
// The correction counts rows, slots and what lies between rows of keys in 32 bits.
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max(), kMostBytes = std::numeric_limits<uint32_t>::max();

int64_t row_bytes(const View& view, DType dtype) { return view.strides[2] * element_size(dtype); }

template <class T>
void start(const SparsePlan& plan, void* stream) {
  // What is found is found by the weights before they are strengthened.
  if (plan.select_blocks > 0)
    launch<select_kernel<T>>(plan.select_blocks, kThreads, plan.shared_bytes, stream, plan.parameters);
  const int lanes = lanes_of_row(plan.parameters.rows.query.width);
  if (lanes == 8)
    launch<correction_kernel<T, 8>>(plan.correction_blocks, kThreads, 0, stream, plan.parameters);
  else if (lanes == 16)
    launch<correction_kernel<T, 16>>(plan.correction_blocks, kThreads, 0, stream, plan.parameters);
  else
    launch<correction_kernel<T, 32>>(plan.correction_blocks, kThreads, 0, stream, plan.parameters);
}

}  // namespace

bool sparse_suits(const AttentionProblem& problem) {
  const Shape& shape = problem.shape;
  const Visibility& visible = problem.visibility;
  const bool square =
      shape.queries == shape.keys && visible.query_offsets == nullptr && visible.query_offset == visible.key_offset;
  // A key bias would have to enter their scores; and under rule rest, what all others weigh together is summed from
  // themselves.
  const Edit& edit = problem.edit;
  const bool beside = edit.key_bias == nullptr && (edit.indices == nullptr || edit.rule != Rule::rest);
  const auto aligned = [&](const View& view) { return operand_of(view, shape.width, problem.dtype).aligned; };
  const auto short_rows = [&](const View& view) { return row_bytes(view, problem.dtype) <= kMostBytes; };
  // A scale of zero or less turns the order of scores around, in which flash kernels look for a row's largest.
  const bool plain_scores =
      problem.scoring.scale > 0.0f && problem.scoring.softcap == 0.0f && problem.scoring.sinks == nullptr;
  return problem.dtype != DType::float32 && plain_scores && beside && shape.width == shape.value_width &&
         shape.width <= kWidest && shape.heads / shape.key_heads * shape.queries <= kMostRows &&
         visible.key_offset >= 0 && visible.key_offset <= kMostRows && short_rows(problem.key) &&
         short_rows(problem.value) && shape.batch <= kMostBlocks && shape.heads <= kMostBlocks &&
         (!visible.causal || square) && visible.window == 0 && visible.chunk == 0 && visible.key_start == nullptr &&
         visible.key_end == nullptr && visible.mask == nullptr && aligned(problem.query) && aligned(problem.key) &&
         aligned(problem.value);
}

bool dense_suits(const AttentionProblem& problem, const View& output) {
  return problem.edit.indices != nullptr && operand_of(output, problem.shape.value_width, problem.dtype).aligned;
}

SparsePlan plan_sparse(const AttentionProblem& problem, const DensePart& dense, const Device& device, int gain_stride) {
  check_capability(device);
  const Shape& shape = problem.shape;
  SparsePlan plan;
  plan.parameters.key_bytes = uint32_t(row_bytes(problem.key, problem.dtype));
  plan.parameters.value_bytes = uint32_t(row_bytes(problem.value, problem.dtype));
  plan.parameters.dense_output = dense.output.data;
  std::copy_n(dense.output.strides, 3, plan.parameters.dense_strides);
  plan.parameters.dense_lse = dense.lse;
  std::copy_n(dense.lse_strides, 3, plan.parameters.lse_strides);
  AttentionParameters& p = plan.parameters.rows;
  p.problem = problem;
  set_rows(p, problem, shape.value_width, gain_stride);
  const int64_t heads = shape.batch * shape.key_heads;
  plan.doubtful_numbers = heads * (p.row_tiles + p.rows);
  plan.again = plan_attention(problem, device, true, gain_stride, false);
  if (problem.edit.indices != nullptr)
    plan.correction_blocks = check_blocks(heads * divide_up(p.rows, kThreads / lanes_of_row(shape.width)));
  if (problem.emit.indices == nullptr) return plan;
  p.threshold_log2 = float(std::log2(problem.emit.threshold));
  p.columns = int32_t(round_up(shape.width, 16));
  p.layout = row_layout(p.columns, element_size(problem.dtype));
  plan.select_blocks = check_blocks(heads * p.row_tiles);
  plan.shared_bytes = 3 * kTileRows * p.layout.stride * element_size(problem.dtype);
  check_shared("query", plan.shared_bytes, device);
  return plan;
}

void start_sparse(SparsePlan& plan, int32_t* doubtful, int32_t* status, void* stream) {
  plan.parameters.rows.status = status;
  const AttentionParameters& p = plan.parameters.rows;
  const int64_t heads = p.problem.shape.batch * p.problem.shape.key_heads;
  plan.again.parameters.wanted_tiles = plan.parameters.doubtful_tiles = doubtful;
  plan.again.parameters.wanted_rows = plan.parameters.doubtful_rows = doubtful + heads * p.row_tiles;
  if (plan.parameters.rows.problem.dtype == DType::bfloat16)
    start<bfloat16>(plan, stream);
  else
    start<float16>(plan, stream);
  start_attention(plan.again, nullptr, status, stream);
}

}  // namespace attnrb::cuda
