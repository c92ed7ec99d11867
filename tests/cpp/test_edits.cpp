// What edits do at their edges: nothing hidden reaches anything, removed keys are not seen, a row of outliers alone
// stays plain, and options that say the same give the same bits.
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "gradient_case.h"
#include "gradient_oracle.h"
#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Edits : public KernelTest {
 protected:
  const Kernels& kernels() const { return *GetParam(); }

  void expect_right(AttentionCase& attention) {
    const AttentionTruth truth = attention_truth(attention.problem());
    ASSERT_EQ(run_attention(kernels(), attention, 2).status, Status::ok);
    int64_t ties = 0;
    EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
  }

  // Nothing where a table has no backward.
  std::vector<unsigned char> run_gradient(GradientCase& gradient) {
    if (kernels().gradient == nullptr) return {};
    const GradientProblem problem = gradient.problem();
    ScratchLease scratch;
    EXPECT_EQ(kernels().gradient(problem, test_pool(2), *scratch), Status::ok);
    return gradient.written();
  }
};

class GradientEdits : public Edits {};

// A bias [1, 1, slots] for every key, or [1, H, slots].
void set_bias(AttentionCase& attention, int64_t slots, bool of_heads, Random& random) {
  const int64_t heads = of_heads ? attention.shape.heads : 1;
  attention.bias_sizes[0] = 1;
  attention.bias_sizes[1] = heads;
  attention.bias_sizes[2] = slots;
  attention.bias_strides[1] = of_heads ? slots : 0;
  attention.bias_strides[2] = 1;
  for (int64_t i = 0; i < heads * slots; ++i) attention.bias.push_back(float(random.uniform(-2.0, 2.0)));
}

// Decoding and many queries.
const Shape kShapes[] = {{1, 4, 2, 1, 700, 16, 16}, {1, 2, 1, 90, 300, 16, 16}};

TEST_P(Edits, BiasOfKeysThatNobodySeesReachesNothing) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      AttentionCase attention = simple_case(shape, dtype);
      Random random(11);
      attention.role = Role::source;
      attention.key_start = {70};
      attention.key_end = {shape.keys - 90};
      set_bias(attention, shape.keys + 40, true, random);
      const Written clean = run_attention(kernels(), attention, 2);
      for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t j = 0; j < shape.keys + 40; ++j)
          if (j < 70 || j >= shape.keys - 90) attention.bias[size_t(h * (shape.keys + 40) + j)] = kNaN;
      EXPECT_TRUE(run_attention(kernels(), attention, 2) == clean) << attention.describe();
      expect_right(attention);
    }
}

TEST_P(GradientEdits, BiasOfHiddenKeysReachesNoGradient) {
  for (const bool received : {false, true}) {
    AttentionCase attention = simple_case({2, 4, 2, 150, 150, 24, 24});
    Random random(12);
    attention.key_start = {0, 40};
    attention.key_end = {130, 150};
    set_bias(attention, 170, true, random);
    if (!received) {
      attention.rule = Rule::rest;
      add_outliers(attention, random, 5);
    }
    GradientCase gradient(attention, random, received);
    const std::vector<unsigned char> clean = run_gradient(gradient);
    for (int64_t h = 0; h < 4; ++h)
      for (int64_t j = 150; j < 170; ++j) attention.bias[size_t(h * 170 + j)] = kNaN;
    EXPECT_TRUE(run_gradient(gradient) == clean);
    for (int64_t h = 0; h < 4; ++h)
      for (int64_t j = 150; j < 170; ++j) EXPECT_EQ(gradient.grad_bias[size_t(h * 170 + j)], 0.0f);
  }
}

