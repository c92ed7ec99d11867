// Gradients of outliers beside a dense backward of another library.
#include "sparse_gradient.h"

#include <algorithm>

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
  const int64_t rows = plan.own.parameters.rows.rows, keys = heads * shape.keys;
  const bool indexed = problem.edit.indices != nullptr;
  Carver carver(workspace);
  carver.take<unsigned char>(plan.own.workspace_bytes);
  if (indexed) {
    s.starts = carver.take<int32_t>(keys);
    s.ends = carver.take<int32_t>(keys);
    s.entries = carver.take<int32_t>(heads * rows * problem.edit.capacity);
  }
  if (plan.most_long_keys > 0) {
    s.long_keys = carver.take<int32_t>(plan.most_long_keys);
    s.first_parts = carver.take<int32_t>(keys);
    s.part_sums = carver.take<float>(2 * s.most_parts * 8 * lanes_of_row(shape.width));
    s.bits = carver.take<uint32_t>(s.sorters * divide_up(rows, 32));
  }
  plan.workspace_bytes = carver.taken();
  int64_t taken = 0;
  const auto take = [&](int64_t count) {
    taken += count;
    return zeros == nullptr ? nullptr : zeros + (taken - count);
  };
  s.doubtful_rows = take(heads * row_tiles);
  s.doubtful_keys = take(heads * key_tiles(shape));
  if (indexed) {
    s.counts = take(keys);
    s.taken = take(heads);
    s.totals = take(2);
    s.part_keys = take(s.most_parts);
  }
  plan.zero_numbers = taken;
}

// Of a key head, there are at most so many keys with more than kPart rows, and parts of them.
void bound_long_keys(SparseGradientPlan& plan) {
  const AttentionParameters& p = plan.own.parameters.rows;
  const Edit& edit = p.problem.edit;
  if (edit.indices == nullptr) return;
  const int64_t heads = p.problem.shape.batch * p.problem.shape.key_heads, entries = p.rows * edit.capacity;
  const int64_t keys = p.rows <= kPart ? 0 : std::min(p.problem.shape.keys, entries / (kPart + 1));
  plan.most_long_keys = heads * keys;
  plan.parameters.most_parts =
      int32_t(std::min<int64_t>(kMostParts, heads * std::min(keys * divide_up(p.rows, kPart), 2 * entries / kPart)));
  plan.parameters.sorters = int32_t(std::min<int64_t>(kMostSorters, plan.most_long_keys));
}

template <class T, int Lanes>
void start_parts(const SparseGradientParameters& s, void* stream) {
  const AttentionParameters& p = s.all.rows;
  const Shape& shape = p.problem.shape;
  const int64_t heads = shape.batch * shape.key_heads;
  const int64_t shared_bytes = 2 * kThreads * Unit<T>::size * int64_t(sizeof(float)) + 2 * kPart * 4;
  launch<sparse_queries_kernel<T, Lanes>>(divide_up(heads * p.rows, kWarps), kThreads, 0, stream, s);
  launch<sparse_keys_kernel<T, Lanes>>(s.most_parts + heads * shape.keys, kThreads, shared_bytes, stream, s);
  launch<sparse_parts_kernel<T, Lanes>>(s.sorters, kThreads, 0, stream, s);
}

template <class T>
void start(const SparseGradientParameters& s, void* stream) {
  const AttentionParameters& p = s.all.rows;
  const Shape& shape = p.problem.shape;
  const int64_t heads = shape.batch * shape.key_heads;
  if (p.problem.edit.indices != nullptr) {
    const int64_t blocks = divide_up(heads * divide_up(p.rows, 32), kWarps);
    launch<index_rows_kernel<false>>(blocks, kThreads, 0, stream, s);
    launch<index_starts_kernel<kThreads>>(heads * divide_up(shape.keys, kThreads), kThreads, 0, stream, s);
    launch<index_rows_kernel<true>>(blocks, kThreads, 0, stream, s);
    launch<index_order_kernel<kThreads>>(s.sorters, kThreads, kThreads * int64_t(sizeof(int32_t)), stream, s);
  }
  if (lanes_of_row(shape.width) == 8)
    start_parts<T, 8>(s, stream);
  else if (lanes_of_row(shape.width) == 16)
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
  check_blocks(shape.batch * shape.key_heads * shape.keys + kMostParts);
  bound_long_keys(plan);
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
