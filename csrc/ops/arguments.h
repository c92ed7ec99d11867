// The arguments that the attention ops share: checked, and turned into what the core reads. Nothing here depends on the
// device.
#pragma once

#include <cmath>
#include <optional>
#include <utility>

#include "ops/checks.h"
#include "ops/options.h"

namespace attnrb::ops {

// Slots of each sequence, int64 [B], and what keeps them alive.
class SlotRow {
 public:
  const int64_t* read(const char* name, const Tensor& tensor, const Shape& shape, const Operand& query) {
    const Operand operand(name, tensor);
    check_shape(operand, {shape.batch}, "[B]");
    check_device(operand, query);
    if (operand.dtype != dtype_codes().int32) check_dtype(operand, dtype_codes().int64);
    return contiguous_data<int64_t>(operand, tensor, dtype_codes().int64, copy_);
  }

 private:
  OptionalTensor copy_;
};

// float32, one gain for all heads or one each; of ragged sequences also one for each of them and head.
inline Operand check_gain(const Tensor& tensor, const Shape& shape, const Operand& reference) {
  const Operand gain("gain", tensor);
  check_dtype(gain, dtype_codes().float32);
  check_device(gain, reference);
  if (shape.ragged() && gain.rank == 2) {
    check_shape(gain, {shape.batch, shape.heads}, "[B, H]");
    return gain;
  }
  if (gain.rank != 1 || (gain.sizes[0] != 1 && gain.sizes[0] != shape.heads))
    refuse("gain", "expected the shape [1] or [H] = [", shape.heads, "], got ", shape_text(gain));
  return gain;
}

// With the rule rest a gain below -1 would turn the sign of weights that are to be shared out.
inline void check_gain_range(const float* gain, int64_t count, Rule rule) {
  for (int64_t h = 0; h < count; ++h)
    if (!std::isfinite(gain[h]) || (rule == Rule::rest && gain[h] < -1.0f))
      refuse("gain", "expected finite numbers", rule == Rule::rest ? " of at least -1" : "", ", got ", gain[h]);
}

// The core's visibility, scoring and edit, checked, with the tensors alive that their pointers lead into.
template <class Device>
class CheckedOptions {
 public:
  CheckedOptions(const Options& options, const Shape& shape, const Operand& query) {
    read_visibility(options.visibility, shape, query);
    read_scoring(options.scoring, shape, query);
    read_rule(options.edit.rule);
    read_outliers(options.edit, shape, query);
    read_bias(options.edit, shape, query);
  }

  Visibility visibility;
  Scoring scoring;
  Edit edit;
  // Of the outliers; `edit` has none where the lists have no room for any.
  std::optional<typename Device::Gain> gain;

 private:
  // What a paging says itself: it has the offsets of queries, and each sequence its own last key.
  static void refuse_positions(const VisibilityOptions& given) {
    const auto refuse_option = [](const char* option, bool present) {
      if (present) refuse(option, "expected none with a block_table, which says where queries and keys are");
    };
    refuse_option("query_offset", given.query_offset.has_value());
    refuse_option("query_offsets", given.query_offsets.has_value());
    refuse_option("key_offset", given.key_offset != 0);
    refuse_option("key_start", given.key_start.has_value());
    refuse_option("key_end", given.key_end.has_value());
    refuse_option("mask", given.mask.has_value());
  }

  void read_visibility(const VisibilityOptions& given, const Shape& shape, const Operand& query) {
    if (shape.ragged())
      refuse_positions(given);
    else
      read_positions(given, shape, query);
    for (const auto& [name, value] : {std::pair<const char*, int64_t>{"window", given.window}, {"chunk", given.chunk}})
      if (value < 0) refuse(name, "expected 0 (no limit) or a positive number, got ", value);
    visibility.causal = given.causal;
    // No two slots are further apart than this, and no slot minus this overflows.
    visibility.window = std::min(given.window, int64_t(1) << 34);
    visibility.chunk = std::min(given.chunk, int64_t(1) << 34);
  }

