// Gradients against the oracle over generated cases, and what those reach rarely: NaN where nothing may read it.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <utility>

#include "gradient_case.h"
#include "gradient_oracle.h"
#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kParts = 8;

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return (text == nullptr ? 2000 : std::atoll(text)) / 4;
}

std::vector<unsigned char> run_gradient(const Kernels& kernels, GradientCase& gradient, int64_t threads) {
  const GradientProblem problem = gradient.problem();
  ScratchLease scratch;
  EXPECT_EQ(kernels.gradient(problem, test_pool(threads), *scratch), Status::ok);
  return gradient.written();
}

void check_cases(int part, int64_t count, AttentionCase (*generate)(uint64_t),
                 const std::vector<const Kernels*>& tables) {
  for (int64_t seed = part; seed < count; seed += kParts) {
    AttentionCase attention = generate(uint64_t(seed));
    Random random(uint64_t(seed) + 1000000);
    GradientCase gradient(attention, random, for_received_attention(uint64_t(seed)));
    const GradientTruth truth = gradient_truth(gradient.problem());
    for (const Kernels* kernels : tables) {
      SCOPED_TRACE(std::string(kernels->name) + ", seed " + std::to_string(seed) + ": " + attention.describe() +
                   (gradient.received ? " received" : ""));
      const std::vector<unsigned char> alone = run_gradient(*kernels, gradient, 1);
      check_gradient(*kernels, gradient, truth);
      if (::testing::Test::HasFatalFailure()) return;
      for (const int64_t threads : other_threads())
        ASSERT_TRUE(run_gradient(*kernels, gradient, threads) == alone) << "on " << threads << " threads";
    }
  }
}

class GeneratedGradient : public ::testing::TestWithParam<int> {};

TEST_P(GeneratedGradient, MatchesTheOracleOnAnyNumberOfThreads) {
  check_cases(GetParam(), case_count(), generate_gradient_case, gradient_kernels());
}

TEST_P(GeneratedGradient, WithEveryOptionOfAnEditMatchesTheOracle) {
  check_cases(GetParam(), case_count(), generate_edited_gradient_case, gradient_kernels());
}

INSTANTIATE_TEST_SUITE_P(Cases, GeneratedGradient, ::testing::Range(0, kParts));

// A device that is emulated, or watched by a sanitizer, runs a few cases only.
TEST(GradientCases, AFewHoldSomeOfEachKind) {
  int64_t wide = 0, capped = 0, received_windows = 0, normalized = 0, published = 0, exact = 0;
  for (uint64_t seed = 0; seed < 15; ++seed) {
    const AttentionCase attention = generate_gradient_case(seed);
    const bool received = for_received_attention(seed), boosted = attention.role == Role::rebalanced && !received;
    wide += attention.shape.width > 128;
    capped += attention.scoring.softcap > 0.0f;
    received_windows +=
        received && attention.visibility.window > 0 && attention.visibility.window < attention.shape.keys;
    normalized += boosted && attention.rule == Rule::row && attention.capacity > 0;
    published += boosted && attention.rule == Rule::none && attention.capacity > 0;
    exact += attention.dtype == DType::float32;
  }
  EXPECT_GE(wide, 2);
  EXPECT_GE(capped, 5);
  EXPECT_GE(received_windows, 1);
  EXPECT_GE(normalized, 1);
  EXPECT_GE(published, 1);
  EXPECT_GE(exact, 5);
}

class GradientEdges : public KernelTest {
 protected:
  const Kernels& kernels() const { return *GetParam(); }

  void expect_right(AttentionCase& attention, Random& random, bool received) {
    GradientCase gradient(attention, random, received);
    const GradientTruth truth = gradient_truth(gradient.problem());
    SCOPED_TRACE(attention.describe() + (received ? " received" : ""));
    run_gradient(kernels(), gradient, 2);
    check_gradient(kernels(), gradient, truth);
  }
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
    check_gradient(kernels(), gradient, truth);
    // The emulated device runs its threads in another order each time, and slowly.
    const int repeats = on_device(kernels()) ? 1 : 10;
    for (int repeat = 0; repeat < repeats; ++repeat) EXPECT_TRUE(run_gradient(kernels(), gradient, 8) == alone);
  }
}

// Rows in two chunks and in three, of several tiles on either side.
TEST_P(GradientEdges, WideRowsAreExact) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const auto& [width, value_width] : {std::pair<int64_t, int64_t>{200, 150}, {30, 270}})
      for (const bool received : {false, true}) {
        AttentionCase attention = simple_case({1, 2, 1, 40, 70, width, value_width}, dtype);
        attention.rule = width == 200 ? Rule::row : Rule::none;
        Random random(7);
        if (!received) add_outliers(attention, random, 5);
        expect_right(attention, random, received);
      }
}

// Scores of several times the cap, which hardly move, beside small ones.
TEST_P(GradientEdges, CappedScoresMoveLess) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const Role role : {Role::source, Role::rebalanced}) {
      AttentionCase attention = simple_case({1, 2, 1, 40, 70, 24, 16}, dtype);
      attention.role = role;
      attention.scoring.scale = 0.3f;
      attention.scoring.softcap = 0.8f;
      Random random(8);
      if (role == Role::rebalanced) add_outliers(attention, random, 5);
      expect_right(attention, random, role == Role::source);
    }
}

