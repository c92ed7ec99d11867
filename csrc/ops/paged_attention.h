// Attention over keys and values in blocks: ops/attention.h with the tables of ops/paging.h.
//
// A Device has besides
//   Paging                                the tables of a call: of ops/paging.h, HostPaging, or the like of it
//   attend_in_blocks(problem, paging, attended, query, gain, own_output)
//                                         fills in what is wanted; rows of skipped sequences have no output but in one
//                                         that was made for this call
#pragma once

#include <algorithm>
#include <limits>

#include "ops/attention.h"
#include "ops/paging.h"

namespace attnrb::ops {

inline void check_out(const Operand& out, const Shape& shape, const Operand& query) {
  check_shape(out, {shape.queries, shape.heads, shape.value_width}, "[T, H, Dv]");
  check_companion(out, query);
  check_columns(out);
}

template <class T>
void fill_rows(const OptionalTensor& tensor, int64_t first, int64_t count, int64_t row, T value) {
  if (tensor) std::fill_n(static_cast<T*>(tensor->mutable_data_ptr()) + first * row, count * row, value);
}

// Rows of sequences without keys have results too; those of an output that the caller gave stay as they are.
inline void clear_skipped(const HostPaging& paging, const Attended& attended, int64_t capacity, bool own_output) {
  const int64_t heads = paging.shape.heads;
  paging.each_skipped([&](int64_t first, int64_t count) {
    fill_rows(attended.lse, first, count, heads, -std::numeric_limits<float>::infinity());
    fill_rows(attended.indices, first, count, heads * capacity, int32_t(-1));
    fill_rows(attended.counts, first, count, heads, int32_t(0));
    if (!own_output) return;
    const int64_t row = heads * paging.shape.value_width * attended.output->element_size();
    fill_rows(attended.output, first, count, row, char(0));
  });
}

// Writes into `out` where there is one.
template <class Device>
Attended attend_paged(const AttentionTensors& tensors, const Options& options, const OptionalTensor& out,
                      bool with_lse) {
  const Operand query("query", tensors.query), key("key", tensors.key), value("value", tensors.value);
  AttentionProblem problem;
  problem.dtype = check_element_type(query);
  const typename Device::Paging paging(options.paging, query, key, value);
  problem.shape = paging.shape;
  const Shape& shape = problem.shape;
  if (options.emit) check_threshold(*options.emit);
  const CheckedOptions<Device> checked(options, shape, query);

  Attended attended;
  attended.output = out ? *out : empty<3>({shape.queries, shape.heads, shape.value_width}, query.dtype, query);
  const Operand output("out", *attended.output);
  if (out) check_out(output, shape, query);
  if (with_lse) attended.lse = empty<2>({shape.queries, shape.heads}, dtype_codes().float32, query);
  if (options.emit) {
    problem.emit.capacity = outlier_capacity(*options.emit, paging.room());
    problem.emit.threshold = *options.emit;
    attended.indices = empty<3>({shape.queries, shape.heads, problem.emit.capacity}, dtype_codes().int32, query);
    attended.counts = empty<2>({shape.queries, shape.heads}, dtype_codes().int32, query);
    problem.emit.indices = static_cast<int32_t*>(attended.indices->mutable_data_ptr());
    problem.emit.counts = static_cast<int32_t*>(attended.counts->mutable_data_ptr());
  }
  problem.query = {query.data(), {0, query.strides[1], query.strides[0], query.strides[2]}};
  problem.key = paging.rows(key);
  problem.value = paging.rows(value);
  problem.visibility = checked.visibility;
  problem.visibility.query_offsets = paging.query_offsets();
  problem.scoring = checked.scoring;
  problem.edit = checked.edit;
  problem.output = attended.output->mutable_data_ptr();
  problem.output_strides[1] = output.strides[1];
  problem.output_strides[2] = output.strides[0];
  if (attended.lse) problem.lse = static_cast<float*>(attended.lse->mutable_data_ptr());
  Device::attend_in_blocks(problem, paging, attended, query, checked.gain ? &*checked.gain : nullptr, !out);
  return attended;
}

// What the attention ops for inference share: blocks or none.
template <class Device>
Attended attend_anywhere(Arguments& arguments, bool with_out, bool with_lse) {
  const Tensor query = arguments.next<Tensor>(), key = arguments.next<Tensor>(), value = arguments.next<Tensor>();
  Options options = read_options(arguments);
  read_paging(arguments, options.paging);
  OptionalTensor out;
  if (with_out) out = arguments.next<Tensor>();
  arguments.finish();
  if (!with_lse) refuse_emit(options);
  if (!options.paging.given()) {
    if (with_out) refuse("block_table", "expected a tensor where there is out, got None");
    Attended attended = attend<Device>({query, key, value, !with_lse}, options, with_lse);
    if (with_lse && !options.emit) emit_nothing<Device>(attended, Operand("query", query));
    return attended;
  }
  Attended attended = attend_paged<Device>({query, key, value}, options, out, with_lse);
  if (with_lse && !options.emit) emit_nothing<Device>(attended, Operand("query", query));
  return attended;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(Arguments& arguments) {
  Attended attended = attend_anywhere<Device>(arguments, false, true);
  return {std::move(*attended.output), std::move(*attended.lse), std::move(*attended.indices),
          std::move(*attended.counts)};
}

// Rows first: [B, M, H, Dv], or [T, H, Dv] with blocks.
template <class Device>
Tensor attention_output(Arguments& arguments) {
  return *attend_anywhere<Device>(arguments, false, false).output;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> attention_into(Arguments& arguments) {
  Attended attended = attend_anywhere<Device>(arguments, true, true);
  return {std::move(*attended.lse), std::move(*attended.indices), std::move(*attended.counts)};
}

template <class Device>
std::tuple<> attention_output_into(Arguments& arguments) {
  attend_anywhere<Device>(arguments, true, false);
  return {};
}

}  // namespace attnrb::ops
