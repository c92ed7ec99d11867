// Cases for the sparse part beside a dense kernel of another library, on the emulated device or a real one.
#pragma once

#include <utility>

#include "cases.h"

namespace attnrb::testing {

// Rows of whole units of 16 bytes, in one of the orders that models have.
inline Array aligned_array(DType dtype, const Sizes& sizes, Random& random) {
  Layout layout;
  if (random.chance(0.5)) std::swap(layout.order[1], layout.order[2]);
  if (random.chance(0.3)) layout.row_padding = 8 * random.integer(1, 3);
  if (random.chance(0.3)) layout.offset = 8 * random.integer(1, 3);
  Array array(dtype, sizes, layout);
  array.fill_uniform(random, -2.0, 2.0);
  return array;
}

// A source case, or one with outliers; `widest` of 136 or 256.
inline AttentionCase sparse_case(Random& random, int64_t widest) {
  AttentionCase attention;
  Shape& shape = attention.shape;
  attention.dtype = random.pick({DType::bfloat16, DType::float16});
  shape.batch = random.integer(1, 2);
  shape.key_heads = random.integer(1, 2);
  shape.heads = shape.key_heads * random.pick<int64_t>({1, 2, 3, 7});
  shape.width = shape.value_width = random.pick<int64_t>({8, 16, 40, 64, 72, 128, 136, widest});
  shape.queries = random.integer(1, 90);
  Visibility& visibility = attention.visibility;
  visibility.causal = random.chance(0.6);
  shape.keys = visibility.causal ? shape.queries : random.integer(1, 200);
  if (random.chance(0.5)) visibility.key_offset = random.integer(1, 1000);
  visibility.query_offset = visibility.causal ? visibility.key_offset : visibility.key_offset + random.integer(-20, 20);
  attention.scoring.scale = float(random.uniform(0.5, 8.0) / double(shape.width));
  attention.query = aligned_array(attention.dtype, {shape.batch, shape.heads, shape.queries, shape.width}, random);
  attention.key = aligned_array(attention.dtype, {shape.batch, shape.key_heads, shape.keys, shape.width}, random);
  attention.value = aligned_array(attention.dtype, {shape.batch, shape.key_heads, shape.keys, shape.width}, random);
  attention.output = aligned_array(attention.dtype, {shape.batch, shape.heads, shape.queries, shape.width}, random);
  attention.threshold = random.pick({0.01, 0.05, 0.003});
  attention.rule = random.chance(0.5) ? Rule::row : Rule::none;
  attention.role = Role::source;
  if (random.chance(0.5)) add_outliers(attention, random, random.pick<int64_t>({1, 5, 40, 90}));
  return attention;
}

}  // namespace attnrb::testing
