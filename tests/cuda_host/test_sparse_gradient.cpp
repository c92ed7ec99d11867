// Gradients of outliers beside a dense backward of another library, on the emulated device or a real one. In that
// backward's place stands our own of plain attention, given the re-balanced output and log-sum-exp, and spoilt in some
// places.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "gradient_oracle.h"
#include "runner.h"
#include "sparse_cases.h"
#include "sparse_gradient.h"
#include "table.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

struct Gradients {
  Array query, key, value;

  Gradients(const AttentionCase& of, Random& random) {
    const Shape& shape = of.shape;
    query = aligned_array(of.dtype, {shape.batch, shape.heads, shape.queries, shape.width}, random);
    key = aligned_array(of.dtype, {shape.batch, shape.key_heads, shape.keys, shape.width}, random);
    value = aligned_array(of.dtype, {shape.batch, shape.key_heads, shape.keys, shape.width}, random);
  }
  void aim(GradientProblem& problem) {
    const auto target = [](Array& array) {
      array.fill_sentinel();
      return GradientProblem::Target{array.data(), {array.strides()[0], array.strides()[1], array.strides()[2]}};
    };
    problem.grad_query = target(query);
    problem.grad_key = target(key);
    problem.grad_value = target(value);
  }
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (const Array* each : {&query, &key, &value}) all.insert(all.end(), each->bytes().begin(), each->bytes().end());
    return all;
  }
};

// A backward, with what its forward left as the oracle has it, and its dense part.
struct SparseGradientCase {
  AttentionCase attention;
  Array grad_output;
  Gradients dense, found;
  std::vector<float> lse, grad_gain, grad_sinks;

  SparseGradientCase(AttentionCase of, Random& random)
      : attention(std::move(of)), dense(attention, random), found(attention, random) {
    const Shape& shape = attention.shape;
    grad_output = aligned_array(attention.dtype, {shape.batch, shape.heads, shape.queries, shape.width}, random);
    const AttentionTruth truth = attention_truth(attention.problem());
    for (const Bounded& each : truth.lse) lse.push_back(float(each.value));
    for (int64_t row = 0, at = 0; row < attention.rows(); ++row)
      for (int64_t d = 0; d < shape.width; ++d, ++at)
        attention.output.set(row / shape.queries / shape.heads, row / shape.queries % shape.heads, row % shape.queries,
                             d, truth.output[size_t(at)].value);
    GradientProblem plain = problem(dense);
    plain.edit = {};
    plain.grad_gain = nullptr;
    ScratchLease scratch;
    emulated_cuda_kernels.gradient(plain, test_pool(1), *scratch);
  }

  GradientProblem problem(Gradients& into) {
    GradientProblem problem;
    problem.shape = attention.shape;
    problem.dtype = attention.dtype;
    problem.query = attention.query.view();
    problem.key = attention.key.view();
    problem.value = attention.value.view();
    problem.visibility = attention.visibility;
    problem.scoring = attention.scoring;
    problem.lse = lse.data();
    problem.output = attention.output.view();
    problem.grad_output = grad_output.view();
    into.aim(problem);
    grad_gain.assign(size_t(attention.shape.heads), -77.0f);
    grad_sinks.assign(size_t(attention.shape.heads), -77.0f);
    problem.grad_sinks = grad_sinks.data();
    if (attention.role == Role::rebalanced) {
      problem.edit = attention.edit();
      problem.grad_gain = grad_gain.data();
    }
    return problem;
  }

  Status run(int32_t most_parts = cuda::kMostParts) {
    const GradientProblem whole = problem(found);
    EXPECT_TRUE(cuda::sparse_suits(whole));
    const cuda::DenseGradientViews views{dense.query.view(), dense.key.view(), dense.value.view()};
    EXPECT_TRUE(cuda::dense_suits(whole, views));
    return add_sparse_gradient(whole, views, most_parts);
  }

  // The dense part errs by what any backward of these weights may: P_ij in the place of w_ij P_ij, which is no more
  // than twice as much since gains are -0.5 at least. It is rounded, and what joins it errs no more than the whole.
  ::testing::AssertionResult matches(const char* name, const Array& got, const Array& before,
                                     const std::vector<Bounded>& truth) const {
    if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << name << ": memory around it was written";
    const bool boosted = attention.role == Role::rebalanced;
    const double unit = attention.dtype == DType::bfloat16 ? 0x1p-8 : 0x1p-11;
    const Sizes& sizes = got.sizes();
    size_t at = 0;
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t i = 0; i < sizes[2]; ++i)
          for (int64_t d = 0; d < sizes[3]; ++d, ++at) {
            const double part = before.at(b, h, i, d), value = got.at(b, h, i, d);
            double allowed = truth[at].cuda_tolerance;
            if (boosted) allowed = 3.0 * allowed + (std::isfinite(part) ? unit * std::fabs(part) + 0x1p-25 : 0.0);
            if (!(std::fabs(value - truth[at].value) <= allowed))
              return ::testing::AssertionFailure()
                     << name << " [" << b << ", " << h << ", " << i << ", " << d << "]: expected " << truth[at].value
                     << " within " << allowed << ", got " << value << ", of which the dense part is " << part;
          }
    return ::testing::AssertionSuccess();
  }
};

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return text == nullptr ? 100 : std::atoll(text) / 4;
}

