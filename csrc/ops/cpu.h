// What the CPU registrations share beyond the checks.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/kernels.h"
#include "ops/arguments.h"

namespace attnrb::ops {

// One gain for each head, as the core reads it.
class GainRow {
 public:
  GainRow(const Tensor& tensor, const Shape& shape, const Operand& reference) {
    const Operand gain = check_gain(tensor, shape, reference);
    if (gain.rank == 2 || gain.sizes[0] == shape.heads) {
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

// Makes a contiguous tensor zeros, at less cost than an op.
inline void clear_contiguous(const Tensor& tensor) {
  const Operand operand("zeros", tensor);
  std::memset(tensor.mutable_data_ptr(), 0, size_t(tensor.numel()) * tensor.element_size());
}

// Waking a thread takes as long as so many multiply-adds: few queries and keys are done sooner by fewer threads.
constexpr int64_t kProductsPerThread = int64_t(1) << 18;

inline ThreadPool threads_for(const Shape& shape) {
  ThreadPool pool = torch_threads();
  int64_t pairs = shape.batch * shape.queries * shape.keys;
  if (shape.ragged()) {
    pairs = 0;
    for (int64_t b = 0; b < shape.batch; ++b)
      pairs += (shape.query_starts[b + 1] - shape.query_starts[b]) * shape.key_counts[b];
  }
  const int64_t products = pairs * shape.heads * (shape.width + shape.value_width);
  pool.workers = std::min(pool.workers, products / kProductsPerThread + 1);
  return pool;
}

}  // namespace attnrb::ops
