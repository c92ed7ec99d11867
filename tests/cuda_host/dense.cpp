// The CPU's kernels in the place of those that cuda/backend/dense.cpp calls.
#include "ops/dense_calls.h"

namespace attnrb::ops {

std::optional<DenseAttention> attend(Backend /*backend*/, const Tensor& query, const Tensor& key, const Tensor& value,
                                     bool causal, double scale) {
  std::array<StableIValue, 7> stack{from(query),
                                    from(key),
                                    from(value),
                                    from(kNoDropout),
                                    from(causal),
                                    from(std::nullopt),
                                    from(std::optional<double>(scale))};
  if (call("aten::_scaled_dot_product_flash_attention_for_cpu", stack) != 0) return std::nullopt;
  return DenseAttention{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::optional<DenseGradients> attend_backward(Backend /*backend*/, const Tensor& grad_output, const Tensor& query,
                                              const Tensor& key, const Tensor& value, const Tensor& output,
                                              const Tensor& lse, bool causal, double scale) {
  std::array<StableIValue, 10> stack{
      from(grad_output), from(query),      from(key),    from(value),        from(output),
      from(lse),         from(kNoDropout), from(causal), from(std::nullopt), from(std::optional<double>(scale))};
  if (call("aten::_scaled_dot_product_flash_attention_for_cpu_backward", stack) != 0) return std::nullopt;
  return DenseGradients{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

}  // namespace attnrb::ops
