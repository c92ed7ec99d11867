// Plain attention by PyTorch's own kernels.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace attnrb::ops {

// Fewer queries are decoding, or nearly so: our kernels split the keys over the device, and read them once.
constexpr int64_t kFewestQueries = 64;

struct DenseAttention {
  Tensor output;  // [B, H, M, D], in the layout that the kernel likes
  Tensor lse;     // float32 [B, H, M, ...] by strides: rows may be padded, and another axis of one may follow
};

// By the kernel that scaled_dot_product_attention would choose: flash, cuDNN or memory-efficient attention. None where
// it would choose no such kernel, or where the user has turned off all of them. `causal`: queries see the keys up to
// their own, of which there are as many. Autograd is not told, and nothing waits for the device.
std::optional<DenseAttention> attend_densely(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                                             double scale);

// Of query, key and value.
struct DenseGradients {
  Tensor query, key, value;
};

// The backward of the same, by the flash or cuDNN kernel, whichever PyTorch would choose, given any output and
// contiguous log-sum-exp; by flash where cuDNN fails, and none where PyTorch would choose neither. They add with
// atomics unless torch.use_deterministic_algorithms() says no.
std::optional<DenseGradients> differentiate_densely(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                    const Tensor& value, const Tensor& output, const Tensor& lse,
                                                    bool causal, double scale);

}  // namespace attnrb::ops