// Every query that sees a key counts for the mean of its column, the first and the last among them.
TEST_P(GradientEdges, ColumnMeansAreOverAllThatSeeTheKey) {
  for (const int64_t window : {1, 2, 7, 33}) {
    AttentionCase attention = simple_case({2, 2, 1, 50, 60, 16, 16});
    attention.visibility.window = window;
    if (window == 7) attention.key_start = {0, 21};
    if (window == 33) attention.key_end = {60, 47};
    Random random{uint64_t(window)};
    expect_right(attention, random, true);
  }
}

// The last sequence is padding alone: its rows begin and end behind the last key, where there is no column.
TEST_P(GradientEdges, ASequenceOfPaddingHasNoColumns) {
  AttentionCase attention = simple_case({2, 2, 1, 48, 48, 16, 16});
  attention.key_start = {3, 48};
  Random random(5);
  expect_right(attention, random, true);
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

// Keys that a mask or a bias hides from every query, amid others: NaN there changes no bit either, though the block
// holds keys that some queries see and others do not.
TEST_P(GradientEdges, WhatNoQuerySeesChangesNoBit) {
  if (on_device(kernels())) GTEST_SKIP() << "a device may sum such a block in another order";
  for (const bool received : {false, true}) {
    AttentionCase attention = simple_case({1, 4, 2, 70, 150, 24, 24});
    Random random(8);
    attention.mask = std::make_unique<bool[]>(70 * 150);
    attention.visibility.mask_strides[2] = 150;
    attention.visibility.mask_strides[3] = 1;
    for (int64_t i = 0; i < 70 * 150; ++i) attention.mask[size_t(i)] = i % 150 != 20 && random.chance(0.7);
    attention.bias_sizes[0] = attention.bias_sizes[1] = attention.bias_strides[2] = 1;
    attention.bias_sizes[2] = 150;
    attention.bias.assign(150, 0.5f);
    attention.bias[140] = -std::numeric_limits<float>::infinity();
    GradientCase gradient(attention, random, received);
    const std::vector<unsigned char> clean = run_gradient(kernels(), gradient, 2);
    for (const int64_t j : {20, 140})
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t d = 0; d < 24; ++d) {
          attention.key.set(0, h, j, d, kNaN);
          attention.value.set(0, h, j, d, kNaN);
        }
    EXPECT_TRUE(run_gradient(kernels(), gradient, 2) == clean);
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

// NaN in what one query brings, or in the gradient of its output, reaches the keys that it sees and no others.
TEST_P(GradientEdges, NaNOfOneQueryStaysWithItsKeys) {
  if (on_device(kernels())) GTEST_SKIP() << "a device may multiply what a row does not see by zero";
  for (const bool upstream : {false, true}) {
    AttentionCase attention = simple_case({1, 1, 1, 60, 60, 8, 8});
    Random random(9);
    GradientCase gradient(attention, random, false);
    gradient.grad_output.fill_uniform(random, 0.5, 1.0);
    for (int64_t d = 0; d < 8; ++d) (upstream ? gradient.grad_output : attention.query).set(0, 0, 20, d, kNaN);
    run_gradient(kernels(), gradient, 1);
    for (int64_t j = 0; j < 60; ++j) {
      EXPECT_EQ(std::isnan(gradient.grad_key.at(0, 0, j, 0)), j <= 20) << j;
      EXPECT_EQ(std::isnan(gradient.grad_value.at(0, 0, j, 0)), j <= 20) << j;
      EXPECT_EQ(std::isnan(gradient.grad_query.at(0, 0, j, 0)), j == 20) << j;
    }
  }
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

// On a device the status may stay unread, since reading it takes waiting. Gradients that depend on a broken row are
// NaN.
TEST_P(GradientEdges, BrokenOutlierRowsAreNaNWhereNothingCanBeRaised) {
  if (!on_device(kernels())) GTEST_SKIP() << "the CPU's kernels stop at a broken row";
  for (const Rule rule : {Rule::none, Rule::row})
    for (const bool count : {false, true}) {
      AttentionCase attention = simple_case({1, 2, 1, 20, 20, 8, 8});
      attention.rule = rule;
      Random random(9);
      add_outliers(attention, random, 3);
      GradientCase gradient(attention, random, false);
      constexpr int64_t kRow = 20 + 12;  // query 12 of head 1
      if (count) {
        attention.counts[kRow] = -1;
      } else {
        attention.counts[kRow] = 2;
        attention.indices[3 * kRow] = attention.indices[3 * kRow + 1] = 4;
      }
      gradient.grad_output.fill_uniform(random, 0.5, 1.0);
      ScratchLease scratch;
      EXPECT_NE(kernels().gradient(gradient.problem(), test_pool(1), *scratch), Status::ok);
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t i = 0; i < 20; ++i)
          EXPECT_EQ(std::isnan(gradient.grad_query.at(0, h, i, 0)), h == 1 && i == 12) << h << ", " << i;
      for (int64_t j = 0; j < 20; ++j) EXPECT_EQ(std::isnan(gradient.grad_key.at(0, 0, j, 0)), j <= 12) << j;
    }
}

INSTANTIATE_TEST_SUITE_P(Kernels, GradientEdges, ::testing::ValuesIn(gradient_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
