#include "library.h"

#include "sparse.h"

namespace attnrb::ops {
namespace {

struct DenseAttention {
  Tensor output;  // [B, H, M, D]
  Tensor lse;     // float32 [B, H, M, ...] by strides
};

using torch::stable::detail::from;
using torch::stable::detail::to;

// Fewer queries are decoding, or nearly so: there the keys are split over the device, and read once.
constexpr int64_t kFewestQueries = 64;

// Calls an operation of torch; `stack` has its arguments, and then its results.
template <size_t size>
void call(const char* name, std::array<StableIValue, size>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

// The same elements, of which autograd knows nothing: gradients are our own.
Tensor detached(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{from(tensor)};
  call("aten::detach", stack);
  return to<Tensor>(stack[0]);
}

#if defined(ATTNRB_CUDA_EMULATED)

// The emulated device has the CPU's kernel in the place of CUDA's.
std::optional<DenseAttention> attend_densely(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                                             double scale) {
  std::array<StableIValue, 7> stack{from(query),
                                    from(key),
                                    from(value),
                                    from(0.0),
                                    from(causal),
                                    from(std::nullopt),
                                    from(std::optional<double>(scale))};
  call("aten::_scaled_dot_product_flash_attention_for_cpu", stack);
  return DenseAttention{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

#else

// Numbers of at::SDPBackend.
enum class Backend : int64_t { flash = 1, efficient = 2, cudnn = 3 };

// Takes the results behind output and log-sum-exp too, so that they are freed: `tensors` has a bit for each tensor.
template <size_t size>
DenseAttention take_results(std::array<StableIValue, size>& stack, unsigned tensors) {
  DenseAttention dense{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  for (size_t i = 2; i < size; ++i)
    if ((tensors >> i) & 1u) to<Tensor>(stack[i]);
  return dense;
}

std::optional<DenseAttention> attend_densely(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                                             double scale) {
  const std::optional<double> given(scale);
  std::array<StableIValue, 8> question{from(query), from(key),    from(value), from(std::nullopt),
                                       from(0.0),   from(causal), from(given), from(true)};
  call("aten::_fused_sdp_choice", question);
  switch (Backend(to<int64_t>(question[0]))) {
    case Backend::flash: {
      // -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask
      std::array<StableIValue, 9> stack{from(query),  from(key),   from(value), from(0.0),
                                        from(causal), from(false), from(given)};
      call("aten::_scaled_dot_product_flash_attention", stack);
      return take_results(stack, 0b111001100u);
    }
    case Backend::efficient: {
      // -> output, log_sumexp, philox_seed, philox_offset
      std::array<StableIValue, 8> stack{from(query), from(key), from(value),  from(std::nullopt),
                                        from(true),  from(0.0), from(causal), from(given)};
      call("aten::_scaled_dot_product_efficient_attention", stack);
      return take_results(stack, 0b1100u);
    }
    case Backend::cudnn: {
      // -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, philox_seed, philox_offset, debug_attn_mask
      std::array<StableIValue, 9> stack{from(query), from(key),    from(value), from(std::nullopt), from(true),
                                        from(0.0),   from(causal), from(false), from(given)};
      call("aten::_scaled_dot_product_cudnn_attention", stack);
      return take_results(stack, 0b111001100u);
    }
  }
  return std::nullopt;
}

#endif

// Results lie as the op's schema has them, or are brought there.
Tensor in_layout(const Tensor& output, const OutputLayout& layout, const Operand& like) {
  const Operand found("output", output);
  if (std::equal(layout.strides.begin(), layout.strides.end(), found.strides)) return output;
  Tensor copy = empty_output(layout, like);
  torch::stable::copy_(copy, output);
  return copy;
}

// What a dense kernel left becomes what the problem asks for.
void add_sparse_part(const AttentionProblem& problem, const Tensor& dense_lse, const DeviceScope& scope,
                     const Operand& query, int gain_stride) {
  const Operand lse("lse", dense_lse);
  const int64_t strides[3] = {lse.strides[0], lse.strides[1], lse.strides[2]};
  cuda::SparsePlan plan =
      cuda::plan_sparse(problem, static_cast<const float*>(lse.data()), strides, scope.device(), gain_stride);
  Tensor doubtful = empty<1>({plan.doubtful_numbers}, dtype_codes().int32, query);
  torch::stable::zero_(doubtful);
  const DeviceStatus status(problem.boost, query);
  cuda::start_sparse(plan, static_cast<int32_t*>(doubtful.mutable_data_ptr()), status.data(), scope.stream());
  status.check(scope.stream());
}

void attend_alone(const AttentionProblem& problem, const DeviceScope& scope, const Operand& query, int gain_stride) {
  cuda::AttentionPlan plan = cuda::plan_attention(problem, scope.device(), true, gain_stride);
  const Tensor workspace = scope.bytes(plan.workspace_bytes);
  const DeviceStatus status(problem.boost, query);
  cuda::start_attention(plan, workspace.mutable_data_ptr(), status.data(), scope.stream());
  status.check(scope.stream());
}

}  // namespace

Tensor attend_on_device(AttentionProblem& problem, const Tensor& query, const Tensor& key, const Tensor& value,
                        int gain_stride) {
  const Operand like("query", query);
  const DeviceScope scope(like);
  const OutputLayout layout(problem.shape);
  // Plain attention, where there is no outlier set at all, is left to the kernels that the tests compare it with.
  const bool sparse = problem.emit.indices != nullptr || problem.boost.indices != nullptr;
  if (sparse && problem.shape.queries >= kFewestQueries && cuda::sparse_suits(problem)) {
    const std::optional<DenseAttention> dense = attend_densely(
        detached(query), detached(key), detached(value), problem.visibility.causal, double(problem.scoring.scale));
    if (dense) {
      Tensor output = in_layout(dense->output, layout, like);
      set_output(problem, layout, output);
      add_sparse_part(problem, dense->lse, scope, like, gain_stride);
      return output;
    }
  }
  Tensor output = empty_output(layout, like);
  set_output(problem, layout, output);
  attend_alone(problem, scope, like, gain_stride);
  return output;
}

}  // namespace attnrb::ops