  void read_positions(const VisibilityOptions& given, const Shape& shape, const Operand& query) {
    if (given.query_offset && given.query_offsets)
      refuse("query_offset", "expected None where query_offsets is given, got ", *given.query_offset);
    check_slots("key_offset", given.key_offset, shape.keys, 0);
    if (given.query_offsets) {
      visibility.query_offsets = offsets_.read("query_offsets", *given.query_offsets, shape, query);
      if (Device::values_on_host)
        for (int64_t b = 0; b < shape.batch; ++b)
          check_slots("query_offsets", visibility.query_offsets[b], shape.queries, kLowestSlot);
    } else {
      visibility.query_offset = given.query_offset.value_or(given.key_offset + shape.keys - shape.queries);
      check_slots("query_offset", visibility.query_offset, shape.queries, kLowestSlot);
    }
    visibility.key_offset = given.key_offset;
    if (given.key_start) visibility.key_start = starts_.read("key_start", *given.key_start, shape, query);
    if (given.key_end) visibility.key_end = ends_.read("key_end", *given.key_end, shape, query);
    if (!given.mask) return;
    const Operand mask("mask", *given.mask);
    check_dtype(mask, dtype_codes().boolean);
    check_device(mask, query);
    check_broadcast(mask, shape, visibility.mask_strides);
    visibility.mask = static_cast<const bool*>(mask.data());
  }

  void read_scoring(const ScoringOptions& given, const Shape& shape, const Operand& query) {
    scoring.scale = check_finite("scale", given.scale.value_or(1.0 / std::sqrt(double(shape.width))));
    scoring.softcap = check_finite("softcap", given.softcap);
    if (scoring.softcap < 0) refuse("softcap", "expected 0 (none) or a positive number, got ", given.softcap);
    if (!given.sinks) return;
    const Operand sinks("sinks", *given.sinks);
    check_shape(sinks, {shape.heads}, "[H]");
    check_device(sinks, query);
    if (sinks.dtype != dtype_codes().float64) check_element_type(sinks);
    scoring.sinks = contiguous_data<float>(sinks, *given.sinks, dtype_codes().float32, sinks_copy_);
  }

  void read_rule(int64_t rule) {
    if (rule < int64_t(Rule::none) || rule > int64_t(Rule::rest))
      refuse("rule", "expected 0 (none), 1 (row) or 2 (rest), got ", rule);
    edit.rule = Rule(rule);
  }

  // Lists of one row for each query, or one for all queries of a head.
  void read_outliers(const EditOptions& given, const Shape& shape, const Operand& query) {
    if (!given.indices && !given.counts && !given.gain) return;
    if (!given.indices) refuse("indices", "expected a tensor where counts or gain is given, got None");
    if (!given.counts) refuse("counts", "expected a tensor where indices is given, got None");
    if (!given.gain) refuse("gain", "expected a tensor where indices is given, got None");
    const Operand rows("indices", *given.indices), lengths("counts", *given.counts);
    const int64_t capacity =
        shape.ragged() ? check_ragged_lists(rows, lengths, shape) : check_lists(rows, lengths, shape);
    for (const Operand* each : {&rows, &lengths}) {
      check_dtype(*each, dtype_codes().int32);
      check_device(*each, query);
    }
    gain.emplace(*given.gain, shape, query);
    const float* gains = Device::numbers(*gain);
    const bool of_sequences = Operand("gain", *given.gain).rank == 2;
    if (Device::values_on_host)
      check_gain_range(gains, of_sequences ? shape.batch * shape.heads : shape.heads, edit.rule);
    if (capacity == 0) return;  // an empty set leaves plain attention
    edit.indices = contiguous_data<int32_t>(rows, *given.indices, dtype_codes().int32, indices_copy_);
    edit.counts = contiguous_data<int32_t>(lengths, *given.counts, dtype_codes().int32, counts_copy_);
    edit.capacity = capacity;
    edit.shared_rows = !shape.ragged() && rows.sizes[2] != shape.queries;
    edit.gain = gains;
    edit.gain_stride = of_sequences ? shape.heads : 0;
  }

  // Of indices and counts, whose last axis is returned.
  static int64_t check_lists(const Operand& rows, const Operand& lengths, const Shape& shape) {
    check_rank(rows, 4, "[B, H, M, C]");
    const int64_t capacity = rows.sizes[3], lists = rows.sizes[2] == 1 ? 1 : shape.queries;
    check_shape(rows, {shape.batch, shape.heads, lists, capacity}, "[B, H, M, C]");
    check_shape(lengths, {shape.batch, shape.heads, lists}, "[B, H, M]");
    return capacity;
  }
  static int64_t check_ragged_lists(const Operand& rows, const Operand& lengths, const Shape& shape) {
    check_rank(rows, 3, "[T, H, C]");
    check_shape(rows, {shape.queries, shape.heads, rows.sizes[2]}, "[T, H, C]");
    check_shape(lengths, {shape.queries, shape.heads}, "[T, H]");
    return rows.sizes[2];
  }

