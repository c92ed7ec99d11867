#include "array.h"

#include <cstring>

namespace attnrb::testing {

namespace {

// All bits set: a NaN in every dtype.
constexpr unsigned char kSentinel = 0xff;

template <class T>
void store(void* data, int64_t index, double value) {
  static_cast<T*>(data)[index] = from_float<T>(float(value));
}

}  // namespace

double load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::bfloat16:
      return to_float(static_cast<const bfloat16*>(data)[index]);
    case DType::float16:
      return to_float(static_cast<const float16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

Array::Array(DType dtype, const Sizes& sizes, const Layout& layout)
    : dtype_(dtype), sizes_(sizes), offset_(layout.offset) {
  int64_t stride = layout.column_step;
  for (int axis = 3; axis >= 0; --axis) {
    strides_[size_t(layout.order[size_t(axis)])] = stride;
    stride *= sizes[size_t(layout.order[size_t(axis)])];
    if (axis == 3) stride += layout.row_padding;
  }
  // Eight elements behind the view catch vectors that reach past its end.
  storage_.assign(size_t((offset_ + stride + 8) * element_size(dtype)), kSentinel);
}

double Array::at(int64_t a, int64_t b, int64_t c, int64_t d) const {
  return load_element(storage_.data(), dtype_, index(a, b, c, d));
}

void Array::set(int64_t a, int64_t b, int64_t c, int64_t d, double value) {
  switch (dtype_) {
    case DType::bfloat16:
      return store<bfloat16>(storage_.data(), index(a, b, c, d), value);
    case DType::float16:
      return store<float16>(storage_.data(), index(a, b, c, d), value);
    default:
      return store<float>(storage_.data(), index(a, b, c, d), value);
  }
}

void Array::fill_uniform(Random& random, double low, double high) {
  for (int64_t a = 0; a < sizes_[0]; ++a)
    for (int64_t b = 0; b < sizes_[1]; ++b)
      for (int64_t c = 0; c < sizes_[2]; ++c)
        for (int64_t d = 0; d < sizes_[3]; ++d) set(a, b, c, d, random.uniform(low, high));
}

void Array::fill_sentinel() { storage_.assign(storage_.size(), kSentinel); }

bool Array::surroundings_untouched() const {
  std::vector<unsigned char> expected(storage_.size(), kSentinel);
  const int64_t bytes = element_size(dtype_);
  for (int64_t a = 0; a < sizes_[0]; ++a)
    for (int64_t b = 0; b < sizes_[1]; ++b)
      for (int64_t c = 0; c < sizes_[2]; ++c)
        for (int64_t d = 0; d < sizes_[3]; ++d) {
          const int64_t at = index(a, b, c, d) * bytes;
          std::memcpy(&expected[size_t(at)], &storage_[size_t(at)], size_t(bytes));
        }
  return expected == storage_;
}

}  // namespace attnrb::testing
