// The arguments that the attention ops share: checked, and turned into what the core reads. Nothing here depends on the
// device.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace attnrb::ops {

// Which keys a query may see, as an op receives it (`attnrb.Visibility` says what each means).
struct VisibilityArguments {
  bool causal;
  int64_t query_offset, key_offset, window;
  const OptionalTensor &key_start, &key_end, &mask;
};

// What turns query·key into a score, as an op receives it.
struct ScoringArguments {
  double scale, softcap;
  const OptionalTensor& sinks;
};

// The core's visibility and scoring, with the tensors alive that their pointers lead into.
class SharedArguments {
 public:
  SharedArguments(const VisibilityArguments& visible, const ScoringArguments& score, const Shape& shape,
                  const Operand& query) {
    check_slots("query_offset", visible.query_offset, shape.queries, std::numeric_limits<int32_t>::min());
    check_slots("key_offset", visible.key_offset, shape.keys, 0);
    if (visible.window < 0) refuse("window", "expected 0 (no limit) or a positive number, got ", visible.window);
    visibility.causal = visible.causal;
    visibility.query_offset = visible.query_offset;
    visibility.key_offset = visible.key_offset;
    // No two slots are further apart than this, and no slot minus this overflows.
    visibility.window = std::min(visible.window, int64_t(1) << 34);
    if (visible.key_start) visibility.key_start = slots("key_start", *visible.key_start, shape, query, start_copy_);
    if (visible.key_end) visibility.key_end = slots("key_end", *visible.key_end, shape, query, end_copy_);
    if (visible.mask) {
      const Operand mask("mask", *visible.mask);
      check_dtype(mask, dtype_codes().boolean);
      check_device(mask, query);
      check_broadcast(mask, shape, visibility.mask_strides);
      visibility.mask = static_cast<const bool*>(mask.data());
    }
    scoring.scale = check_finite("scale", score.scale);
    scoring.softcap = check_finite("softcap", score.softcap);
    if (scoring.softcap < 0) refuse("softcap", "expected 0 (none) or a positive number, got ", score.softcap);
    if (score.sinks) {
      const Operand sinks("sinks", *score.sinks);
      check_shape(sinks, {shape.heads}, "[H]");
      check_device(sinks, query);
      if (sinks.dtype != dtype_codes().float64) check_element_type(sinks);
      scoring.sinks = contiguous_data<float>(sinks, *score.sinks, dtype_codes().float32, sinks_copy_);
    }
  }

  Visibility visibility;
  Scoring scoring;

 private:
  static const int64_t* slots(const char* name, const Tensor& tensor, const Shape& shape, const Operand& query,
                              OptionalTensor& copy) {
    const Operand operand(name, tensor);
    check_shape(operand, {shape.batch}, "[B]");
    check_device(operand, query);
    if (operand.dtype != dtype_codes().int32) check_dtype(operand, dtype_codes().int64);
    return contiguous_data<int64_t>(operand, tensor, dtype_codes().int64, copy);
  }

  OptionalTensor start_copy_, end_copy_, sinks_copy_;
};

// An outlier set given to an op: indices int32 [B, H, M, C], counts int32 [B, H, M].
class OutlierArguments {
 public:
  OutlierArguments(const Tensor& indices_tensor, const Tensor& counts_tensor, const Shape& shape,
                   const Operand& query) {
    const Operand rows("indices", indices_tensor);
    check_rank(rows, 4, "[B, H, M, C]");
    capacity = rows.sizes[3];
    check_shape(rows, {shape.batch, shape.heads, shape.queries, capacity}, "[B, H, M, C]");
    check_dtype(rows, dtype_codes().int32);
    check_device(rows, query);
    const Operand lengths("counts", counts_tensor);
    check_shape(lengths, {shape.batch, shape.heads, shape.queries}, "[B, H, M]");
    check_dtype(lengths, dtype_codes().int32);
    check_device(lengths, query);
    indices = contiguous_data<int32_t>(rows, indices_tensor, dtype_codes().int32, indices_copy_);
    counts = contiguous_data<int32_t>(lengths, counts_tensor, dtype_codes().int32, counts_copy_);
  }

  const int32_t* indices = nullptr;
  const int32_t* counts = nullptr;
  int64_t capacity = 0;

 private:
  OptionalTensor indices_copy_, counts_copy_;
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

// float32, one gain for all heads or one each.
inline Operand check_gain(const Tensor& tensor, const Shape& shape, const Operand& reference) {
  const Operand gain("gain", tensor);
  check_dtype(gain, dtype_codes().float32);
  check_device(gain, reference);
  if (gain.rank != 1 || (gain.sizes[0] != 1 && gain.sizes[0] != shape.heads))
    refuse("gain", "expected the shape [1] or [H] = [", shape.heads, "], got ", shape_text(gain));
  return gain;
}

// The memory of an attention output: contiguous [B, M, H, Dv], which is what a model's output projection reads next,
// seen as [B, H, M, Dv].
struct OutputLayout {
  std::array<int64_t, 4> sizes, strides;

  explicit OutputLayout(const Shape& shape) : sizes{shape.batch, shape.heads, shape.queries, shape.value_width} {
    const std::array<int64_t, 4> inner =
        contiguous_strides<4>({shape.batch, shape.queries, shape.heads, shape.value_width});
    strides = {inner[0], inner[2], inner[1], inner[3]};
  }
};

// What both kinds of attention ask of the core; the caller adds where the output goes, and what it wants found or
// strengthened.
inline AttentionProblem attention_problem(const Operand& query, const Operand& key, const Operand& value, DType dtype,
                                          const Shape& shape, const SharedArguments& shared) {
  AttentionProblem problem;
  problem.shape = shape;
  problem.dtype = dtype;
  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.value = view_of(value);
  problem.visibility = shared.visibility;
  problem.scoring = shared.scoring;
  return problem;
}

inline Tensor empty_output(const OutputLayout& layout, const Operand& query) {
  return empty_strided(layout.sizes, layout.strides, query.dtype, query);
}

inline void set_output(AttentionProblem& problem, const OutputLayout& layout, const Tensor& output) {
  problem.output = output.mutable_data_ptr();
  std::copy_n(layout.strides.begin(), 3, problem.output_strides);
}

}  // namespace attnrb::ops