// Whatever a key holds that the bias removes, and its value, reaches nothing.
TEST_P(Edits, RemovedKeysAreNeverRead) {
  for (const Shape& shape : kShapes)
    for (const Rule rule : {Rule::none, Rule::rest}) {
      AttentionCase attention = simple_case(shape);
      Random random(13);
      attention.rule = rule;
      attention.role = Role::both;
      add_outliers(attention, random, 20);
      set_bias(attention, shape.keys, false, random);
      const auto removed = [&](int64_t j) { return j % 7 == 3 || (j > 100 && j < 230); };
      for (int64_t j = 0; j < shape.keys; ++j)
        if (removed(j)) attention.bias[size_t(j)] = -kInfinity;
      const AttentionTruth truth = attention_truth(attention.problem());
      GradientCase gradient(attention, random, false);
      const GradientTruth gradients = gradient_truth(gradient.problem());
      for (int64_t h = 0; h < shape.key_heads; ++h)
        for (int64_t j = 0; j < shape.keys; ++j)
          if (removed(j)) {
            attention.key.set(0, h, j, 3, double(kNaN));
            attention.value.set(0, h, j, 5, double(j % 2 ? kNaN : kInfinity));
          }
      run_gradient(gradient);
      if (kernels().gradient != nullptr) check_gradient(kernels(), gradient, gradients);
      ASSERT_EQ(run_attention(kernels(), attention, 2).status, Status::ok);
      int64_t ties = 0;
      EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
    }
}

TEST_P(Edits, RowsWhoseKeysAreAllRemovedAreRowsThatSeeNone) {
  for (const Shape& shape : kShapes)
    for (const int sinks_and_head : {0, 1, 2, 3}) {  // both heads have the same keys
      const bool sinks = sinks_and_head / 2 == 1;
      const int64_t head = sinks_and_head % 2;
      AttentionCase attention = simple_case(shape);
      Random random(14);
      attention.role = Role::both;
      attention.rule = Rule::rest;
      add_outliers(attention, random, 5);
      set_bias(attention, shape.keys, true, random);
      for (int64_t j = 0; j < shape.keys; ++j) attention.bias[size_t(head * shape.keys + j)] = -kInfinity;
      if (sinks) attention.sinks.assign(size_t(shape.heads), 0.5f);
      expect_right(attention);
      for (int64_t i = 0; i < shape.queries; ++i) {
        EXPECT_EQ(attention.lse[size_t(head * shape.queries + i)], -kInfinity);
        EXPECT_EQ(attention.found_counts[size_t(head * shape.queries + i)], 0);
        EXPECT_EQ(attention.output.at(0, head, i, 0), 0.0);
        EXPECT_NE(attention.output.at(0, 1 - head, i, 0), 0.0);
      }
    }
}

// The rows before the first query have no bias, so they see what it removes.
TEST_P(Edits, ARemovedKeyIsReceivedFromRowsWithoutABias) {
  for (const DType dtype : {DType::float32, DType::bfloat16}) {
    AttentionCase attention = simple_case({2, 4, 2, 150, 150, 16, 16}, dtype);
    Random random(19);
    set_bias(attention, 150, true, random);
    attention.first_query = {100, 61};
    for (int64_t at = 0; at < 4 * 150; at += 3) attention.bias[size_t(at)] = -kInfinity;
    ASSERT_TRUE(received_matches(kernels(), attention));
  }
}

// A bias is added to what the cap leaves of a score, so its gradient knows nothing of the cap.
TEST_P(GradientEdits, GradientOfABiasIsThatOfTheScoreBehindTheCap) {
  AttentionCase attention = simple_case({1, 4, 2, 60, 90, 16, 16});
  Random random(20);
  attention.scoring.softcap = 0.7f;  // near the scores
  set_bias(attention, 90, true, random);
  GradientCase gradient(attention, random, false);
  const GradientTruth truth = gradient_truth(gradient.problem());
  run_gradient(gradient);
  check_gradient(kernels(), gradient, truth);
}

// A key counts as seen by the rows before the first query alone, where the bias removes it from the rest.
TEST_P(GradientEdits, ARemovedKeyIsSharedAmongRowsWithoutABias) {
  AttentionCase attention = simple_case({2, 4, 2, 150, 150, 16, 16});
  Random random(21);
  set_bias(attention, 150, true, random);
  attention.first_query = {100, 61};
  for (int64_t at = 0; at < 4 * 150; at += 3) attention.bias[size_t(at)] = -kInfinity;
  GradientCase gradient(attention, random, true);
  const GradientTruth truth = gradient_truth(gradient.problem());
  run_gradient(gradient);
  check_gradient(kernels(), gradient, truth);
}

