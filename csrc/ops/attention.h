// Fused attention, whatever device computes it: arguments are checked and turned into the core's problem here, and a
// device adds how it runs one.
//
// A Device has
//   Gain                                  one gain for all heads or one each, from a tensor
//   numbers(gain)                         where the kernels find them
//   attend(problem, like, tensors, gain)  the output, from query, key and value; `gain` may be null
#pragma once

#include <limits>
#include <tuple>

#include "core/outliers.h"
#include "ops/arguments.h"

namespace attnrb::ops {

struct AttentionTensors {
  const Tensor &query, &key, &value;
};

inline bool nothing_to_attend(const Shape& shape) {
  return shape.batch * shape.heads * shape.queries * shape.keys == 0;
}

// What any set of keys gives when it is empty.
inline Tensor attend_to_nothing(const Shape& shape, const Operand& query, Tensor* lse) {
  Tensor output = empty_output(OutputLayout(shape), query);
  torch::stable::zero_(output);
  if (lse != nullptr) torch::stable::fill_(*lse, -std::numeric_limits<double>::infinity());
  return output;
}

// At the source layer: output, log-sum-exp and the outliers of every row.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> source_attention(const Tensor& query_tensor, const Tensor& key_tensor,
                                                            const Tensor& value_tensor, double threshold, bool causal,
                                                            int64_t query_offset, int64_t key_offset, int64_t window,
                                                            const OptionalTensor& key_start,
                                                            const OptionalTensor& key_end, const OptionalTensor& mask,
                                                            double scale, double softcap, const OptionalTensor& sinks) {
  const Operand query("query", query_tensor), key("key", key_tensor), value("value", value_tensor);
  const DType dtype = check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  check_threshold(threshold);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);

  const int64_t capacity = outlier_capacity(threshold, shape.keys);
  Tensor lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
  Tensor indices = empty<4>({shape.batch, shape.heads, shape.queries, capacity}, dtype_codes().int32, query);
  Tensor counts = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().int32, query);

  if (nothing_to_attend(shape)) {
    torch::stable::zero_(counts);
    return {attend_to_nothing(shape, query, &lse), std::move(lse), std::move(indices), std::move(counts)};
  }

  AttentionProblem problem = attention_problem(query, key, value, dtype, shape, shared);
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  problem.emit.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  problem.emit.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  problem.emit.capacity = capacity;
  problem.emit.threshold = threshold;
  Tensor output = Device::attend(problem, query, {query_tensor, key_tensor, value_tensor}, nullptr);
  return {std::move(output), std::move(lse), std::move(indices), std::move(counts)};
}

// In a layer below: the entries that the outlier rows name weigh (1 + gain) as much. Returns the output; fills `lse`
// where there is one.
template <class Device>
Tensor attend_rebalanced(const Tensor& query_tensor, const Tensor& key_tensor, const Tensor& value_tensor,
                         const Tensor& indices, const Tensor& counts, const Tensor& gain, bool normalize, bool causal,
                         int64_t query_offset, int64_t key_offset, int64_t window, const OptionalTensor& key_start,
                         const OptionalTensor& key_end, const OptionalTensor& mask, double scale, double softcap,
                         const OptionalTensor& sinks, OptionalTensor* lse) {
  const Operand query("query", query_tensor), key("key", key_tensor), value("value", value_tensor);
  const DType dtype = check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  const OutlierArguments outliers(indices, counts, shape, query);
  const typename Device::Gain gains(gain, shape, query);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);

  if (lse != nullptr) *lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
  if (nothing_to_attend(shape)) return attend_to_nothing(shape, query, lse != nullptr ? &**lse : nullptr);

  AttentionProblem problem = attention_problem(query, key, value, dtype, shape, shared);
  if (outliers.capacity > 0)  // an empty set leaves plain attention
    problem.boost = {outliers.indices, outliers.counts, outliers.capacity, Device::numbers(gains), normalize};
  if (lse != nullptr) problem.lse = static_cast<float*>((*lse)->mutable_data_ptr());
  return Device::attend(problem, query, {query_tensor, key_tensor, value_tensor}, &gains);
}

template <class Device>
Tensor rebalanced_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& indices,
                            const Tensor& counts, const Tensor& gain, bool normalize, bool causal, int64_t query_offset,
                            int64_t key_offset, int64_t window, const OptionalTensor& key_start,
                            const OptionalTensor& key_end, const OptionalTensor& mask, double scale, double softcap,
                            const OptionalTensor& sinks) {
  return attend_rebalanced<Device>(query, key, value, indices, counts, gain, normalize, causal, query_offset,
                                   key_offset, window, key_start, key_end, mask, scale, softcap, sinks, nullptr);
}

template <class Device>
std::tuple<Tensor, Tensor> rebalanced_attention_training(const Tensor& query, const Tensor& key, const Tensor& value,
                                                         const Tensor& indices, const Tensor& counts,
                                                         const Tensor& gain, bool normalize, bool causal,
                                                         int64_t query_offset, int64_t key_offset, int64_t window,
                                                         const OptionalTensor& key_start, const OptionalTensor& key_end,
                                                         const OptionalTensor& mask, double scale, double softcap,
                                                         const OptionalTensor& sinks) {
  OptionalTensor lse;
  Tensor output = attend_rebalanced<Device>(query, key, value, indices, counts, gain, normalize, causal, query_offset,
                                            key_offset, window, key_start, key_end, mask, scale, softcap, sinks, &lse);
  return {std::move(output), std::move(*lse)};
}

}  // namespace attnrb::ops
