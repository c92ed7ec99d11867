#include "gradient_case.h"

#include <utility>

#include "oracle.h"

namespace attnrb::testing {

namespace {

constexpr float kUntouched = -77.0f;

}  // namespace

GradientCase::GradientCase(AttentionCase& of, Random& random, bool of_received) : attention(of), received(of_received) {
  const Shape& shape = attention.shape;
  const auto array = [&](int64_t heads, int64_t rows, int64_t width) {
    Layout layout;
    if (random.chance(0.5)) std::swap(layout.order[1], layout.order[2]);
    layout.row_padding = random.integer(0, 5);
    layout.offset = random.integer(0, 9);
    return Array(attention.dtype, {shape.batch, heads, rows, width}, layout);
  };
  grad_query = array(shape.heads, shape.queries, shape.width);
  grad_key = array(shape.key_heads, shape.keys, shape.width);
  grad_value = array(shape.key_heads, shape.keys, received ? 0 : shape.value_width);
  grad_output = array(shape.heads, shape.queries, shape.value_width);
  grad_output.fill_uniform(random, -1.0, 1.0);
  // A row whose output nothing depends on.
  if (random.chance(0.3))
    for (int64_t d = 0; d < shape.value_width; ++d) grad_output.set(0, 0, shape.queries / 2, d, 0.0);
  const bool edited = !attention.bias.empty() || attention.rule == Rule::rest;
  if ((attention.role == Role::source || edited) && random.chance(0.7))
    for (int64_t row = 0; row < attention.rows(); ++row) grad_lse.push_back(float(random.uniform(-1.0, 1.0)));
  if (received)
    for (int64_t i = 0; i < shape.batch * shape.heads * shape.keys; ++i)
      grad_received.push_back(float(random.uniform(-1.0, 1.0)));

  AttentionProblem forward = attention.problem();
  if (received) forward.edit.indices = nullptr;
  const AttentionTruth truth = attention_truth(forward);
  for (const Bounded& each : truth.lse) lse.push_back(float(each.value));
  for (int64_t row = 0, at = 0; row < attention.rows(); ++row)
    for (int64_t d = 0; d < shape.value_width; ++d, ++at)
      attention.output.set(row / shape.queries / shape.heads, row / shape.queries % shape.heads, row % shape.queries, d,
                           truth.output[size_t(at)].value);
}

GradientProblem GradientCase::problem() {
  std::vector<float> unused;
  const ReceivedProblem shared = attention.received_problem(unused);
  GradientProblem problem;
  problem.shape = attention.shape;
  problem.dtype = attention.dtype;
  problem.query = shared.query;
  problem.key = shared.key;
  problem.visibility = shared.visibility;
  problem.scoring = shared.scoring;
  problem.edit = shared.edit;
  const int64_t* sizes = attention.bias_sizes;
  grad_bias.assign(size_t(sizes[0] * sizes[1] * sizes[2]), kUntouched);
  if (!grad_bias.empty()) {
    problem.grad_bias = grad_bias.data();
    problem.grad_bias_strides[0] = sizes[0] == 1 ? 0 : sizes[1] * sizes[2];
    problem.grad_bias_strides[1] = sizes[1] == 1 ? 0 : sizes[2];
    problem.grad_bias_strides[2] = 1;
  }
  problem.lse = lse.data();
  const auto target = [](Array& array) {
    array.fill_sentinel();
    return GradientProblem::Target{array.data(), {array.strides()[0], array.strides()[1], array.strides()[2]}};
  };
  problem.grad_query = target(grad_query);
  problem.grad_key = target(grad_key);
  grad_sinks.assign(size_t(attention.shape.heads), kUntouched);
  problem.grad_sinks = grad_sinks.data();
  grad_gain.assign(size_t(attention.shape.heads), kUntouched);
  if (received) {
    problem.shape.value_width = 0;
    problem.grad_received = grad_received.data();
    return problem;
  }
  problem.value = attention.value.view();
  problem.output = attention.output.view();
  problem.grad_output = grad_output.view();
  problem.grad_value = target(grad_value);
  if (!grad_lse.empty()) problem.grad_lse = grad_lse.data();
  if (attention.edits()) {
    problem.edit = attention.edit();
    problem.grad_gain = grad_gain.data();
  }
  return problem;
}

std::vector<unsigned char> GradientCase::written() const {
  std::vector<unsigned char> all;
  for (const Array* array : {&grad_query, &grad_key, &grad_value})
    all.insert(all.end(), array->bytes().begin(), array->bytes().end());
  for (const std::vector<float>* numbers : {&grad_gain, &grad_sinks, &grad_bias}) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(numbers->data());
    all.insert(all.end(), bytes, bytes + numbers->size() * sizeof(float));
  }
  return all;
}

bool for_received_attention(uint64_t seed) { return seed % 5 == 2; }

Rarities gradient_rarities(uint64_t seed) {
  Rarities rarities;
  rarities.wide = seed % 7 == 1;
  rarities.capped = seed % 3 == 0;
  rarities.windowed = seed % 4 >= 2;
  return rarities;
}

AttentionCase generate_gradient_case(uint64_t seed) { return generate_case(seed, gradient_rarities(seed)); }
AttentionCase generate_edited_gradient_case(uint64_t seed) {
  return generate_edited_case(seed, gradient_rarities(seed));
}

}  // namespace attnrb::testing
