// How much attention each key receives: the mean weight that the queries which can see it give it. A Device has
// receive(problem, like).
#pragma once

#include <limits>
#include <tuple>

#include "ops/arguments.h"

namespace attnrb::ops {

// Returns what each key receives; fills `lse` where there is one.
template <class Device>
Tensor receive(const Tensor& query_tensor, const Tensor& key_tensor, bool causal, int64_t query_offset,
               int64_t key_offset, int64_t window, const OptionalTensor& key_start, const OptionalTensor& key_end,
               const OptionalTensor& mask, double scale, double softcap, const OptionalTensor& sinks,
               OptionalTensor* lse) {
  const Operand query("query", query_tensor), key("key", key_tensor);
  ReceivedProblem problem;
  problem.dtype = check_element_type(query);
  problem.shape = check_query_key(query, key);
  const Shape& shape = problem.shape;
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);

  Tensor received = empty<3>({shape.batch, shape.heads, shape.keys}, dtype_codes().float32, query);
  if (lse != nullptr) {
    *lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
    problem.lse = static_cast<float*>((*lse)->mutable_data_ptr());
    if (shape.keys == 0) torch::stable::fill_(**lse, -std::numeric_limits<double>::infinity());
  }
  if (shape.batch * shape.heads * shape.keys == 0) return received;
  if (shape.queries == 0) {
    torch::stable::zero_(received);
    return received;
  }
  problem.received = static_cast<float*>(received.mutable_data_ptr());
  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.visibility = shared.visibility;
  problem.scoring = shared.scoring;
  Device::receive(problem, query);
  return received;
}

template <class Device>
Tensor received_attention(const Tensor& query, const Tensor& key, bool causal, int64_t query_offset, int64_t key_offset,
                          int64_t window, const OptionalTensor& key_start, const OptionalTensor& key_end,
                          const OptionalTensor& mask, double scale, double softcap, const OptionalTensor& sinks) {
  return receive<Device>(query, key, causal, query_offset, key_offset, window, key_start, key_end, mask, scale, softcap,
                         sinks, nullptr);
}

template <class Device>
std::tuple<Tensor, Tensor> received_attention_training(const Tensor& query, const Tensor& key, bool causal,
                                                       int64_t query_offset, int64_t key_offset, int64_t window,
                                                       const OptionalTensor& key_start, const OptionalTensor& key_end,
                                                       const OptionalTensor& mask, double scale, double softcap,
                                                       const OptionalTensor& sinks) {
  OptionalTensor lse;
  Tensor received = receive<Device>(query, key, causal, query_offset, key_offset, window, key_start, key_end, mask,
                                    scale, softcap, sinks, &lse);
  return {std::move(received), std::move(*lse)};
}

}  // namespace attnrb::ops
