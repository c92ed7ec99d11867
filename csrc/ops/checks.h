// What every op refuses, on the CPU and elsewhere. A refusal is std::invalid_argument, a ValueError in Python, and
// names the argument, what was expected and what came.
#pragma once

#include <cmath>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/problem.h"
#include "ops/stable_abi.h"

namespace attnrb::ops {

template <class... Parts>
[[noreturn]] void refuse(const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << argument << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape_text(const int64_t* sizes, int64_t rank) {
  std::string text = "[";
  for (int64_t axis = 0; axis < rank; ++axis) text += (axis ? ", " : "") + std::to_string(sizes[axis]);
  return text + "]";
}
inline std::string shape_text(const Operand& operand) { return shape_text(operand.sizes, operand.rank); }
inline std::string shape_text(std::initializer_list<int64_t> sizes) {
  return shape_text(sizes.begin(), int64_t(sizes.size()));
}

inline void check_rank(const Operand& operand, int64_t rank, const char* axes) {
  if (operand.rank != rank)
    refuse(operand.name, "expected ", rank, " dimensions ", axes, ", got ", operand.rank, ": ", shape_text(operand));
}

// `axes` names the expected sizes, for the message: "[B, H, M]".
inline void check_shape(const Operand& operand, std::initializer_list<int64_t> sizes, const char* axes) {
  if (operand.rank != int64_t(sizes.size()) || !std::equal(sizes.begin(), sizes.end(), operand.sizes))
    refuse(operand.name, "expected the shape ", axes, " = ", shape_text(sizes), ", got ", shape_text(operand));
}

inline void check_device(const Operand& operand, const Operand& reference) {
  if (operand.device_type != reference.device_type || operand.device_index != reference.device_index)
    refuse(operand.name, "expected on ", device_name(reference.device_type, reference.device_index), ", where ",
           reference.name, " is, got ", device_name(operand.device_type, operand.device_index));
}

inline void check_dtype(const Operand& operand, int32_t dtype) {
  if (operand.dtype != dtype)
    refuse(operand.name, "expected the dtype ", dtype_name(dtype), ", got ", dtype_name(operand.dtype));
}

inline DType check_element_type(const Operand& operand) {
  const DTypeCodes& codes = dtype_codes();
  if (operand.dtype == codes.float32) return DType::float32;
  if (operand.dtype == codes.bfloat16) return DType::bfloat16;
  if (operand.dtype == codes.float16) return DType::float16;
  refuse(operand.name, "expected the dtype float32, bfloat16 or float16, got ", dtype_name(operand.dtype));
}

// One of several operands that must agree with the first in dtype and device.
inline void check_companion(const Operand& operand, const Operand& reference) {
  if (operand.dtype != reference.dtype)
    refuse(operand.name, "expected the dtype of ", reference.name, ", ", dtype_name(reference.dtype), ", got ",
           dtype_name(operand.dtype));
  check_device(operand, reference);
}

inline void check_threshold(double threshold) {
  if (!(threshold > 0.0 && threshold < 1.0)) refuse("threshold", "expected a number in (0, 1), got ", threshold);
}

inline float check_finite(const char* argument, double value) {
  if (!(std::fabs(value) <= double(std::numeric_limits<float>::max())))
    refuse(argument, "expected a finite float32 number, got ", value);
  return float(value);
}

// The slot of the first of `count` rows. Slots travel as int32 in outlier rows, where -1 is padding.
inline void check_slots(const char* argument, int64_t first, int64_t count, int64_t lowest) {
  const int64_t highest = int64_t(std::numeric_limits<int32_t>::max()) - count;
  if (first < lowest || first > highest)
    refuse(argument, "expected a slot from ", lowest, " to ", highest, ", got ", first);
}

inline Shape check_query_key(const Operand& query, const Operand& key) {
  check_rank(query, 4, "[B, H, M, D]");
  check_rank(key, 4, "[B, Hk, N, D]");
  check_companion(key, query);
  Shape shape;
  shape.batch = query.sizes[0];
  shape.heads = query.sizes[1];
  shape.key_heads = key.sizes[1];
  shape.queries = query.sizes[2];
  shape.keys = key.sizes[2];
  shape.width = query.sizes[3];
  if (shape.width < 1) refuse("query", "expected a width D of at least 1, got ", shape_text(query));
  if (key.sizes[0] != shape.batch)
    refuse("key", "expected the batch size of query, ", shape.batch, ", got ", shape_text(key));
  if (key.sizes[3] != shape.width)
    refuse("key", "expected the width of query, ", shape.width, ", got ", shape_text(key));
  if (shape.key_heads < 1) refuse("key", "expected at least one head, got ", shape_text(key));
  if (shape.heads % shape.key_heads != 0)
    refuse("query", "expected a number of heads H that is a multiple of Hk = ", shape.key_heads, " of key, got ",
           shape.heads);
  return shape;
}

inline Shape check_attention(const Operand& query, const Operand& key, const Operand& value) {
  Shape shape = check_query_key(query, key);
  check_rank(value, 4, "[B, Hk, N, Dv]");
  check_companion(value, query);
  if (value.sizes[0] != shape.batch || value.sizes[1] != shape.key_heads || value.sizes[2] != shape.keys)
    refuse("value", "expected [B, Hk, N] of key, ", shape_text({shape.batch, shape.key_heads, shape.keys}),
           ", then Dv, got ", shape_text(value));
  shape.value_width = value.sizes[3];
  return shape;
}

inline Shape check_weights(const Operand& weights) {
  check_rank(weights, 4, "[B, H, M, N]");
  Shape shape;
  shape.batch = weights.sizes[0];
  shape.heads = shape.key_heads = weights.sizes[1];
  shape.queries = weights.sizes[2];
  shape.keys = weights.sizes[3];
  return shape;
}

// The mask seen as [B, H, M, N]: missing leading axes and axes of size 1 get stride 0.
inline void check_broadcast(const Operand& mask, const Shape& shape, int64_t (&strides)[4]) {
  const int64_t sizes[4] = {shape.batch, shape.heads, shape.queries, shape.keys};
  const int64_t missing = 4 - mask.rank;
  for (int64_t axis = 0; axis < 4; ++axis) {
    const bool present = missing >= 0 && axis >= missing;
    const int64_t size = present ? mask.sizes[axis - missing] : 1;
    if (missing < 0 || (size != sizes[axis] && size != 1))
      refuse(mask.name, "expected a shape that broadcasts to [B, H, M, N] = ", shape_text(sizes, 4), ", got ",
             shape_text(mask));
    strides[axis] = size == 1 ? 0 : mask.strides[axis - missing];
  }
}

inline View view_of(const Operand& operand) {
  return {operand.data(), {operand.strides[0], operand.strides[1], operand.strides[2], operand.strides[3]}};
}

}  // namespace attnrb::ops
