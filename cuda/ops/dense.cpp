// Note: [Calling PyTorch's attention]
// torch_call_dispatcher() does not call flash and cuDNN attention: it converts the last result by the type of the first
// and so on, and their results are not of the same types from either end. But torch's libraries have a C function for
// each of these operations, whose signature stays as it is for as long as torch has it. Those of CUDA are in
// libtorch_cuda, with which this library is not linked, and are looked up when they are first used; where one is
// missing, the case is left to our own kernels. The declarations used here are torch's, so that a torch which declares
// them otherwise shows when this is compiled. They leave out the dispatcher for the operation, though not for those
// inside: what autograd must not follow is detached before.
#include "dense.h"

#include <dlfcn.h>

#include "device.h"

#if !defined(ATTNRB_CUDA_EMULATED)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace attnrb::ops {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr double kNoDropout = 0.0;

// What torch said of the last failure. Only versions newer than those that this is built for have the function.
std::string last_failure() {
  static const auto what =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = what == nullptr ? nullptr : what();
  return text == nullptr ? "torch printed why" : text;
}

void check(AOTITorchError error, const char* name) {
  if (error != 0) throw std::runtime_error(std::string("attnrb: PyTorch's ") + name + " failed: " + last_failure());
}

// `stack` has the arguments of an operation, all of them and in the order of its schema, and then its results.
template <size_t size>
AOTITorchError call(const char* name, std::array<StableIValue, size>& stack) {
  return torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION);
}

// The same elements, of which autograd knows nothing: gradients are our own.
Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{from(tensor)};
  check(call("aten::detach", stack), "detach");
  return to<Tensor>(stack[0]);
}

// Numbers of at::SDPBackend that are one kernel.
enum class Backend : int64_t { flash = 1, efficient = 2, cudnn = 3 };

std::optional<Backend> choose(const Tensor& query, const Tensor& key, const Tensor& value, bool causal, double scale) {
  constexpr bool kGroupedHeads = true;
  std::array<StableIValue, 8> stack{from(query),
                                    from(key),
                                    from(value),
                                    from(std::nullopt),
                                    from(kNoDropout),
                                    from(causal),
                                    from(std::optional<double>(scale)),
                                    from(kGroupedHeads)};
  // It refuses where the user left it no kernel that takes the case. There are ours.
  if (call("aten::_fused_sdp_choice", stack) != 0) return std::nullopt;
  const Backend chosen = Backend(to<int64_t>(stack[0]));
  // Versions differ in whether the memory-efficient kernel itself takes grouped heads.
  const bool grouped = query.size(1) != key.size(1);
  if (chosen == Backend::flash || chosen == Backend::cudnn || (chosen == Backend::efficient && !grouped)) return chosen;
  return std::nullopt;
}

#if defined(ATTNRB_CUDA_EMULATED)

