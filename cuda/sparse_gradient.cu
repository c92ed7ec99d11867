// Gradients of outliers beside a dense backward of another library.
#include "sparse_gradient.h"

#include "kernels/outlier_index.h"
#include "kernels/sparse_gradient.h"
#include "layout.h"
#include "sparse.h"

namespace attnrb::cuda {
namespace {

constexpr int64_t kWidest = 192;

int64_t key_tiles(const Shape& shape) { return divide_up(shape.keys, kTileRows); }

// Both of what the caller lends, in the order of their pointers.
void carve(SparseGradientPlan& plan, void* workspace, int32_t* zeros) {
  SparseGradientParameters& s = plan.parameters;
  const AttentionProblem& problem = plan.own.parameters.rows.problem;
  const Shape& shape = problem.shape;
  const int64_t heads = shape.batch * shape.key_heads, row_tiles = plan.own.parameters.rows.row_tiles;
  const bool indexed = problem.edit.indices != nullptr;
  Carver carver(workspace);
  carver.take<unsigned char>(plan.own.workspace_bytes);
  if (indexed) {
    s.starts = carver.take<int32_t>(heads * (shape.keys + 1));
    s.entries = carver.take<int32_t>(heads * plan.own.parameters.rows.rows * problem.edit.capacity);
  }
  plan.workspace_bytes = carver.taken();
  plan.zero_numbers = heads * (row_tiles + key_tiles(shape) + (indexed ? shape.keys * kIndexChunks : 0));
  if (zeros == nullptr) return;
  s.doubtful_rows = zeros;
  s.doubtful_keys = zeros + heads * row_tiles;
  s.places = zeros + heads * (row_tiles + key_tiles(shape));
}

template <class T, int Lanes>
void start_parts(const SparseGradientParameters& s, void* stream) {
  const AttentionParameters& p = s.all.rows;
  const Shape& shape = p.problem.shape;
  const int64_t heads = shape.batch * shape.key_heads;
  launch<sparse_queries_kernel<T, Lanes>>(divide_up(heads * p.rows, kWarps), kThreads, 0, stream, s);
  launch<sparse_keys_kernel<T, Lanes>>(heads * shape.keys, kThreads,
                                       2 * kThreads * Unit<T>::size * int64_t(sizeof(float)), stream, s);
}

template <class T>
void start(const SparseGradientParameters& s, void* stream) {
  const AttentionParameters& p = s.all.rows;
  const Shape& shape = p.problem.shape;
  const int64_t heads = shape.batch * shape.key_heads;
  if (p.problem.edit.indices != nullptr) {
    const int64_t blocks = divide_up(heads * kIndexChunks, kWarps);
    launch<index_rows_kernel<false>>(blocks, kThreads, 0, stream, s);
    launch<index_places_kernel<kThreads>>(divide_up(heads * shape.keys, kThreads), kThreads, 0, stream, s);
    launch<index_starts_kernel<kThreads>>(heads, kThreads, kThreads * int64_t(sizeof(int32_t)), stream, s);
    launch<index_rows_kernel<true>>(blocks, kThreads, 0, stream, s);
  }
  if (shape.width <= 64)
    start_parts<T, 8>(s, stream);
  else if (shape.width <= 128)
    start_parts<T, 16>(s, stream);
  else
    start_parts<T, 32>(s, stream);
}

}  // namespace

bool sparse_suits(const GradientProblem& problem) {
  const Shape& shape = problem.shape;
  const auto aligned = [&](const View& view) { return operand_of(view, shape.width, problem.dtype).aligned; };
  return sparse_suits(row_problem(problem)) && shape.width <= kWidest && problem.grad_lse == nullptr &&
         problem.grad_received == nullptr && aligned(problem.output) && aligned(problem.grad_output) &&
         shape.heads / shape.key_heads * shape.queries * std::max<int64_t>(problem.edit.capacity, 1) <=
             std::numeric_limits<int32_t>::max();
}

bool dense_suits(const GradientProblem& problem, const DenseGradientViews& dense) {
  const auto aligned = [&](const View& view) { return operand_of(view, problem.shape.width, problem.dtype).aligned; };
  return aligned(dense.query) && aligned(dense.key) && aligned(dense.value);
}

SparseGradientPlan plan_sparse_gradient(const GradientProblem& problem, const DenseGradientViews& dense,
                                        const Device& device, int gain_stride) {
  const Shape& shape = problem.shape;
  SparseGradientPlan plan;
  plan.own = plan_gradient(problem, device, gain_stride);
  plan.parameters.dense_query = operand_of(dense.query, shape.width, problem.dtype);
  plan.parameters.dense_key = operand_of(dense.key, shape.width, problem.dtype);
  plan.parameters.dense_value = operand_of(dense.value, shape.value_width, problem.dtype);
  plan.parameters.chunk_rows = divide_up(plan.own.parameters.rows.rows, kIndexChunks);
  check_blocks(shape.batch * shape.key_heads * shape.keys);
  carve(plan, nullptr, nullptr);
  return plan;
}

void start_sparse_gradient(SparseGradientPlan& plan, void* workspace, int32_t* zeros, int32_t* status, void* stream) {
  carve(plan, workspace, zeros);
  start_gradient_rows(plan.own, workspace, status, stream);
  plan.parameters.all = plan.own.parameters;
  if (plan.own.parameters.rows.problem.dtype == DType::bfloat16)
    start<bfloat16>(plan.parameters, stream);
  else
    start<float16>(plan.parameters, stream);
  plan.own.parameters.wanted_rows = plan.parameters.doubtful_rows;
  plan.own.parameters.wanted_keys = plan.parameters.doubtful_keys;
  start_gradient_tiles(plan.own, stream);
}

}  // namespace attnrb::cuda
