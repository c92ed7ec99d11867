// Gradients against the oracle over generated cases, and what those reach rarely: NaN where nothing may read it.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "gradient_oracle.h"
#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kParts = 8;
constexpr float kUntouched = -77.0f;

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return (text == nullptr ? 2000 : std::atoll(text)) / 4;
}

// Tables that differ in their forward alone have one backward.
std::vector<const Kernels*> gradient_kernels() {
  std::vector<const Kernels*> tables;
  for (const Kernels* table : tested_kernels())
    if (table->gradient != nullptr) tables.push_back(table);
  return tables;
}

// The backward of an attention case: what comes in besides the case's own operands, and where gradients go.
struct GradientCase {
  AttentionCase& attention;
  bool received = false;
  Array grad_output, grad_query, grad_key, grad_value;
  std::vector<float> lse, grad_lse, grad_received, grad_gain, grad_sinks;

  GradientCase(AttentionCase& of, Random& random, bool of_received) : attention(of), received(of_received) {
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
    if (attention.role == Role::source && random.chance(0.7))
      for (int64_t row = 0; row < attention.rows(); ++row) grad_lse.push_back(float(random.uniform(-1.0, 1.0)));
    if (received)
      for (int64_t i = 0; i < shape.batch * shape.heads * shape.keys; ++i)
        grad_received.push_back(float(random.uniform(-1.0, 1.0)));
    // The forward as the oracle has it, rounded.
    AttentionProblem problem = attention.problem();
    if (received) problem.boost = {};
    const AttentionTruth truth = attention_truth(problem);
    for (const Bounded& each : truth.lse) lse.push_back(float(each.value));
    for (int64_t row = 0, at = 0; row < attention.rows(); ++row)
      for (int64_t d = 0; d < shape.value_width; ++d, ++at)
        attention.output.set(row / shape.queries / shape.heads, row / shape.queries % shape.heads, row % shape.queries,
                             d, truth.output[size_t(at)].value);
  }

  GradientProblem problem() {
    std::vector<float> unused;
    const ReceivedProblem shared = attention.received_problem(unused);
    GradientProblem problem;
    problem.shape = attention.shape;
    problem.dtype = attention.dtype;
    problem.query = shared.query;
    problem.key = shared.key;
    problem.visibility = shared.visibility;
    problem.scoring = shared.scoring;
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
    if (attention.role == Role::rebalanced) {
      problem.boost = {attention.indices.data(), attention.counts.data(), attention.capacity, attention.gain.data(),
                       attention.normalize};
      problem.grad_gain = grad_gain.data();
    }
    return problem;
  }

  std::vector<unsigned char> written() const {
    std::vector<unsigned char> all;
    for (const Array* array : {&grad_query, &grad_key, &grad_value})
      all.insert(all.end(), array->bytes().begin(), array->bytes().end());
    for (const std::vector<float>* numbers : {&grad_gain, &grad_sinks}) {
      const unsigned char* bytes = reinterpret_cast<const unsigned char*>(numbers->data());
      all.insert(all.end(), bytes, bytes + numbers->size() * sizeof(float));
    }
    return all;
  }
};

std::vector<unsigned char> run_gradient(const Kernels& kernels, GradientCase& gradient, int64_t threads) {
  const GradientProblem problem = gradient.problem();
  ScratchLease scratch;
  EXPECT_EQ(kernels.gradient(problem, test_pool(threads), *scratch), Status::ok);
  return gradient.written();
}

::testing::AssertionResult array_matches(const Kernels& kernels, const char* name, const Array& got,
                                         const std::vector<Bounded>& expected) {
  if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << "memory around " << name << " was written";
  const Sizes& n = got.sizes();
  size_t at = 0;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d, ++at)
          if (!close(kernels, got.at(a, b, c, d), expected[at]))
            return ::testing::AssertionFailure()
                   << name << " [" << a << ", " << b << ", " << c << ", " << d << "]: expected " << expected[at].value
                   << " within " << tolerance(kernels, expected[at]) << ", got " << got.at(a, b, c, d);
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult numbers_match(const Kernels& kernels, const char* name, const std::vector<float>& got,
                                         const std::vector<Bounded>& expected) {
  for (size_t h = 0; h < got.size(); ++h)
    if (!close(kernels, got[h], expected[h]))
      return ::testing::AssertionFailure() << name << " [" << h << "]: expected " << expected[h].value << " within "
                                           << tolerance(kernels, expected[h]) << ", got " << got[h];
  return ::testing::AssertionSuccess();
}

void check(const Kernels& kernels, const GradientCase& gradient, const GradientTruth& truth) {
  ASSERT_TRUE(array_matches(kernels, "grad_query", gradient.grad_query, truth.query));
  ASSERT_TRUE(array_matches(kernels, "grad_key", gradient.grad_key, truth.key));
  ASSERT_TRUE(numbers_match(kernels, "grad_sinks", gradient.grad_sinks, truth.sinks));
  if (gradient.received) return;
  ASSERT_TRUE(array_matches(kernels, "grad_value", gradient.grad_value, truth.value));
  if (gradient.attention.role != Role::rebalanced) return;
  ASSERT_TRUE(numbers_match(kernels, "grad_gain", gradient.grad_gain, truth.gain));
}

class GeneratedGradient : public ::testing::TestWithParam<int> {};

