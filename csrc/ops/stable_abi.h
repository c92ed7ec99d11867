// The LibTorch stable ABI as the ops use it. Every detour that its C interface forces on us stands here and nowhere
// else.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <utility>

#include "core/huge_pages.h"
#include "core/thread_pool.h"
#include "core/types.h"

namespace attnrb::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Torch's dtype codes, asked for once: Tensor::scalar_type() compares with up to twenty of them at each call.
struct DTypeCodes {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t boolean = aoti_torch_dtype_bool();
};

inline const DTypeCodes& dtype_codes() {
  static const DTypeCodes codes;
  return codes;
}

inline std::string dtype_name(int32_t code) {
  const DTypeCodes& codes = dtype_codes();
  if (code == codes.float32) return "float32";
  if (code == codes.bfloat16) return "bfloat16";
  if (code == codes.float16) return "float16";
  if (code == codes.float64) return "float64";
  if (code == codes.int32) return "int32";
  if (code == codes.int64) return "int64";
  if (code == codes.boolean) return "bool";
  if (code == aoti_torch_dtype_uint8()) return "uint8";
  if (code == aoti_torch_dtype_int8()) return "int8";
  if (code == aoti_torch_dtype_int16()) return "int16";
  return "torch dtype code " + std::to_string(code);
}

inline std::string device_name(int32_t type, int32_t index) {
  std::string name;
  if (type == aoti_torch_device_type_cpu()) {
    name = "cpu";
  } else if (type == aoti_torch_device_type_cuda()) {
    name = "cuda";
  } else if (type == aoti_torch_device_type_meta()) {
    name = "meta";
  } else {
    name = "torch device type " + std::to_string(type);
  }
  return index >= 0 ? name + ":" + std::to_string(index) : name;
}

// A tensor argument under the name that users know, its metadata fetched once. Borrows the tensor.
struct Operand {
  const char* name;
  AtenTensorHandle handle;
  int64_t rank = 0;
  int64_t* sizes = nullptr;    // owned by the tensor
  int64_t* strides = nullptr;  // owned by the tensor
  int32_t dtype = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;

  Operand(const char* argument, const Tensor& tensor) : name(argument), handle(tensor.get()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &rank));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  }

  bool is_contiguous() const {
    bool contiguous = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous));
    return contiguous;
  }

  const void* data() const {
    const void* pointer = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &pointer));
    return pointer;
  }
};

// The elements of a tensor as contiguous T; `copy` keeps them alive where torch had to convert or to pack.
template <class T>
const T* contiguous_data(const Operand& operand, const Tensor& tensor, int32_t dtype, OptionalTensor& copy) {
  if (operand.dtype == dtype && operand.is_contiguous()) return static_cast<const T*>(operand.data());
  Tensor converted = tensor;
  if (operand.dtype != dtype)
    converted = torch::stable::to(
        tensor, torch::stable::detail::to<torch::headeronly::ScalarType>(torch::stable::detail::from(dtype)));
  copy = torch::stable::contiguous(converted);
  return static_cast<const T*>(copy->const_data_ptr());
}

// Row-major strides as torch computes them: an empty dimension counts as one element.
template <size_t rank>
std::array<int64_t, rank> contiguous_strides(const std::array<int64_t, rank>& sizes) {
  std::array<int64_t, rank> strides{};
  int64_t stride = 1;
  for (size_t axis = rank; axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  return strides;
}

// Uninitialised memory on the device of `like`. torch::stable::empty() knows no strides and costs more.
template <size_t rank>
Tensor empty_strided(const std::array<int64_t, rank>& sizes, const std::array<int64_t, rank>& strides, int32_t dtype,
                     const Operand& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(rank), sizes.data(), strides.data(), dtype, like.device_type,
                                                  like.device_index, &handle));
  Tensor tensor(handle);
  constexpr int64_t kManyElements = int64_t(1) << 20;
  if (like.device_type == aoti_torch_device_type_cpu() && tensor.numel() >= kManyElements) {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    ask_for_huge_pages(tensor.data_ptr(), bytes);
  }
  return tensor;
}

template <size_t rank>
Tensor empty(const std::array<int64_t, rank>& sizes, int32_t dtype, const Operand& like) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype, like);
}

// Lends torch's threads to the core. An exception must not cross torch's C interface, which would drop its type and
// text: the first one is carried past it.
inline void run_on_torch_threads(int64_t workers, ThreadPool::Body body, void* context) {
  struct Region {
    ThreadPool::Body body;
    void* context;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
  } region{body, context};
  const auto run = [](int64_t begin, int64_t end, void* opaque) {
    Region& shared = *static_cast<Region*>(opaque);
    try {
      for (int64_t worker = begin; worker < end; ++worker) shared.body(shared.context, worker);
    } catch (...) {
      if (!shared.failed.test_and_set()) shared.error = std::current_exception();
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, run, &region));
  if (region.error) std::rethrow_exception(region.error);
}

inline ThreadPool torch_threads() { return {int64_t(torch::stable::get_num_threads()), run_on_torch_threads}; }

}  // namespace attnrb::ops