// The CPU's kernel in the place of the device's.
std::optional<DenseAttention> attend(Backend /*backend*/, const Tensor& query, const Tensor& key, const Tensor& value,
                                     bool causal, double scale) {
  std::array<StableIValue, 7> stack{from(query),
                                    from(key),
                                    from(value),
                                    from(kNoDropout),
                                    from(causal),
                                    from(std::nullopt),
                                    from(std::optional<double>(scale))};
  check(call("aten::_scaled_dot_product_flash_attention_for_cpu", stack), "flash attention");
  return DenseAttention{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::optional<DenseGradients> attend_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                              const Tensor& value, const Tensor& output, const Tensor& lse, bool causal,
                                              double scale) {
  std::array<StableIValue, 10> stack{
      from(grad_output), from(query),      from(key),    from(value),        from(output),
      from(lse),         from(kNoDropout), from(causal), from(std::nullopt), from(std::optional<double>(scale))};
  check(call("aten::_scaled_dot_product_flash_attention_for_cpu_backward", stack), "backward of flash attention");
  return DenseGradients{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

#else

// What a call gives; output and log-sum-exp come first, and nothing is wanted of the rest, which goes with this.
struct Results {
  std::array<AtenTensorHandle, 7> tensors{};
  std::array<int64_t, 2> numbers{};

  DenseAttention take() {
    DenseAttention dense{Tensor(tensors[0]), Tensor(tensors[1])};
    tensors[0] = tensors[1] = nullptr;
    return dense;
  }
  DenseGradients take_gradients() {
    DenseGradients dense{Tensor(tensors[0]), Tensor(tensors[1]), Tensor(tensors[2])};
    tensors[0] = tensors[1] = tensors[2] = nullptr;
    return dense;
  }
  ~Results() {
    for (AtenTensorHandle each : tensors)
      if (each != nullptr) aoti_torch_delete_tensor_object(each);
  }
};

template <class Function>
Function* find(const char* name) {
  return reinterpret_cast<Function*>(find_in_torch_cuda(name));
}

std::optional<DenseAttention> attend(Backend backend, const Tensor& query, const Tensor& key, const Tensor& value,
                                     bool causal, double scale) {
  constexpr int32_t kWithLse = 1, kNoDebugMask = 0;
  const AtenTensorHandle q = query.get(), k = key.get(), v = value.get();
  Results results;
  AtenTensorHandle* r = results.tensors.data();
  int64_t* n = results.numbers.data();
  switch (backend) {
    case Backend::flash: {
      // -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask
      static const auto flash = find<decltype(aoti_torch_cuda__scaled_dot_product_flash_attention)>(
          "aoti_torch_cuda__scaled_dot_product_flash_attention");
      if (flash == nullptr) return std::nullopt;
      check(flash(q, k, v, kNoDropout, causal, kNoDebugMask, &scale, &r[0], &r[1], &r[2], &r[3], &n[0], &n[1], &r[4],
                  &r[5], &r[6]),
            "flash attention");
      return results.take();
    }
    case Backend::efficient: {
      // -> output, log_sumexp, philox_seed, philox_offset
      static const auto efficient = find<decltype(aoti_torch_cuda__scaled_dot_product_efficient_attention)>(
          "aoti_torch_cuda__scaled_dot_product_efficient_attention");
      if (efficient == nullptr) return std::nullopt;
      check(efficient(q, k, v, nullptr, kWithLse, kNoDropout, causal, &scale, &r[0], &r[1], &r[2], &r[3]),
            "memory-efficient attention");
      return results.take();
    }
    case Backend::cudnn: {
      // -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, philox_seed, philox_offset, debug_attn_mask
      static const auto cudnn = find<decltype(aoti_torch_cuda__scaled_dot_product_cudnn_attention)>(
          "aoti_torch_cuda__scaled_dot_product_cudnn_attention");
      if (cudnn == nullptr) return std::nullopt;
      check(cudnn(q, k, v, nullptr, kWithLse, kNoDropout, causal, kNoDebugMask, &scale, &r[0], &r[1], &r[2], &r[3],
                  &n[0], &n[1], &r[4], &r[5], &r[6]),
            "cuDNN attention");
      return results.take();
    }
  }
  return std::nullopt;
}

std::optional<DenseGradients> attend_backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                              const Tensor& value, const Tensor& output, const Tensor& lse, bool causal,
                                              double scale) {
  static const auto backward = find<decltype(aoti_torch_cuda__scaled_dot_product_flash_attention_backward)>(
      "aoti_torch_cuda__scaled_dot_product_flash_attention_backward");
  if (backward == nullptr) return std::nullopt;
  // No sequences of several lengths, and no random numbers: tensors that are none, and any.
  AtenTensorHandle nothing = nullptr;
  check(aoti_torch_new_uninitialized_tensor(&nothing), "new tensor");
  const Tensor no_lengths(nothing), no_seed = empty<1>({2}, dtype_codes().int64, Operand("query", query));
  Results results;
  AtenTensorHandle* r = results.tensors.data();
  check(backward(grad_output.get(), query.get(), key.get(), value.get(), output.get(), lse.get(), no_lengths.get(),
                 no_lengths.get(), query.size(2), key.size(2), kNoDropout, causal, no_seed.get(), no_seed.get(), &scale,
                 &r[0], &r[1], &r[2]),
        "backward of flash attention");
  return results.take_gradients();
}

#endif

}  // namespace

std::optional<DenseAttention> attend_densely(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                                             double scale) {
  const Tensor q = detached(query), k = detached(key), v = detached(value);
  const std::optional<Backend> backend = choose(q, k, v, causal, scale);
  return backend ? attend(*backend, q, k, v, causal, scale) : std::nullopt;
}

std::optional<DenseGradients> differentiate_densely(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& output, const Tensor& lse,
                                                    bool causal, double scale) {
  const Tensor q = detached(query), k = detached(key), v = detached(value);
  const std::optional<Backend> backend = choose(q, k, v, causal, scale);
  // The flash backward asks for no more than output and log-sum-exp, whoever computed them.
  if (!backend || *backend == Backend::efficient) return std::nullopt;
  return attend_backward(detached(grad_output), q, k, v, detached(output), detached(lse), causal, scale);
}

}  // namespace attnrb::ops
