// PyTorch's own kernels for CUDA.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>
#include <cstdlib>

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

// Note: [Layouts of cuDNN's plans]
// torch keeps cuDNN's plans of a backward by the layouts of query, key and value, in many versions without those of the
// output, its gradient and the log-sum-exp: a plan would read others wrongly. So these come as torch's own forward
// leaves them, in whole rows in the order of the query's axes, and the last without gaps. Queries in another order than
// the two that models have are left to flash; so is everything where the user has torch share plans among lengths, for
// which the log-sum-exp would lie otherwise.
bool plans_fit(const Tensor& query) {
  const char* shared = std::getenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE");
  const int64_t inner = std::max(query.stride(1), query.stride(2));
  return (shared == nullptr || std::string(shared) != "1") && query.stride(3) == 1 &&
         (query.size(0) == 1 || query.stride(0) >= inner);
}

// [B, H, M, D], as torch's forward leaves what comes of such a query.
Tensor as_forward_left_it(const Tensor& tensor, const Tensor& query) {
  const int64_t heads = query.size(1), rows = query.size(2), width = query.size(3);
  const bool rows_first = query.stride(2) > query.stride(1);
  const std::array<int64_t, 4> sizes{query.size(0), heads, rows, width};
  const std::array<int64_t, 4> strides{heads * rows * width, rows_first ? width : rows * width,
                                       rows_first ? heads * width : width, 1};
  const Operand found("dense", tensor);
  if (std::equal(strides.begin(), strides.end(), found.strides)) return tensor;
  Tensor copy = empty_strided(sizes, strides, found.dtype, found);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// [B, H, M, 1].
Tensor with_last_axis(const Tensor& lse) {
  std::array<StableIValue, 2> stack{from(lse), from(int64_t(-1))};
  check(call("aten::unsqueeze", stack), "unsqueeze");
  return to<Tensor>(stack[0]);
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

std::optional<DenseGradients> attend_backward(Backend backend, const Tensor& grad_output, const Tensor& query,
                                              const Tensor& key, const Tensor& value, const Tensor& output,
                                              const Tensor& lse, bool causal, double scale) {
  // No sequences of several lengths, and no random numbers: tensors that are none, and any.
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_new_uninitialized_tensor(&handle), "new tensor");
  const Tensor nothing(handle), no_seed = empty<1>({2}, dtype_codes().int64, Operand("query", query));
  const AtenTensorHandle q = query.get(), k = key.get(), v = value.get(), none = nothing.get(), seed = no_seed.get();
  const int64_t queries = query.size(2), keys = key.size(2);
  Results results;
  AtenTensorHandle* r = results.tensors.data();
  if (backend == Backend::flash) {
    static const auto flash = find<decltype(aoti_torch_cuda__scaled_dot_product_flash_attention_backward)>(
        "aoti_torch_cuda__scaled_dot_product_flash_attention_backward");
    if (flash == nullptr || flash(grad_output.get(), q, k, v, output.get(), lse.get(), none, none, queries, keys,
                                  kNoDropout, causal, seed, seed, &scale, &r[0], &r[1], &r[2]) != 0)
      return std::nullopt;
    return results.take_gradients();
  }
  static const auto cudnn = find<decltype(aoti_torch_cuda__scaled_dot_product_cudnn_attention_backward)>(
      "aoti_torch_cuda__scaled_dot_product_cudnn_attention_backward");
  if (cudnn == nullptr || !plans_fit(query)) return std::nullopt;
  const Tensor grad = as_forward_left_it(grad_output, query), y = as_forward_left_it(output, query);
  const Tensor stats = with_last_axis(lse);
  if (cudnn(grad.get(), q, k, v, y.get(), stats.get(), seed, seed, none, none, none, queries, keys, kNoDropout, causal,
            &scale, &r[0], &r[1], &r[2]) != 0)
    return std::nullopt;
  return results.take_gradients();
}

}  // namespace attnrb::ops