  void read_bias(const EditOptions& given, const Shape& shape, const Operand& query) {
    if (!given.key_bias) {
      if (given.first_query) refuse("first_query", "expected None where there is no key_bias, got a tensor");
      return;
    }
    const Operand bias("key_bias", *given.key_bias);
    check_rank(bias, 3, "[B or 1, H or 1, slots]");
    check_dtype(bias, dtype_codes().float32);
    check_device(bias, query);
    if ((bias.sizes[0] != 1 && bias.sizes[0] != shape.batch) || (bias.sizes[1] != 1 && bias.sizes[1] != shape.heads))
      refuse("key_bias", "expected the shape [B or 1, H or 1, slots] with B = ", shape.batch, " and H = ", shape.heads,
             ", got ", shape_text(bias));
    if (bias.sizes[2] > 0) {
      edit.key_bias = static_cast<const float*>(bias.data());
      for (int axis = 0; axis < 3; ++axis)
        edit.bias_strides[axis] = axis < 2 && bias.sizes[axis] == 1 ? 0 : bias.strides[axis];
      edit.bias_slots = bias.sizes[2];
    }
    if (given.first_query) {
      const int64_t* first = first_.read("first_query", *given.first_query, shape, query);
      if (bias.sizes[2] > 0) edit.first_query = first;
    }
  }

  static constexpr int64_t kLowestSlot = std::numeric_limits<int32_t>::min();

  SlotRow offsets_, starts_, ends_, first_;
  OptionalTensor sinks_copy_, indices_copy_, counts_copy_;
};

// Refuses what only the kernels saw, in outlier rows of that capacity.
inline void check_status(Status status, int64_t capacity) {
  switch (status) {
    case Status::ok:
      return;
    case Status::unsorted_outliers:
      refuse("indices", "expected each row to ascend strictly over its first counts entries, got a row that does not");
    case Status::outlier_count:
      refuse("counts", "expected numbers from 0 to C = ", capacity, ", got one outside");
  }
}

// Refuses what the kernels of a device do not serve.
inline void refuse_unserved(const Shape& shape, const Visibility& visibility, const Edit& edit, const Emit* emit) {
  const auto refuse_option = [](const char* option) { refuse(option, "expected None: not served on this device yet"); };
  if (edit.key_bias != nullptr) refuse_option("key_bias");
  if (edit.shared_rows && shape.queries != 1) refuse("indices", "expected one row for each query on this device");
  if (edit.rule == Rule::rest) refuse("rule", "expected 0 (none) or 1 (row) on this device, got 2 (rest)");
  if (emit != nullptr && emit->indices != nullptr && edit.indices != nullptr) refuse_option("emit");
  if (visibility.query_offsets != nullptr) refuse_option("query_offsets");
  if (visibility.chunk != 0) refuse("chunk", "expected 0 on this device, got ", visibility.chunk);
}

// The memory of an attention output: contiguous [B, M, H, Dv], which is what a model's output projection reads next.
// It is seen as [B, H, M, Dv], or as it lies where `rows_first`.
struct OutputLayout {
  std::array<int64_t, 4> sizes, strides;
  int64_t batch_stride, head_stride, row_stride;

  explicit OutputLayout(const Shape& shape, bool rows_first = false)
      : sizes{shape.batch, shape.queries, shape.heads, shape.value_width}, strides(contiguous_strides<4>(sizes)) {
    batch_stride = strides[0], row_stride = strides[1], head_stride = strides[2];
    if (rows_first) return;
    std::swap(sizes[1], sizes[2]);
    std::swap(strides[1], strides[2]);
  }
};

inline Tensor empty_output(const OutputLayout& layout, const Operand& query) {
  return empty_strided(layout.sizes, layout.strides, query.dtype, query);
}

inline void set_output(AttentionProblem& problem, const OutputLayout& layout, const Tensor& output) {
  problem.output = output.mutable_data_ptr();
  problem.output_strides[0] = layout.batch_stride;
  problem.output_strides[1] = layout.head_stride;
  problem.output_strides[2] = layout.row_stride;
}

}  // namespace attnrb::ops