TEST_P(GeneratedGradient, MatchesTheOracleOnAnyNumberOfThreads) {
  for (int64_t seed = GetParam(); seed < case_count(); seed += kParts) {
    AttentionCase attention = generate_case(uint64_t(seed));
    Random random(uint64_t(seed) + 1000000);
    GradientCase gradient(attention, random, random.chance(0.2));
    const GradientTruth truth = gradient_truth(gradient.problem());
    for (const Kernels* kernels : gradient_kernels()) {
      SCOPED_TRACE(std::string(kernels->name) + ", seed " + std::to_string(seed) + ": " + attention.describe() +
                   (gradient.received ? " received" : ""));
      const std::vector<unsigned char> alone = run_gradient(*kernels, gradient, 1);
      check(*kernels, gradient, truth);
      if (HasFatalFailure()) return;
      for (const int64_t threads : {2, 4})
        ASSERT_TRUE(run_gradient(*kernels, gradient, threads) == alone) << "on " << threads << " threads";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GeneratedGradient, ::testing::Range(0, kParts));

class GradientEdges : public KernelTest {
 protected:
  const Kernels& kernels() const { return *GetParam(); }
};

// Long enough for several blocks of keys and of rows, so that tasks wait for each other.
TEST_P(GradientEdges, BlocksTakeTurns) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    AttentionCase attention = simple_case({1, 2, 1, 300, 500, 20, 12}, dtype);
    Random random(3);
    add_outliers(attention, random, 7);
    GradientCase gradient(attention, random, false);
    const GradientTruth truth = gradient_truth(gradient.problem());
    const std::vector<unsigned char> alone = run_gradient(kernels(), gradient, 1);
    check(kernels(), gradient, truth);
    // The emulated device runs its threads in another order each time, and slowly.
    const int repeats = std::strcmp(kernels().name, "cuda") == 0 ? 1 : 10;
    for (int repeat = 0; repeat < repeats; ++repeat) EXPECT_TRUE(run_gradient(kernels(), gradient, 8) == alone);
  }
}

// Padding on both sides, hidden from everyone, and a query that sees nothing: NaN there changes no bit.
TEST_P(GradientEdges, PaddingIsNeverRead) {
  for (const bool received : {false, true}) {
    AttentionCase attention = simple_case({2, 4, 2, 150, 150, 24, 24});
    attention.key_start = {0, 40};
    attention.key_end = {130, 150};
    Random random(4);
    if (!received) add_outliers(attention, random, 5);
    GradientCase gradient(attention, random, received);
    const std::vector<unsigned char> clean = run_gradient(kernels(), gradient, 2);
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t j = 0; j < 150; ++j) {
        if (b == 0 ? j < 130 : j >= 40) continue;
        for (int64_t d = 0; d < 24; ++d)
          for (int64_t h = 0; h < 4; ++h) {
            if (h < 2) attention.key.set(b, h, j, d, kNaN);
            if (h < 2) attention.value.set(b, h, j, d, kNaN);
            if (b == 0) continue;  // queries behind the end of the keys still see those before it
            attention.query.set(b, h, j, d, kNaN);
            gradient.grad_output.set(b, h, j, d, kNaN);
            attention.output.set(b, h, j, d, kNaN);
          }
      }
    EXPECT_TRUE(run_gradient(kernels(), gradient, 2) == clean);
    for (int64_t d = 0; d < 24; ++d) {
      EXPECT_EQ(gradient.grad_key.at(0, 0, 140, d), 0.0);
      EXPECT_EQ(gradient.grad_key.at(1, 1, 39, d), 0.0);
      EXPECT_EQ(gradient.grad_query.at(1, 3, 0, d), 0.0);
    }
  }
}

// A NaN that some queries see reaches what depends on it and nothing else.
TEST_P(GradientEdges, NaNStaysWhereItIsSeen) {
  AttentionCase attention = simple_case({1, 1, 1, 60, 60, 8, 8});
  Random random(5);
  GradientCase gradient(attention, random, false);
  gradient.grad_output.fill_uniform(random, 0.5, 1.0);
  for (int64_t i = 30; i < 60; ++i) gradient.lse[size_t(i)] = float(kNaN);
  for (int64_t d = 0; d < 8; ++d) attention.key.set(0, 0, 30, d, kNaN);
  run_gradient(kernels(), gradient, 1);
  for (int64_t i = 0; i < 60; ++i) EXPECT_EQ(std::isnan(gradient.grad_query.at(0, 0, i, 0)), i >= 30) << i;
  for (int64_t j = 31; j < 60; ++j) EXPECT_TRUE(std::isnan(gradient.grad_value.at(0, 0, j, 0))) << j;
  EXPECT_TRUE(std::isnan(gradient.grad_value.at(0, 0, 0, 0)));  // through the weights of later queries
}

TEST_P(GradientEdges, OutlierRowsThatBreakTheRulesAreReported) {
  AttentionCase attention = simple_case({1, 1, 1, 3, 9, 4, 4});
  Random random(6);
  add_outliers(attention, random, 3);
  attention.indices = {1, 2, 3, 1, 2, 3, 1, 2, 3};
  attention.counts = {3, 3, 3};
  GradientCase gradient(attention, random, false);
  ScratchLease scratch;
  attention.indices[4] = 1;
  EXPECT_EQ(kernels().gradient(gradient.problem(), test_pool(1), *scratch), Status::unsorted_outliers);
  attention.indices[4] = 2;
  attention.counts[1] = 4;
  EXPECT_EQ(kernels().gradient(gradient.problem(), test_pool(1), *scratch), Status::outlier_count);
}

INSTANTIATE_TEST_SUITE_P(Kernels, GradientEdges, ::testing::ValuesIn(gradient_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
