#include "dense.h"

#include "dense_calls.h"

namespace attnrb::ops {
namespace {

// The same elements, of which autograd knows nothing: gradients are our own.
Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{from(tensor)};
  check(call("aten::detach", stack), "detach");
  return to<Tensor>(stack[0]);
}

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
  if (!backend || *backend == Backend::efficient) return std::nullopt;
  const Tensor grad = detached(grad_output), y = detached(output), l = detached(lse);
  // They ask for no more than output and log-sum-exp, whoever computed them.
  std::optional<DenseGradients> found;
  if (*backend == Backend::cudnn) found = attend_backward(Backend::cudnn, grad, q, k, v, y, l, causal, scale);
  return found ? std::move(found) : attend_backward(Backend::flash, grad, q, k, v, y, l, causal, scale);
}

}  // namespace attnrb::ops
