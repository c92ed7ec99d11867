// Fused attention, whatever device computes it: options are checked and turned into the core's problem here, and a
// device adds how it runs one.
//
// A Device has
//   Gain                                  one gain for all heads or one each, from a tensor
//   numbers(gain)                         where the kernels find them
//   values_on_host                        whether numbers in tensors can be looked at before the kernels run
//   clear(tensor)                         makes it zeros
//   attend(problem, like, tensors, gain)  the output, from query, key and value; `gain` may be null
#pragma once

#include <limits>
#include <tuple>

#include "core/outliers.h"
#include "ops/arguments.h"

namespace attnrb::ops {

struct AttentionTensors {
  const Tensor &query, &key, &value;
  bool rows_first = false;  // the output as [B, M, H, Dv]
};

// What an attention gives: the output, and of the others what was asked for.
struct Attended {
  OptionalTensor output, lse, indices, counts;
};

// What any set of keys gives when it is empty.
template <class Device>
Tensor attend_to_nothing(const OutputLayout& layout, const Operand& query, const Attended& wanted) {
  Tensor output = empty_output(layout, query);
  Device::clear(output);
  if (wanted.lse) {
    Tensor lse = *wanted.lse;
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  if (wanted.counts) Device::clear(*wanted.counts);
  return output;
}

// Outliers are returned where options.emit says at what threshold.
template <class Device>
Attended attend(const AttentionTensors& tensors, const Options& options, bool with_lse) {
  const Operand query("query", tensors.query), key("key", tensors.key), value("value", tensors.value);
  AttentionProblem problem;
  problem.dtype = check_element_type(query);
  problem.shape = check_attention(query, key, value);
  const Shape& shape = problem.shape;
  if (options.emit) check_threshold(*options.emit);
  const CheckedOptions<Device> checked(options, shape, query);

  Attended attended;
  if (with_lse) attended.lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
  if (options.emit) {
    problem.emit.capacity = outlier_capacity(*options.emit, shape.keys);
    problem.emit.threshold = *options.emit;
    attended.indices =
        empty<4>({shape.batch, shape.heads, shape.queries, problem.emit.capacity}, dtype_codes().int32, query);
    attended.counts = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().int32, query);
  }
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) {
    attended.output = attend_to_nothing<Device>(OutputLayout(shape, tensors.rows_first), query, attended);
    return attended;
  }

  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.value = view_of(value);
  problem.visibility = checked.visibility;
  problem.scoring = checked.scoring;
  problem.edit = checked.edit;
  if (attended.lse) problem.lse = static_cast<float*>(attended.lse->mutable_data_ptr());
  if (options.emit) {
    problem.emit.indices = static_cast<int32_t*>(attended.indices->mutable_data_ptr());
    problem.emit.counts = static_cast<int32_t*>(attended.counts->mutable_data_ptr());
  }
  attended.output = Device::attend(problem, query, tensors, checked.gain ? &*checked.gain : nullptr);
  return attended;
}

// Lists without room where no outliers were asked for: rows are the query's axes but the last.
template <class Device>
void emit_nothing(Attended& attended, const Operand& query) {
  const int64_t* sizes = query.sizes;
  if (query.rank == 3) {
    attended.indices = empty<3>({sizes[0], sizes[1], 0}, dtype_codes().int32, query);
    attended.counts = empty<2>({sizes[0], sizes[1]}, dtype_codes().int32, query);
  } else {
    attended.indices = empty<4>({sizes[0], sizes[1], sizes[2], 0}, dtype_codes().int32, query);
    attended.counts = empty<3>({sizes[0], sizes[1], sizes[2]}, dtype_codes().int32, query);
  }
  Device::clear(*attended.counts);
}

inline void refuse_emit(const Options& options) {
  if (options.emit) refuse("emit", "expected none where only the output is returned, got ", *options.emit);
}

// [B, H, M, Dv]; no paging.
template <class Device>
Tensor attention_output_heads_first(Arguments& arguments) {
  const Tensor query = arguments.next<Tensor>(), key = arguments.next<Tensor>(), value = arguments.next<Tensor>();
  const Options options = read_options(arguments);
  arguments.finish();
  refuse_emit(options);
  return *attend<Device>({query, key, value}, options, false).output;
}

// The twin of `attention` that has a gradient: no paging.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_training(Arguments& arguments) {
  const Tensor query = arguments.next<Tensor>(), key = arguments.next<Tensor>(), value = arguments.next<Tensor>();
  const Options options = read_options(arguments);
  arguments.finish();
  Attended attended = attend<Device>({query, key, value}, options, true);
  if (!options.emit) emit_nothing<Device>(attended, Operand("query", query));
  return {std::move(*attended.output), std::move(*attended.lse), std::move(*attended.indices),
          std::move(*attended.counts)};
}

// At the source layer of re-balancing: plain attention, and the outliers of every row.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> source_attention(Arguments& arguments) {
  const Tensor query = arguments.next<Tensor>(), key = arguments.next<Tensor>(), value = arguments.next<Tensor>();
  Options options;
  options.emit = arguments.next<double>();
  read_older(arguments, options);
  arguments.finish();
  Attended attended = attend<Device>({query, key, value}, options, true);
  return {std::move(*attended.output), std::move(*attended.lse), std::move(*attended.indices),
          std::move(*attended.counts)};
}

// In a layer above: the entries that the outlier rows name weigh (1 + gain) as much.
template <class Device>
Tensor rebalanced_attention(Arguments& arguments) {
  const Tensor query = arguments.next<Tensor>(), key = arguments.next<Tensor>(), value = arguments.next<Tensor>();
  Options options;
  options.edit.indices = arguments.next<Tensor>();
  options.edit.counts = arguments.next<Tensor>();
  options.edit.gain = arguments.next<Tensor>();
  options.edit.rule = int64_t(arguments.next<bool>() ? Rule::row : Rule::none);
  read_older(arguments, options);
  arguments.finish();
  return *attend<Device>({query, key, value}, options, false).output;
}

}  // namespace attnrb::ops