constexpr int kParts = 8;  // so that the cases can be spread over processes

class GeneratedSparseGradient : public ::testing::TestWithParam<int> {};

TEST_P(GeneratedSparseGradient, MatchesTheOracleWhateverTheDensePartSpoilt) {
  for (int64_t seed = GetParam(); seed < case_count(); seed += kParts) {
    Random random{uint64_t(seed)};
    SparseGradientCase gradient(sparse_case(random, 192), random);
    const AttentionCase& attention = gradient.attention;
    for (int spoilt = int(random.pick<int64_t>({0, 0, 1, 4})); spoilt > 0; --spoilt) {
      Gradients& dense = gradient.dense;
      Array& array = *random.pick<Array*>({&dense.query, &dense.key, &dense.value});
      const Sizes& sizes = array.sizes();
      array.set(random.integer(0, sizes[0] - 1), random.integer(0, sizes[1] - 1), random.integer(0, sizes[2] - 1),
                random.integer(0, sizes[3] - 1), std::numeric_limits<double>::quiet_NaN());
    }
    const GradientTruth truth = gradient_truth(gradient.problem(gradient.found));
    ASSERT_EQ(gradient.run(), Status::ok) << attention.describe();
    const std::vector<unsigned char> first = gradient.found.bytes();
    const auto told = [&] { return "seed " + std::to_string(seed) + ": " + attention.describe(); };
    ASSERT_TRUE(gradient.matches("query", gradient.found.query, gradient.dense.query, truth.query)) << told();
    ASSERT_TRUE(gradient.matches("key", gradient.found.key, gradient.dense.key, truth.key)) << told();
    ASSERT_TRUE(gradient.matches("value", gradient.found.value, gradient.dense.value, truth.value)) << told();
    for (size_t h = 0; attention.role == Role::rebalanced && h < truth.gain.size(); ++h)
      ASSERT_TRUE(close(emulated_cuda_kernels, gradient.grad_gain[h], truth.gain[h]))
          << "gain of head " << h << ": expected " << truth.gain[h].value << " within " << truth.gain[h].cuda_tolerance
          << ", got " << gradient.grad_gain[h] << "; " << told();
    // Work is taken in another order each time.
    ASSERT_EQ(gradient.run(), Status::ok);
    ASSERT_TRUE(first == gradient.found.bytes()) << told();
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GeneratedSparseGradient, ::testing::Range(0, kParts));

TEST(SparseGradient, LeavesTilesThatAreNotInDoubtAlone) {
  // A dense part that is wrong but finite shows which tiles were done anew.
  Random random(3);
  AttentionCase attention = simple_case({2, 2, 2, 200, 200, 32, 32}, DType::bfloat16);
  attention.role = Role::source;
  SparseGradientCase gradient(std::move(attention), random);
  Gradients& dense = gradient.dense;
  for (Array* array : {&dense.query, &dense.key, &dense.value})
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t i = 0; i < 200; ++i) array->set(b, h, i, 3, 17.0);
  // The last items of tiles, and the first of one.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  dense.query.set(1, 0, 63, 8, nan);
  dense.key.set(0, 1, 127, 8, nan);
  dense.value.set(1, 1, 192, 8, nan);
  ASSERT_EQ(gradient.run(), Status::ok);
  const auto anew = [](const Array& array, int64_t b, int64_t h, int64_t tile) {
    const int64_t first = 64 * tile, last = std::min<int64_t>(first + 64, 200);
    int64_t changed = 0;
    for (int64_t i = first; i < last; ++i) changed += array.at(b, h, i, 3) != 17.0 ? 1 : 0;
    EXPECT_TRUE(changed == 0 || changed == last - first);
    return changed != 0;
  };
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t tile = 0; tile < 4; ++tile) {
        const bool of_keys = (b == 0 && h == 1 && tile == 1) || (b == 1 && h == 1 && tile == 3);
        EXPECT_EQ(anew(gradient.found.query, b, h, tile), b == 1 && h == 0 && tile == 0) << b << h << tile;
        EXPECT_EQ(anew(gradient.found.key, b, h, tile), of_keys) << b << h << tile;
        EXPECT_EQ(anew(gradient.found.value, b, h, tile), of_keys) << b << h << tile;
      }
}

