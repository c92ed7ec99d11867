// Starting what is added to a dense kernel of another library; the rules are those of launch.h.
#pragma once

#include "kernels/sparse_parameters.h"
#include "launch.h"

namespace attnrb::cuda {

struct SparsePlan {
  SparseParameters parameters;
  int64_t select_blocks = 0, shared_bytes = 0;  // 0 where no outliers are wanted
  int64_t correction_blocks = 0;                // 0 where there are none to strengthen
  AttentionPlan again;                          // of doubtful rows
  int64_t doubtful_numbers = 0;  // int32 numbers, zeros, that the caller has to lend until the work is done
};

// Whether the kernels below can go with another library's: 16-bit operands in whole units of 16 bytes, widths up to
// 256, queries that see all keys or those up to their own, scores that any library computes (without softcap, sinks or
// key bias, a positive scale), and no outliers under rule rest.
bool sparse_suits(const AttentionProblem& problem);

// What another library left. Its output lies in whole units of 16 bytes: where problem.output says, or elsewhere where
// there are outliers to strengthen, which write it anyway.
struct DensePart {
  View output;
  const float* lse = nullptr;
  int64_t lse_strides[3] = {0, 0, 0};
};
// Whether the dense output may lie elsewhere.
bool dense_suits(const AttentionProblem& problem, const View& output);
// `problem` as for plan_attention(): emit or edit is set, or both.
SparsePlan plan_sparse(const AttentionProblem& problem, const DensePart& dense, const Device& device,
                       int gain_stride = 1);
void start_sparse(SparsePlan& plan, int32_t* doubtful, int32_t* status, void* stream);

}  // namespace attnrb::cuda