// What a sink holds is part of what outliers give to, or take from.
TEST_P(GradientEdits, ASinkIsOneOfTheOthers) {
  for (const bool shared : {false, true}) {
    AttentionCase attention = simple_case({1, 4, 2, 60, 90, 16, 16});
    Random random(22);
    attention.rule = Rule::rest;
    attention.shared_rows = shared;
    attention.sinks = {3.0f, 4.0f, 5.0f, -kInfinity};  // near a row's log-sum-exp, and above
    add_outliers(attention, random, 5);
    GradientCase gradient(attention, random, false);
    const GradientTruth truth = gradient_truth(gradient.problem());
    run_gradient(gradient);
    check_gradient(kernels(), gradient, truth);
  }
}

// Where outliers are all that a row sees, nothing can share, and the row stays plain.
TEST_P(Edits, ARowOfOutliersAloneStaysPlain) {
  for (const Shape& shape : kShapes) {
    AttentionCase attention = simple_case(shape);
    attention.visibility.causal = false;
    attention.key_start = {10};
    attention.key_end = {14};
    const AttentionTruth plain = attention_truth(attention.problem());
    attention.role = Role::rebalanced;
    attention.rule = Rule::rest;
    attention.shared_rows = true;
    attention.capacity = 5;
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (const int32_t slot : {10, 11, 12, 13, 14}) attention.indices.push_back(slot);
      attention.counts.push_back(5);
      attention.gain.push_back(-0.6f);
    }
    ASSERT_EQ(run_attention(kernels(), attention, 1).status, Status::ok);
    int64_t ties = 0;
    EXPECT_TRUE(matches(kernels(), attention, plain, &ties)) << attention.describe();
    Random random(15);
    GradientCase gradient(attention, random, false);
    run_gradient(gradient);
    if (kernels().gradient == nullptr) continue;
    for (const float each : gradient.grad_gain) EXPECT_EQ(each, 0.0f);
  }
}

// Nothing else in its block of keys comes near the threshold.
TEST_P(Edits, AnOutlierThatIsTakenOutIsFoundAllTheSame) {
  for (const Shape& shape : kShapes) {
    AttentionCase attention = simple_case(shape);
    attention.role = Role::both;
    attention.rule = Rule::rest;
    attention.scoring.scale = 0.25f;
    attention.threshold = 0.2;
    attention.shared_rows = true;
    attention.capacity = 1;
    for (int64_t h = 0; h < shape.heads; ++h) {
      attention.indices.push_back(100);
      attention.counts.push_back(1);
      attention.gain.push_back(0.5f);
      for (int64_t i = 0; i < shape.queries; ++i) attention.query.set(0, h, i, 0, 8.0);
    }
    for (int64_t h = 0; h < shape.key_heads; ++h)
      for (int64_t j = 0; j < shape.keys; ++j) attention.key.set(0, h, j, 0, j == 100 ? 8.0 : 0.0);
    expect_right(attention);
    for (int64_t row = 0; row < attention.rows(); ++row) EXPECT_EQ(attention.found_counts[size_t(row)], 1) << row;
  }
}

// One list for all queries is as many equal lists.
TEST_P(Edits, SharedListsAreEqualLists) {
  for (const Rule rule : {Rule::none, Rule::row, Rule::rest})
    for (const Shape& shape : kShapes) {
      AttentionCase attention = simple_case(shape);
      Random random(16);
      attention.role = Role::rebalanced;
      attention.rule = rule;
      attention.shared_rows = true;
      add_outliers(attention, random, 12);
      const Written shared = run_attention(kernels(), attention, 2);
      GradientCase gradient(attention, random, false);
      const std::vector<unsigned char> shared_gradient = run_gradient(gradient);
      std::vector<int32_t> indices, counts;
      for (int64_t row = 0; row < attention.rows(); ++row) {
        const int64_t list = row / shape.queries;
        counts.push_back(attention.counts[size_t(list)]);
        for (int64_t c = 0; c < 12; ++c) indices.push_back(attention.indices[size_t(12 * list + c)]);
      }
      attention.indices = indices;
      attention.counts = counts;
      attention.shared_rows = false;
      EXPECT_TRUE(run_gradient(gradient) == shared_gradient) << attention.describe();
      EXPECT_TRUE(run_attention(kernels(), attention, 2) == shared) << attention.describe();
    }
}

