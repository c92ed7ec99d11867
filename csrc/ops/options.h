// The options that the attention ops share, as they come: each op reads its schema into one structure, once.
// arguments.h checks them.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "ops/stable_abi.h"

namespace attnrb::ops {

// How weights are edited; core/edit.h says what each option means.
struct EditOptions {
  OptionalTensor indices, counts, gain;
  int64_t rule = 0;  // of core/edit.h, Rule
  OptionalTensor key_bias, first_query;
};

// Which keys a query may see: core/visibility.h. Without an offset of queries the last one is on the last key.
struct VisibilityOptions {
  bool causal = true;
  std::optional<int64_t> query_offset;
  OptionalTensor query_offsets;
  int64_t key_offset = 0, window = 0, chunk = 0;
  OptionalTensor key_start, key_end, mask;
};

// What turns query·key into a score: core/problem.h. Without a scale it is 1/sqrt(D).
struct ScoringOptions {
  std::optional<double> scale;
  double softcap = 0.0;
  OptionalTensor sinks;
};

// Where keys and values lie, if in blocks, and which rows of queries are whose: all three are given, or none.
struct PagingOptions {
  OptionalTensor block_table, query_starts, seq_lens;

  bool given() const { return block_table || query_starts || seq_lens; }
};

struct Options {
  EditOptions edit;
  std::optional<double> emit;  // the threshold to emit outliers at
  VisibilityOptions visibility;
  ScoringOptions scoring;
  PagingOptions paging;
};

// The arguments of a call on torch's stack, taken off it in the order of the schema.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), left_(count) {}

  template <class T>
  T next() {
    if (left_ == 0) throw std::logic_error("attnrb: an op reads more arguments than its schema has");
    --left_;
    return torch::stable::detail::to<T>(*next_++);
  }
  uint64_t left() const { return left_; }
  void finish() const {
    if (left_ != 0) throw std::logic_error("attnrb: an op reads fewer arguments than its schema has");
  }

 private:
  StableIValue* next_;
  uint64_t left_;
};

inline EditOptions read_edit(Arguments& arguments) {
  EditOptions edit;
  edit.indices = arguments.next<OptionalTensor>();
  edit.counts = arguments.next<OptionalTensor>();
  edit.gain = arguments.next<OptionalTensor>();
  edit.rule = arguments.next<int64_t>();
  edit.key_bias = arguments.next<OptionalTensor>();
  edit.first_query = arguments.next<OptionalTensor>();
  return edit;
}

inline void read_hidden(Arguments& arguments, VisibilityOptions& visibility) {
  visibility.key_start = arguments.next<OptionalTensor>();
  visibility.key_end = arguments.next<OptionalTensor>();
  visibility.mask = arguments.next<OptionalTensor>();
}

// As the op `attention` has them: ATTNRB_OPTIONS in library.cpp.
inline Options read_options(Arguments& arguments) {
  Options options;
  options.edit = read_edit(arguments);
  options.emit = arguments.next<std::optional<double>>();
  VisibilityOptions& visibility = options.visibility;
  visibility.causal = arguments.next<bool>();
  visibility.query_offset = arguments.next<std::optional<int64_t>>();
  visibility.query_offsets = arguments.next<OptionalTensor>();
  visibility.key_offset = arguments.next<int64_t>();
  visibility.window = arguments.next<int64_t>();
  visibility.chunk = arguments.next<int64_t>();
  read_hidden(arguments, visibility);
  options.scoring.scale = arguments.next<std::optional<double>>();
  options.scoring.softcap = arguments.next<double>();
  options.scoring.sinks = arguments.next<OptionalTensor>();
  return options;
}

// As the ops for inference have them besides: ATTNRB_PAGING in library.cpp.
inline void read_paging(Arguments& arguments, PagingOptions& paging) {
  paging.block_table = arguments.next<OptionalTensor>();
  paging.query_starts = arguments.next<OptionalTensor>();
  paging.seq_lens = arguments.next<OptionalTensor>();
}

// As the older ops have them: ATTNRB_VISIBILITY and ATTNRB_SCORING in library.cpp.
inline void read_older(Arguments& arguments, Options& options) {
  VisibilityOptions& visibility = options.visibility;
  visibility.causal = arguments.next<bool>();
  visibility.query_offset = arguments.next<int64_t>();
  visibility.key_offset = arguments.next<int64_t>();
  visibility.window = arguments.next<int64_t>();
  read_hidden(arguments, visibility);
  options.scoring.scale = arguments.next<double>();
  options.scoring.softcap = arguments.next<double>();
  options.scoring.sinks = arguments.next<OptionalTensor>();
}

// What is left of received_attention, and of its overload `edited`: ATTNRB_RECEIVED in library.cpp.
inline void read_received(Arguments& arguments, Options& options) {
  read_older(arguments, options);
  if (arguments.left() == 0) return;
  options.edit.key_bias = arguments.next<OptionalTensor>();
  options.edit.first_query = arguments.next<OptionalTensor>();
  options.visibility.query_offsets = arguments.next<OptionalTensor>();
  options.visibility.chunk = arguments.next<int64_t>();
  if (options.visibility.query_offsets) options.visibility.query_offset.reset();
}

inline void return_results(StableIValue* stack, const Tensor& result) {
  stack[0] = torch::stable::detail::from(result);
}
inline void return_results(StableIValue* /*stack*/, const std::tuple<>& /*nothing*/) {}
template <class... Results>
void return_results(StableIValue* stack, const std::tuple<Results...>& results) {
  std::apply([&](const auto&... each) { ((*stack++ = torch::stable::detail::from(each)), ...); }, results);
}

// An op for torch's dispatcher, from a function that reads its arguments by itself. TORCH_BOX wants a parameter for
// each of them.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t /*results*/) {
  Arguments reader(stack, arguments);
  return_results(stack, function(reader));
}

}  // namespace attnrb::ops
