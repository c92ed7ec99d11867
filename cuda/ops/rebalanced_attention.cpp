// Attention in a layer below the source: the entries that the outlier rows name weigh (1 + gain) as much.
#include <limits>
#include <tuple>

#include "library.h"

namespace attnrb::ops {
namespace {

// Returns the output; fills `lse` where there is one.
Tensor attend_rebalanced(const Tensor& query_tensor, const Tensor& key_tensor, const Tensor& value_tensor,
                         const Tensor& indices, const Tensor& counts, const Tensor& gain, bool normalize, bool causal,
                         int64_t query_offset, int64_t key_offset, int64_t window, const OptionalTensor& key_start,
                         const OptionalTensor& key_end, const OptionalTensor& mask, double scale, double softcap,
                         const OptionalTensor& sinks, OptionalTensor* lse) {
  const Operand query("query", query_tensor), key("key", key_tensor), value("value", value_tensor);
  const DType dtype = check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  const OutlierArguments outliers(indices, counts, shape, query);
  const DeviceGain gains(gain, shape, query);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);

  if (lse != nullptr) *lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) {
    Tensor output = empty_output(OutputLayout(shape), query);
    torch::stable::zero_(output);
    if (lse != nullptr) torch::stable::fill_(**lse, -std::numeric_limits<double>::infinity());
    return output;
  }

  AttentionProblem problem = attention_problem(query, key, value, dtype, shape, shared);
  if (outliers.capacity > 0) {  // an empty set leaves plain attention
    problem.boost.indices = outliers.indices;
    problem.boost.counts = outliers.counts;
    problem.boost.capacity = outliers.capacity;
    problem.boost.gain = gains.data;
    problem.boost.normalize = normalize;
  }
  if (lse != nullptr) problem.lse = static_cast<float*>((*lse)->mutable_data_ptr());
  return attend_on_device(problem, query_tensor, key_tensor, value_tensor, gains.stride);
}

Tensor rebalanced_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& indices,
                            const Tensor& counts, const Tensor& gain, bool normalize, bool causal, int64_t query_offset,
                            int64_t key_offset, int64_t window, const OptionalTensor& key_start,
                            const OptionalTensor& key_end, const OptionalTensor& mask, double scale, double softcap,
                            const OptionalTensor& sinks) {
  return attend_rebalanced(query, key, value, indices, counts, gain, normalize, causal, query_offset, key_offset,
                           window, key_start, key_end, mask, scale, softcap, sinks, nullptr);
}

std::tuple<Tensor, Tensor> rebalanced_attention_training(const Tensor& query, const Tensor& key, const Tensor& value,
                                                         const Tensor& indices, const Tensor& counts,
                                                         const Tensor& gain, bool normalize, bool causal,
                                                         int64_t query_offset, int64_t key_offset, int64_t window,
                                                         const OptionalTensor& key_start, const OptionalTensor& key_end,
                                                         const OptionalTensor& mask, double scale, double softcap,
                                                         const OptionalTensor& sinks) {
  OptionalTensor lse;
  Tensor output = attend_rebalanced(query, key, value, indices, counts, gain, normalize, causal, query_offset,
                                    key_offset, window, key_start, key_end, mask, scale, softcap, sinks, &lse);
  return {std::move(output), std::move(*lse)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("rebalanced_attention", TORCH_BOX(&rebalanced_attention));
  library.impl("rebalanced_attention_training", TORCH_BOX(&rebalanced_attention_training));
}

}  // namespace attnrb::ops
