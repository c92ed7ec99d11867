// Note: [Calling PyTorch's attention]
// torch_call_dispatcher() does not call flash and cuDNN attention: it converts the last result by the type of the first
// and so on, and their results are not of the same types from either end. But torch's libraries have a C function for
// each of these operations, whose signature stays as it is for as long as torch has it. Those of CUDA are in
// libtorch_cuda, with which this library is not linked, and are looked up when they are first used; where one is
// missing, the case is left to our own kernels. The declarations used here are torch's, so that a torch which declares
// them otherwise shows when this is compiled. They leave out the dispatcher for the operation, though not for those
// inside: what autograd must not follow is detached before.
#pragma once

#include <dlfcn.h>

#include <array>
#include <string>

#include "dense.h"
#include "device.h"

namespace attnrb::ops {

using torch::stable::detail::from;
using torch::stable::detail::to;

inline constexpr double kNoDropout = 0.0;

// What torch said of the last failure. Only versions newer than those that this is built for have the function.
inline std::string last_failure() {
  static const auto what =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = what == nullptr ? nullptr : what();
  return text == nullptr ? "torch printed why" : text;
}

inline void check(AOTITorchError error, const char* name) {
  if (error != 0) throw std::runtime_error(std::string("attnrb: PyTorch's ") + name + " failed: " + last_failure());
}

// `stack` has the arguments of an operation, all of them and in the order of its schema, and then its results.
template <size_t size>
AOTITorchError call(const char* name, std::array<StableIValue, size>& stack) {
  return torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION);
}

// Numbers of at::SDPBackend that are one kernel.
enum class Backend : int64_t { flash = 1, efficient = 2, cudnn = 3 };

// By that kernel, or none where this torch does not have it or it fails, for want of a plan or of memory: what our own
// kernels then do. Of the device (cuda/backend) or of the CPU in its place
// (tests/cuda_host).
std::optional<DenseAttention> attend(Backend backend, const Tensor& query, const Tensor& key, const Tensor& value,
                                     bool causal, double scale);
// By flash or cuDNN.
std::optional<DenseGradients> attend_backward(Backend backend, const Tensor& grad_output, const Tensor& query,
                                              const Tensor& key, const Tensor& value, const Tensor& output,
                                              const Tensor& lse, bool causal, double scale);

}  // namespace attnrb::ops
