// How much attention each key receives: the mean weight that the queries which can see it give it. A Device has
// receive(problem, like).
#pragma once

#include <limits>
#include <tuple>

#include "ops/arguments.h"

namespace attnrb::ops {

struct Received {
  Tensor received;
  OptionalTensor lse;
};

template <class Device>
Received receive(Arguments& arguments, bool with_lse) {
  const Tensor query_tensor = arguments.next<Tensor>(), key_tensor = arguments.next<Tensor>();
  Options options;
  read_received(arguments, options);
  arguments.finish();
  const Operand query("query", query_tensor), key("key", key_tensor);
  ReceivedProblem problem;
  problem.dtype = check_element_type(query);
  problem.shape = check_query_key(query, key);
  const Shape& shape = problem.shape;
  const CheckedOptions<Device> checked(options, shape, query);

  Received result{empty<3>({shape.batch, shape.heads, shape.keys}, dtype_codes().float32, query), std::nullopt};
  if (with_lse) {
    result.lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
    problem.lse = static_cast<float*>(result.lse->mutable_data_ptr());
    if (shape.keys == 0) torch::stable::fill_(*result.lse, -std::numeric_limits<double>::infinity());
  }
  if (shape.batch * shape.heads * shape.keys == 0) return result;
  if (shape.queries == 0) {
    torch::stable::zero_(result.received);
    return result;
  }
  problem.received = static_cast<float*>(result.received.mutable_data_ptr());
  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.visibility = checked.visibility;
  problem.scoring = checked.scoring;
  problem.edit = checked.edit;
  Device::receive(problem, query);
  return result;
}

template <class Device>
Tensor received_attention(Arguments& arguments) {
  return receive<Device>(arguments, false).received;
}

template <class Device>
std::tuple<Tensor, Tensor> received_attention_training(Arguments& arguments) {
  Received result = receive<Device>(arguments, true);
  return {std::move(result.received), std::move(*result.lse)};
}

}  // namespace attnrb::ops
