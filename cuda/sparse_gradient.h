// Starting what is added to a dense backward of another library; the rules are those of launch.h.
#pragma once

#include "gradient.h"
#include "kernels/sparse_gradient_parameters.h"

namespace attnrb::cuda {

struct SparseGradientPlan {
  GradientPlan own;  // of doubtful tiles, and what is known of each row
  SparseGradientParameters parameters;
  int64_t most_long_keys = 0;
  int64_t workspace_bytes = 0;  // device memory the caller has to lend until the work is done
  int64_t zero_numbers = 0;     // int32 numbers, zeros, likewise
};

// Whether the kernels can go with another library's backward: as sparse_suits() of the forward, with widths up to 192,
// beyond which flash kernels lack shared memory on some devices, and without a gradient of the log-sum-exp.
bool sparse_suits(const GradientProblem& problem);

// `dense`: the dense part of the gradients of query, key and value, in whole units of 16 bytes (see dense_suits()).
struct DenseGradientViews {
  View query, key, value;
};
bool dense_suits(const GradientProblem& problem, const DenseGradientViews& dense);
SparseGradientPlan plan_sparse_gradient(const GradientProblem& problem, const DenseGradientViews& dense,
                                        const Device& device, int gain_stride = 1);
void start_sparse_gradient(SparseGradientPlan& plan, void* workspace, int32_t* zeros, int32_t* status, void* stream);

}  // namespace attnrb::cuda
