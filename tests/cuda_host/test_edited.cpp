// Every option of an edit on the emulated device, against the definition in double precision. ATTNRB_TEST_CASES sets
// how many cases (a quarter of it).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>

#include "edited.h"
#include "runner.h"
#include "table.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr int kParts = 8;

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return (text == nullptr ? 4000 : std::atoll(text)) / 4;
}

std::vector<const Kernels*> tables() { return {&emulated_cuda_kernels, &emulated_cuda_split_kernels}; }

// Certain outliers are there, certain others are not, in ascending order.
::testing::AssertionResult found_right(const EditedCase& edited, const EditedTruth& truth) {
  const AttentionCase& attention = edited.attention;
  const Shape& shape = attention.shape;
  const int64_t capacity = int64_t(attention.found.size() - 1) / attention.rows();
  for (int64_t index = 0; index < attention.rows(); ++index) {
    const EditedRow& row = truth.rows[size_t(index)];
    const int64_t b = index / shape.queries / shape.heads;
    const int64_t offset =
        edited.query_offsets.empty() ? attention.visibility.query_offset : edited.query_offsets[size_t(b)];
    const int32_t* slots = attention.found.data() + index * capacity;
    const int32_t count = attention.found_counts[size_t(index)];
    if (count < 0 || count > capacity) return ::testing::AssertionFailure() << "count " << count << " of row " << index;
    int64_t next = 0;
    for (int64_t j = 0; j < shape.keys; ++j) {
      const int64_t slot = attention.visibility.key_offset + j;
      const bool emitted = next < count && slots[next] == slot;
      next += emitted;
      const bool eligible = row.seen[size_t(j)] && slot != offset + index % shape.queries;
      const double weight = row.weights[size_t(j)];
      const double margin = (row.error + 4.0 * 0x1p-24 * std::fabs(row.lse)) * attention.threshold;
      if (eligible && std::fabs(weight - attention.threshold) <= margin) continue;
      if (emitted != (eligible && weight > attention.threshold))
        return ::testing::AssertionFailure() << "row " << index << ", slot " << slot << " of weight " << weight
                                             << " is " << (emitted ? "" : "not ") << "among the outliers";
    }
    if (next != count) return ::testing::AssertionFailure() << "row " << index << " has slots that do not ascend";
    for (int64_t c = count; c < capacity; ++c)
      if (slots[c] != -1) return ::testing::AssertionFailure() << "row " << index << ": padding is " << slots[c];
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult near(const char* name, const std::vector<float>& got, const std::vector<Near>& truth) {
  for (size_t at = 0; at < truth.size(); ++at)
    if (!truth[at].holds(got[at]))
      return ::testing::AssertionFailure() << name << " " << at << ": expected " << truth[at].value << " within "
                                           << truth[at].tolerance << ", got " << got[at];
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult near(const char* name, const Array& got, const std::vector<Near>& truth) {
  if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << "memory around " << name << " was written";
  const Sizes& n = got.sizes();
  size_t at = 0;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d, ++at)
          if (!truth[at].holds(got.at(a, b, c, d)))
            return ::testing::AssertionFailure()
                   << name << " [" << a << ", " << b << ", " << c << ", " << d << "]: expected " << truth[at].value
                   << " within " << truth[at].tolerance << ", got " << got.at(a, b, c, d);
  return ::testing::AssertionSuccess();
}

void expect_right(const Kernels& kernels, EditedCase& edited, const EditedTruth& truth) {
  ScratchLease scratch;
  const AttentionProblem problem = edited.problem();
  ASSERT_EQ(kernels.attention(problem, test_pool(1), *scratch), Status::ok);
  ASSERT_TRUE(near("lse", edited.attention.lse, truth.lse));
  ASSERT_TRUE(near("output", edited.attention.output, truth.output));
  if (!edited.emits) return;
  ASSERT_EQ(edited.attention.found.back(), kUnwritten);
  ASSERT_TRUE(found_right(edited, truth));
}

class Edited : public ::testing::TestWithParam<int> {};

TEST_P(Edited, AttentionIsThatOfTheDefinition) {
  for (int64_t seed = GetParam(); seed < case_count(); seed += kParts) {
    EditedCase edited{uint64_t(seed)};
    const EditedTruth truth = edited_truth(edited.problem());
    for (const Kernels* kernels : tables()) {
      SCOPED_TRACE((kernels == tables()[0] ? "whole, seed " : "split, seed ") + std::to_string(seed) + ": " +
                   edited.describe());
      expect_right(*kernels, edited, truth);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(Edited, ReceivedAttentionIsThatOfTheDefinition) {
  for (int64_t seed = GetParam(); seed < case_count() / 2; seed += kParts) {
    const EditedCase edited{uint64_t(seed)};
    std::vector<float> received;
    const ReceivedProblem problem = edited.received_problem(received);
    const std::vector<Near> truth = edited_received(problem);
    for (const Kernels* kernels : tables()) {
      received.assign(received.size(), -77.0f);
      ScratchLease scratch;
      kernels->received_attention(problem, test_pool(1), *scratch);
      ASSERT_TRUE(near("received", received, truth)) << "seed " << seed << ": " << edited.describe();
    }
  }
}

// What a backward is given and writes.
struct Backward {
  EditedCase edited;
  bool received;
  Array grad_output, grad_query, grad_key, grad_value;
  std::vector<float> lse, grad_lse, grad_received, grad_gain, grad_sinks, grad_bias;

  explicit Backward(uint64_t seed) : edited(seed), received(seed % 4 == 3) {
    Random random(seed + 9000000);
    const Shape& shape = edited.attention.shape;
    const DType dtype = edited.attention.dtype;
    edited.emits = false;
    edited.attention.role = Role::plain;
    if (received) edited.boosts = edited.shared_rows = false;
    grad_output = Array(dtype, {shape.batch, shape.heads, shape.queries, shape.value_width});
    grad_output.fill_uniform(random, -1.0, 1.0);
    grad_query = Array(dtype, {shape.batch, shape.heads, shape.queries, shape.width});
    grad_key = Array(dtype, {shape.batch, shape.key_heads, shape.keys, shape.width});
    grad_value = Array(dtype, {shape.batch, shape.key_heads, shape.keys, received ? 0 : shape.value_width});
    const EditedTruth truth = edited_truth(edited.problem());
    for (const Near& each : truth.lse) lse.push_back(float(each.value));
    for (int64_t row = 0, at = 0; row < edited.attention.rows(); ++row)
      for (int64_t d = 0; d < shape.value_width; ++d, ++at)
        edited.attention.output.set(row / shape.queries / shape.heads, row / shape.queries % shape.heads,
                                    row % shape.queries, d, truth.output[size_t(at)].value);
    if (!received && random.chance(0.5))
      for (size_t row = 0; row < lse.size(); ++row) grad_lse.push_back(float(random.uniform(-1.0, 1.0)));
    if (received)
      for (int64_t at = 0; at < shape.batch * shape.heads * shape.keys; ++at)
        grad_received.push_back(float(random.uniform(-1.0, 1.0)));
  }

  // The output is not touched: it has what the forward left.
  GradientProblem problem() {
    const Array output = edited.attention.output;
    const AttentionProblem forward = edited.problem();
    edited.attention.output = output;
    GradientProblem problem;
    problem.shape = forward.shape;
    problem.dtype = forward.dtype;
    problem.query = forward.query;
    problem.key = forward.key;
    problem.visibility = forward.visibility;
    problem.scoring = forward.scoring;
    problem.edit = forward.edit;
    problem.lse = lse.data();
    const auto target = [](Array& array) {
      array.fill_sentinel();
      return GradientProblem::Target{array.data(), {array.strides()[0], array.strides()[1], array.strides()[2]}};
    };
    problem.grad_query = target(grad_query);
    problem.grad_key = target(grad_key);
    grad_sinks.assign(size_t(forward.shape.heads), -77.0f);
    problem.grad_sinks = grad_sinks.data();
    if (forward.edit.key_bias != nullptr) {
      const int64_t* sizes = edited.bias_sizes;
      grad_bias.assign(size_t(sizes[0] * sizes[1] * sizes[2]), -77.0f);
      problem.grad_bias = grad_bias.data();
      problem.grad_bias_strides[0] = sizes[0] == 1 ? 0 : sizes[1] * sizes[2];
      problem.grad_bias_strides[1] = sizes[1] == 1 ? 0 : sizes[2];
      problem.grad_bias_strides[2] = 1;
    }
    if (received) {
      problem.shape.value_width = 0;
      problem.grad_received = grad_received.data();
      return problem;
    }
    problem.value = forward.value;
    problem.output = edited.attention.output.view();
    problem.grad_output = grad_output.view();
    problem.grad_value = target(grad_value);
    if (!grad_lse.empty()) problem.grad_lse = grad_lse.data();
    if (edited.boosts) {
      grad_gain.assign(size_t(forward.shape.heads), -77.0f);
      problem.grad_gain = grad_gain.data();
    }
    return problem;
  }
};

TEST_P(Edited, GradientsAreThoseOfTheDefinition) {
  for (int64_t seed = GetParam(); seed < case_count() / 2; seed += kParts) {
    Backward backward{uint64_t(seed)};
    SCOPED_TRACE("seed " + std::to_string(seed) + (backward.received ? " received" : "") + ": " +
                 backward.edited.describe());
    const GradientProblem problem = backward.problem();
    const EditedGradients truth = edited_gradients(problem, backward.edited.bias_sizes);
    std::vector<float> bias_before;
    for (int run = 0; run < 2; ++run) {
      ScratchLease scratch;
      ASSERT_EQ(emulated_cuda_kernels.gradient(problem, test_pool(1), *scratch), Status::ok);
      if (run == 1) {
        ASSERT_EQ(bias_before, backward.grad_bias) << "equal inputs, other bits";
      }
      bias_before = backward.grad_bias;
    }
    ASSERT_TRUE(near("grad_query", backward.grad_query, truth.query));
    ASSERT_TRUE(near("grad_key", backward.grad_key, truth.key));
    ASSERT_TRUE(near("grad_sinks", backward.grad_sinks, truth.sinks));
    if (!backward.edited.bias.empty()) {
      ASSERT_TRUE(near("grad_bias", backward.grad_bias, truth.bias));
    }
    if (backward.received) continue;
    ASSERT_TRUE(near("grad_value", backward.grad_value, truth.value));
    if (backward.edited.boosts) {
      ASSERT_TRUE(near("grad_gain", backward.grad_gain, truth.gain));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Edited, ::testing::Range(0, kParts));

}  // namespace
}  // namespace attnrb::testing