TEST(SparseGradient, BrokenOutliersSpoilWhatTheirRowReaches) {
  Random random(5);
  AttentionCase attention = simple_case({1, 2, 1, 150, 150, 64, 64}, DType::float16);
  add_outliers(attention, random, 6);
  SparseGradientCase gradient(std::move(attention), random);
  gradient.attention.counts[150 + 70] = 7;
  EXPECT_EQ(gradient.run(), Status::outlier_count);
  for (int64_t d = 0; d < 64; ++d) {
    EXPECT_TRUE(std::isnan(gradient.found.query.at(0, 1, 70, d)));
    EXPECT_FALSE(std::isnan(gradient.found.query.at(0, 1, 69, d)));
    EXPECT_TRUE(std::isnan(gradient.found.key.at(0, 0, 70, d)));
    EXPECT_FALSE(std::isnan(gradient.found.key.at(0, 0, 71, d)));
  }
}

TEST(SparseGradient, ALongKeyIsAddedInParts) {
  // Two keys have more rows than a part, one of them more than two parts, and one has as many as fit one.
  Random random(11);
  AttentionCase attention = simple_case({1, 8, 1, 150, 150, 24, 24}, DType::bfloat16);
  add_outliers(attention, random, 4);
  attention.counts.clear();
  for (int64_t row = 0; row < attention.rows(); ++row) {
    const int64_t head = row / 150, query = row % 150;
    std::vector<int32_t> slots = {0};
    if (head < 4) slots.push_back(2);
    if (head > 3 && query >= 22) slots.push_back(3);
    if (query > 20) slots.push_back(int32_t(random.integer(4, query)));
    attention.counts.push_back(int32_t(slots.size()));
    slots.resize(4, -1);
    std::copy(slots.begin(), slots.end(), attention.indices.begin() + 4 * row);
  }
  attention.gain.assign(8, 0.5f);
  SparseGradientCase gradient(std::move(attention), random);
  const GradientTruth truth = gradient_truth(gradient.problem(gradient.found));
  ASSERT_EQ(gradient.run(), Status::ok);
  EXPECT_TRUE(gradient.matches("query", gradient.found.query, gradient.dense.query, truth.query));
  EXPECT_TRUE(gradient.matches("key", gradient.found.key, gradient.dense.key, truth.key));
  EXPECT_TRUE(gradient.matches("value", gradient.found.value, gradient.dense.value, truth.value));
  // Whoever adds the parts: a block for each, or, where there is room for none or for those of one key, the key's own.
  const std::vector<unsigned char> bytes = gradient.found.bytes();
  for (const int32_t most_parts : {cuda::kMostParts, 3, 0}) {
    ASSERT_EQ(gradient.run(most_parts), Status::ok);
    EXPECT_TRUE(bytes == gradient.found.bytes()) << most_parts;
  }
}

TEST(SparseGradient, TakesOnlyWhatAFlashBackwardComputes) {
  Random random(7);
  AttentionCase attention = simple_case({1, 2, 1, 16, 16, 64, 64}, DType::bfloat16);
  attention.role = Role::source;
  SparseGradientCase gradient(std::move(attention), random);
  const auto suits = [&](auto&& change) {
    GradientProblem problem = gradient.problem(gradient.found);
    change(problem);
    return cuda::sparse_suits(problem);
  };
  const float number = 0.0f;
  EXPECT_TRUE(suits([](GradientProblem&) {}));
  EXPECT_FALSE(suits([&](GradientProblem& p) { p.grad_lse = &number; }));
  EXPECT_FALSE(suits([](GradientProblem& p) { p.shape.width = p.shape.value_width = 200; }));
  EXPECT_FALSE(suits([](GradientProblem& p) { p.scoring.softcap = 5.0f; }));
  EXPECT_FALSE(suits([](GradientProblem& p) { p.visibility.window = 4; }));
  EXPECT_FALSE(suits([](GradientProblem& p) { p.grad_output.strides[3] = 0; }));
  EXPECT_FALSE(suits([](GradientProblem& p) { p.output.strides[1] += 1; }));
  EXPECT_FALSE(suits([](GradientProblem& p) { p.edit.capacity = int64_t(1) << 30; }));
}

}  // namespace
}  // namespace attnrb::testing
