// A four-dimensional view into a buffer of its own that is larger than the view. What lies between and around the
// view's elements is a sentinel, so a kernel that strays is seen: stray reads bring NaN into results, stray writes
// change it.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "random.h"

namespace attnrb::testing {

using Sizes = std::array<int64_t, 4>;

// How the elements of a view lie in memory.
struct Layout {
  std::array<int, 4> order = {0, 1, 2, 3};  // axes from outermost to innermost
  int64_t column_step = 1;                  // distance of neighbours on the innermost axis
  int64_t row_padding = 0;                  // elements left free after each innermost row
  int64_t offset = 0;                       // elements left free before the view
};

class Array {
 public:
  Array() = default;
  Array(DType dtype, const Sizes& sizes, const Layout& layout = {});

  DType dtype() const { return dtype_; }
  const Sizes& sizes() const { return sizes_; }
  const Sizes& strides() const { return strides_; }
  void* data() { return storage_.data() + offset_ * element_size(dtype_); }
  const void* data() const { return storage_.data() + offset_ * element_size(dtype_); }
  View view() const { return {data(), {strides_[0], strides_[1], strides_[2], strides_[3]}}; }

  double at(int64_t a, int64_t b, int64_t c, int64_t d) const;
  void set(int64_t a, int64_t b, int64_t c, int64_t d, double value);  // rounded to the dtype
  void fill_uniform(Random& random, double low, double high);

  void fill_sentinel();
  // Whether everything outside the view still is the sentinel.
  bool surroundings_untouched() const;
  // The whole buffer, for comparisons bit by bit.
  const std::vector<unsigned char>& bytes() const { return storage_; }

 private:
  int64_t index(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return offset_ + a * strides_[0] + b * strides_[1] + c * strides_[2] + d * strides_[3];
  }

  DType dtype_ = DType::float32;
  Sizes sizes_ = {}, strides_ = {};
  int64_t offset_ = 0;
  std::vector<unsigned char> storage_;
};

// Reads element `index` of a buffer of that dtype.
double load_element(const void* data, DType dtype, int64_t index);

}  // namespace attnrb::testing
