// AVX2 for float32 alone; 16-bit types are served by the portable kernels. planted_core.py compiles it with a fault.
#define ATTNRB_ISA avx2
#include "core/kernels/vec_avx2.h"

#include "core/kernels/table.h"

namespace attnrb {

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;

namespace {

const Kernels& table(DType dtype) {
  static const Kernels faulty = avx2::make_table<avx2::FloatChoice>("avx2");
  return dtype == DType::float32 ? faulty : portable_kernels;
}

Status attention(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch) {
  return table(problem.dtype).attention(problem, pool, scratch);
}
void received_attention(const ReceivedProblem& problem, const ThreadPool& pool, Scratch& scratch) {
  table(problem.dtype).received_attention(problem, pool, scratch);
}
Status gradient(const GradientProblem& problem, const ThreadPool& pool, Scratch& scratch) {
  return table(problem.dtype).gradient(problem, pool, scratch);
}
void outlier_mask(const OutlierMaskProblem& problem, const ThreadPool& pool) {
  table(problem.dtype).outlier_mask(problem, pool);
}
void rebalance(const RebalanceProblem& problem, const ThreadPool& pool) {
  table(problem.dtype).rebalance(problem, pool);
}
void rebalance_gradient(const RebalanceGradientProblem& problem, const ThreadPool& pool) {
  table(problem.dtype).rebalance_gradient(problem, pool);
}

}  // namespace

const Kernels avx2_kernels = {"avx2",       attention, received_attention, gradient,
                              outlier_mask, rebalance, rebalance_gradient};

}  // namespace attnrb
