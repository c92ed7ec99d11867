// What the CPU registrations share beyond the checks.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "core/kernels.h"
#include "ops/arguments.h"

namespace attnrb::ops {

// One gain for each head, as the core reads it.
class GainRow {
 public:
  GainRow(const Tensor& tensor, const Shape& shape, const Operand& reference) {
    const Operand gain = check_gain(tensor, shape, reference);
    if (gain.sizes[0] == shape.heads) {
      data_ = contiguous_data<float>(gain, tensor, dtype_codes().float32, copy_);
    } else {
      repeated_.assign(size_t(shape.heads), *static_cast<const float*>(gain.data()));
      data_ = repeated_.data();
    }
  }
  GainRow(double gain, const Shape& shape, const Operand& /*reference*/)
      : repeated_(size_t(shape.heads), check_finite("gain", gain)) {
    data_ = repeated_.data();
  }
  GainRow(const GainRow&) = delete;
  GainRow& operator=(const GainRow&) = delete;

  const float* data() const { return data_; }

 private:
  const float* data_ = nullptr;
  std::vector<float> repeated_;
  OptionalTensor copy_;
};

// What any set of keys gives when it is empty: zero output, LSE = -infinity, no outliers (their capacity is 0 then).
inline void attend_to_nothing(const AttentionProblem& problem) {
  const Shape& shape = problem.shape;
  const int64_t rows = shape.batch * shape.heads * shape.queries;
  const size_t output_bytes = size_t(rows * shape.value_width * element_size(problem.dtype));
  if (output_bytes) std::memset(problem.output, 0, output_bytes);  // dense, in whatever order
  if (problem.lse) std::fill_n(problem.lse, rows, -std::numeric_limits<float>::infinity());
  if (problem.emit.counts) std::fill_n(problem.emit.counts, rows, 0);
}

// Waking a thread takes as long as so many multiply-adds: few queries and keys are done sooner by fewer threads.
constexpr int64_t kProductsPerThread = int64_t(1) << 18;

inline ThreadPool threads_for(const Shape& shape) {
  ThreadPool pool = torch_threads();
  const int64_t products = shape.batch * shape.heads * shape.queries * shape.keys * (shape.width + shape.value_width);
  pool.workers = std::min(pool.workers, products / kProductsPerThread + 1);
  return pool;
}

// Runs the chosen kernels. Sizes that leave nothing to compute never reach them.
inline void attend(const AttentionProblem& problem) {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.heads == 0 || shape.queries == 0) return;
  if (shape.keys == 0) return attend_to_nothing(problem);
  ScratchLease scratch;
  check_status(kernels().attention(problem, threads_for(shape), *scratch), problem.boost.capacity);
}

}  // namespace attnrb::ops
