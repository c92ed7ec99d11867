// PyTorch's own kernels for CUDA.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "ops/dense_calls.h"

namespace attnrb::ops {
namespace {

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

}  // namespace

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
      if (flash(q, k, v, kNoDropout, causal, kNoDebugMask, &scale, &r[0], &r[1], &r[2], &r[3], &n[0], &n[1], &r[4],
                &r[5], &r[6]) != 0)
        return std::nullopt;
      return results.take();
    }
    case Backend::efficient: {
      // -> output, log_sumexp, philox_seed, philox_offset
      static const auto efficient = find<decltype(aoti_torch_cuda__scaled_dot_product_efficient_attention)>(
          "aoti_torch_cuda__scaled_dot_product_efficient_attention");
      if (efficient == nullptr) return std::nullopt;
      if (efficient(q, k, v, nullptr, kWithLse, kNoDropout, causal, &scale, &r[0], &r[1], &r[2], &r[3]) != 0)
        return std::nullopt;
      return results.take();
    }
    case Backend::cudnn: {
      // -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, philox_seed, philox_offset, debug_attn_mask
      static const auto cudnn = find<decltype(aoti_torch_cuda__scaled_dot_product_cudnn_attention)>(
          "aoti_torch_cuda__scaled_dot_product_cudnn_attention");
      if (cudnn == nullptr) return std::nullopt;
      if (cudnn(q, k, v, nullptr, kWithLse, kNoDropout, causal, kNoDebugMask, &scale, &r[0], &r[1], &r[2], &r[3], &n[0],
                &n[1], &r[4], &r[5], &r[6]) != 0)
        return std::nullopt;
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
  if (backward(grad_output.get(), query.get(), key.get(), value.get(), output.get(), lse.get(), no_lengths.get(),
               no_lengths.get(), query.size(2), key.size(2), kNoDropout, causal, no_seed.get(), no_seed.get(), &scale,
               &r[0], &r[1], &r[2]) != 0)
    return std::nullopt;
  return results.take_gradients();
}

}  // namespace attnrb::ops