// Sequences with slots of their own are calls of their own.
TEST_P(Edits, EverySequenceMayBeginAtASlotOfItsOwn) {
  for (const int64_t queries : {1, 50}) {
    AttentionCase together = simple_case({3, 4, 2, queries, 130, 16, 16});
    together.role = Role::source;
    together.query_offsets = {130 - queries, 20, 90 - queries};
    together.visibility.chunk = 32;
    together.key_start = {5, 0, 40};
    expect_right(together);
    for (int64_t b = 0; b < 3; ++b) {
      AttentionCase alone = simple_case({1, 4, 2, queries, 130, 16, 16});
      alone.role = Role::source;
      alone.visibility.query_offset = together.query_offsets[size_t(b)];
      alone.visibility.chunk = 32;
      alone.key_start = {together.key_start[size_t(b)]};
      for (int64_t d = 0; d < 16; ++d) {
        for (int64_t h = 0; h < 4; ++h)
          for (int64_t i = 0; i < queries; ++i) alone.query.set(0, h, i, d, together.query.at(b, h, i, d));
        for (int64_t h = 0; h < 2; ++h)
          for (int64_t j = 0; j < 130; ++j) {
            alone.key.set(0, h, j, d, together.key.at(b, h, j, d));
            alone.value.set(0, h, j, d, together.value.at(b, h, j, d));
          }
      }
      run_attention(kernels(), alone, 1);
      const size_t rows = size_t(4 * queries);
      EXPECT_EQ(std::memcmp(alone.lse.data(), together.lse.data() + size_t(b) * rows, rows * sizeof(float)), 0);
      for (int64_t h = 0; h < 4; ++h)
        for (int64_t i = 0; i < queries; ++i)
          EXPECT_EQ(alone.output.at(0, h, i, 7), together.output.at(b, h, i, 7)) << b << ", " << h << ", " << i;
    }
  }
}

// Far below everything a key is removed in effect; where all keys are, the row has even weights and no NaN.
TEST_P(Edits, BiasesOfAnySizeGiveNumbers) {
  for (const Shape& shape : kShapes)
    for (const float size : {1e5f, 1e12f, 3e38f})
      for (const bool everywhere : {false, true}) {
        AttentionCase attention = simple_case(shape);
        Random random(17);
        set_bias(attention, shape.keys, false, random);
        for (int64_t j = 0; j < shape.keys; ++j)
          attention.bias[size_t(j)] = everywhere || j % 3 != 1 ? -size : j == 100 ? size : 0.0f;
        ASSERT_EQ(run_attention(kernels(), attention, 1).status, Status::ok);
        for (int64_t row = 0; row < attention.rows(); ++row) {
          EXPECT_TRUE(std::isfinite(attention.lse[size_t(row)])) << size;
          const int64_t h = row / shape.queries, i = row % shape.queries;
          const double got = attention.output.at(0, h, i, 0);
          EXPECT_LE(std::fabs(got), 2.0) << "values are between -2 and 2";
          const bool sees_largest = attention.visibility.query_offset + i >= 100;
          if (!everywhere && sees_largest) {
            EXPECT_NEAR(got, attention.value.at(0, h / (shape.heads / shape.key_heads), 100, 0), 0x1p-21);
          }
        }
      }
}

INSTANTIATE_TEST_SUITE_P(Kernels, Edits, ::testing::ValuesIn(tested_kernels()), kernel_name);
INSTANTIATE_TEST_SUITE_P(Kernels, GradientEdits, ::testing::ValuesIn(gradient_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
