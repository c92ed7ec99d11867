// The emulated device as tables of kernels, so that every test of the core runs on it.
#pragma once

#include "core/kernels.h"
#include "sparse.h"
#include "sparse_gradient.h"

namespace attnrb {

// A device with so few multiprocessors that keys are never split, and one with so many that they always are.
extern const Kernels emulated_cuda_kernels, emulated_cuda_split_kernels;

// What is added to a dense kernel of another library, which left this output and log-sum-exp; and to a dense backward,
// which left these gradients.
Status add_sparse_part(const AttentionProblem& problem, const cuda::DensePart& dense);
// `most_parts`: of long keys, at most.
Status add_sparse_gradient(const GradientProblem& problem, const cuda::DenseGradientViews& dense,
                           int32_t most_parts = cuda::kMostParts);

}  // namespace attnrb
