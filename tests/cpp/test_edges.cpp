// What generated cases reach rarely or never: rows that see nothing, NaN and infinity, outlier rows that break the
// rules.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

Shape make_shape(int64_t batch, int64_t heads, int64_t key_heads, int64_t queries, int64_t keys, int64_t width) {
  return {batch, heads, key_heads, queries, keys, width, width};
}

class Edges : public KernelTest {
 protected:
  const Kernels& kernels() const { return *GetParam(); }
};

TEST_P(Edges, RowsThatSeeNothingAreZero) {
  for (const int64_t queries : {1, 3, 50})
    for (const bool with_sinks : {false, true}) {
      AttentionCase attention = simple_case(make_shape(2, 4, 2, queries, 60, 24));
      attention.role = Role::source;
      attention.key_start = {60, 0};  // the first batch element sees nothing at all
      if (with_sinks) attention.sinks = {0.5f, -1.0f, 2.0f, 0.0f};
      const AttentionTruth truth = attention_truth(attention.problem());
      run_attention(kernels(), attention, 2);
      for (int64_t row = 0; row < attention.rows() / 2; ++row) {
        EXPECT_EQ(attention.lse[size_t(row)], -kInfinity);
        EXPECT_EQ(attention.found_counts[size_t(row)], 0);
      }
      for (int64_t h = 0; h < 4; ++h)
        for (int64_t i = 0; i < queries; ++i)
          for (int64_t d = 0; d < 24; ++d) EXPECT_EQ(attention.output.at(0, h, i, d), 0.0);
      int64_t ties = 0;
      EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
    }
}

TEST_P(Edges, ExpandedOperandsAreReadThroughZeroStrides) {
  AttentionCase attention = simple_case(make_shape(3, 2, 2, 20, 70, 16));
  AttentionProblem problem = attention.problem();
  problem.key.strides[0] = problem.value.strides[0] = 0;
  problem.query.strides[1] = 0;
  const AttentionTruth truth = attention_truth(problem);
  ScratchLease scratch;
  ASSERT_EQ(kernels().attention(problem, test_pool(2), *scratch), Status::ok);
  int64_t ties = 0;
  EXPECT_TRUE(matches(kernels(), attention, truth, &ties));
}

// Blocks of rows may be larger there: several strips, the last of them cut short, over several blocks of keys.
TEST_P(Edges, FarMoreKeysThanQueries) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const Role role : {Role::source, Role::rebalanced}) {
      AttentionCase attention = simple_case({1, 2, 1, 141, 600, 20, 36}, dtype);
      attention.role = role;
      Random random(4);
      if (role == Role::rebalanced) add_outliers(attention, random, 9);
      const AttentionTruth truth = attention_truth(attention.problem());
      run_attention(kernels(), attention, 2);
      int64_t ties = 0;
      EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
    }
}

// Threads that are as many as key heads, or divide them, may take whole key heads; others may not. Rows of several
// heads and blocks, some of which see nothing of a block of keys, have the same bits either way.
TEST_P(Edges, WholeKeyHeadsAreTakenAsPartsAre) {
  for (const DType dtype : kDTypes)
    for (const Shape& shape : {make_shape(1, 8, 2, 50, 150, 16), make_shape(1, 8, 2, 150, 650, 40),
                               make_shape(2, 4, 1, 130, 400, 16), make_shape(1, 2, 2, 700, 700, 24)}) {
      AttentionCase attention = simple_case(shape, dtype);
      Random random(23);
      attention.role = Role::both;
      add_outliers(attention, random, 9);
      attention.visibility.window = shape.queries > 500 ? 150 : 0;
      attention.value.set(0, 0, shape.keys - 5, 1, kInfinity);
      const AttentionTruth truth = attention_truth(attention.problem());
      const Written alone = run_attention(kernels(), attention, 1);
      int64_t ties = 0;
      EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
      for (const int64_t threads : other_threads())
        EXPECT_TRUE(run_attention(kernels(), attention, threads) == alone) << threads << ": " << attention.describe();
    }
}

TEST_P(Edges, LargeScoresDoNotOverflow) {
  for (const int64_t queries : {1, 40}) {
    AttentionCase attention = simple_case(make_shape(1, 2, 1, queries, 90, 8));
    attention.role = Role::source;
    attention.scoring.scale = 1e4f;  // scores of some ten thousand either way
    const AttentionTruth truth = attention_truth(attention.problem());
    run_attention(kernels(), attention, 1);
    int64_t ties = 0;
    EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
  }
}

// The largest score so far is exceeded by far, or by little, in a later block of keys that all rows see.
TEST_P(Edges, ScoresMayRiseFromBlockToBlock) {
  for (const DType dtype : kDTypes)
    for (const Role role : {Role::source, Role::rebalanced})
      for (const double rise : {1.0, 20.0, 400.0}) {
        AttentionCase attention = simple_case(make_shape(1, 2, 1, 40, 1100, 8), dtype);
        attention.role = role;
        Random random(11);
        if (role == Role::rebalanced) add_outliers(attention, random, 9);
        // One component of every query is 1: of the keys it says by how much a block's scores lie above the first's.
        for (int64_t h = 0; h < 2; ++h)
          for (int64_t i = 0; i < 40; ++i) attention.query.set(0, h, i, 0, i % 3 == 0 ? 0.0 : 1.0);
        for (int64_t j = 0; j < 1100; ++j) attention.key.set(0, 0, j, 0, rise * double(j / 256));
        attention.scoring.scale = 1.0f;
        const AttentionTruth truth = attention_truth(attention.problem());
        run_attention(kernels(), attention, 2);
        int64_t ties = 0;
        EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe() << ", rise " << rise;
      }
}

TEST_P(Edges, RowsWithASinkMaySeeWholeBlocksOnly) {
  for (const DType dtype : kDTypes)
    for (const Role role : {Role::source, Role::rebalanced}) {
      AttentionCase attention = simple_case(make_shape(1, 2, 1, 40, 512, 8), dtype);
      attention.role = role;
      Random random(12);
      if (role == Role::rebalanced) add_outliers(attention, random, 9);
      attention.visibility.causal = false;
      attention.sinks = {0.5f, -1.0f};
      const AttentionTruth truth = attention_truth(attention.problem());
      run_attention(kernels(), attention, 2);
      int64_t ties = 0;
      EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
    }
}

TEST_P(Edges, SubnormalFloat16ValuesAreKept) {
  for (const int64_t queries : {1, 40}) {
    AttentionCase attention = simple_case(make_shape(1, 2, 1, queries, 90, 24), DType::float16);
    Random random(2);
    attention.value.fill_uniform(random, -0x1p-15, 0x1p-15);
    const AttentionTruth truth = attention_truth(attention.problem());
    run_attention(kernels(), attention, 1);
    int64_t ties = 0;
    EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
  }
}

constexpr int64_t kPoisonedKeys = 150, kPoisonedWidth = 24;

AttentionCase case_to_poison(DType dtype, int64_t queries, bool masked) {
  AttentionCase attention = simple_case(make_shape(2, 4, 2, queries, kPoisonedKeys, kPoisonedWidth), dtype);
  attention.role = queries % 2 ? Role::source : Role::plain;
  attention.visibility.window = 60;
  if (masked) {
    attention.mask = std::make_unique<bool[]>(size_t(queries * kPoisonedKeys));
    Random random(7);
    for (int64_t i = 0; i < queries * kPoisonedKeys; ++i) attention.mask[size_t(i)] = random.chance(0.5);
    attention.visibility.mask_strides[2] = kPoisonedKeys;
    attention.visibility.mask_strides[3] = 1;
  }
  return attention;
}

// How many elements of the output were compared with the clean truth, and how many had to be poisoned.
struct Counts {
  int64_t checked = 0, poisoned = 0;
};

void check_poison(const Kernels& kernels, AttentionCase& attention, const AttentionTruth& clean, char operand,
                  double poison, Counts& counts) {
  const int64_t queries = attention.shape.queries, key = kPoisonedKeys - 20, query = queries / 2, column = 5;
  Array& target = operand == 'q' ? attention.query : operand == 'k' ? attention.key : attention.value;
  const int64_t head = operand == 'q' ? 2 : 1, place = operand == 'q' ? query : key;
  const double before = target.at(1, head, place, column);
  target.set(1, head, place, column, poison);
  run_attention(kernels, attention, 2);
  target.set(1, head, place, column, before);
  for (int64_t row = 0; row < attention.rows(); ++row) {
    const int64_t b = row / queries / 4, h = row / queries % 4, i = row % queries;
    const bool sees = b == 1 && (operand == 'q' ? h == 2 && i == query
                                                : h / 2 == 1 && clean.visible[size_t(row * kPoisonedKeys + key)]);
    if (sees && operand != 'v') {
      if (std::isnan(poison)) {
        EXPECT_TRUE(std::isnan(attention.lse[size_t(row)]));
      }
    } else {
      ASSERT_TRUE(close(kernels, attention.lse[size_t(row)], clean.lse[size_t(row)])) << "row " << row;
    }
    for (int64_t d = 0; d < kPoisonedWidth; ++d) {
      const double got = attention.output.at(b, h, i, d);
      if (sees && (operand != 'v' || d == column)) {
        ++counts.poisoned;
        if (std::isnan(poison)) {
          ASSERT_TRUE(std::isnan(got)) << "row " << row << ", column " << d;
        }
        if (operand == 'v') {
          ASSERT_FALSE(std::isfinite(got)) << "row " << row << ", column " << d;
        }
        continue;
      }
      ++counts.checked;
      ASSERT_TRUE(close(kernels, got, clean.output[size_t(row * kPoisonedWidth + d)]))
          << "row " << row << ", column " << d << ": got " << got;
    }
  }
}

// Rounded by adding half a unit of bfloat16, a NaN whose bits are all ones would become a small number.
TEST(EdgesOfNumbers, NaNStaysNaNWhateverItsBits) {
  float poison;
  const uint32_t bits = 0x7fffffffu;
  std::memcpy(&poison, &bits, sizeof(poison));
  for (const Kernels* kernels : tested_kernels())
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      for (const int64_t queries : {1, 7, 70}) {
        AttentionCase attention = simple_case(make_shape(1, 2, 1, queries, 300, 24), dtype);
        attention.sinks = {poison, 0.5f};
        SCOPED_TRACE(std::string(kernels->name) + ", " + attention.describe());
        run_attention(*kernels, attention, 2);
        for (int64_t i = 0; i < queries; ++i) {
          EXPECT_TRUE(std::isnan(attention.lse[size_t(i)])) << i;
          EXPECT_FALSE(std::isnan(attention.lse[size_t(queries + i)])) << i;
          for (int64_t d = 0; d < 24; ++d) {
            EXPECT_TRUE(std::isnan(attention.output.at(0, 0, i, d))) << i;
            EXPECT_FALSE(std::isnan(attention.output.at(0, 1, i, d))) << i;
          }
        }
      }
}

TEST_P(Edges, PoisonReachesOnlyTheRowsThatSeeIt) {
  Counts counts;
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const int64_t queries : {1, 3, 40, 130})
      for (const bool masked : {false, true}) {
        AttentionCase attention = case_to_poison(dtype, queries, masked);
        const AttentionTruth clean = attention_truth(attention.problem());
        for (const char operand : {'q', 'k', 'v'})
          for (const double poison : {kNaN, kInfinity, -kInfinity}) {
            SCOPED_TRACE(std::string(1, operand) + " = " + std::to_string(poison) + ", " + attention.describe());
            check_poison(kernels(), attention, clean, operand, poison, counts);
            if (HasFatalFailure()) return;
          }
      }
  EXPECT_GT(counts.checked, 100000);
  EXPECT_GT(counts.poisoned, 1000);
}

// A key that a mask hides from every query, amid others: few queries and many.
TEST_P(Edges, WhatNoQuerySeesChangesNoBit) {
  if (on_device(kernels())) GTEST_SKIP() << "a device may sum such a block in another order";
  for (const int64_t queries : {1, 3, 40}) {
    AttentionCase attention = simple_case(make_shape(1, 4, 2, queries, 150, 24));
    Random random{uint64_t(queries)};
    attention.mask = std::make_unique<bool[]>(size_t(queries * 150));
    attention.visibility.mask_strides[2] = 150;
    attention.visibility.mask_strides[3] = 1;
    for (int64_t i = 0; i < queries * 150; ++i) attention.mask[size_t(i)] = i % 150 != 20 && random.chance(0.7);
    const Written clean = run_attention(kernels(), attention, 1);
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t d = 0; d < 24; ++d) {
        attention.key.set(0, h, 20, d, kNaN);
        attention.value.set(0, h, 20, d, kNaN);
      }
    EXPECT_TRUE(run_attention(kernels(), attention, 1) == clean) << queries << " queries";
  }
}

TEST_P(Edges, PoisonReachesOnlyTheKeysThatPoisonedRowsSee) {
  constexpr int64_t kQueries = 100, kKeys = 100, kWidth = 16;
  for (const char operand : {'q', 'k'})
    for (const double poison : {kNaN, kInfinity}) {
      AttentionCase attention = simple_case(make_shape(1, 2, 1, kQueries, kKeys, kWidth));
      attention.visibility.window = 30;
      std::vector<float> received;
      ReceivedProblem problem = attention.received_problem(received);
      const std::vector<Bounded> clean = received_truth(problem);
      if (operand == 'q') attention.query.set(0, 1, 50, 3, poison);
      if (operand == 'k') attention.key.set(0, 0, 50, 3, poison);
      ScratchLease scratch;
      kernels().received_attention(problem, test_pool(2), *scratch);
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t j = 0; j < kKeys; ++j) {
          // A poisoned row is one that sees key 50, or query 50 itself; it sees the 30 keys up to its own.
          bool reached = false;
          for (int64_t i = j; i < kQueries && i < j + 30; ++i)
            reached = reached || (operand == 'q' ? h == 1 && i == 50 : i >= 50 && i < 80);
          if (reached) continue;
          EXPECT_TRUE(close(kernels(), received[size_t(h * kKeys + j)], clean[size_t(h * kKeys + j)]))
              << operand << " = " << poison << ", head " << h << ", key " << j << ": got "
              << received[size_t(h * kKeys + j)] << ", expected " << clean[size_t(h * kKeys + j)].value;
        }
    }
}

TEST_P(Edges, SlotsThatAreNotCachedArePassedOver) {
  for (const int64_t queries : {1, 30}) {
    AttentionCase attention = simple_case(make_shape(1, 2, 1, queries, 40, 16));
    attention.visibility.key_offset = 1000;
    attention.visibility.query_offset += 1000;
    attention.role = Role::rebalanced;
    attention.capacity = 6;
    attention.gain = {0.5f, -0.25f};
    for (int64_t row = 0; row < attention.rows(); ++row) {
      const int32_t slots[] = {std::numeric_limits<int32_t>::min(), -1, 999, 1003, 1040,
                               std::numeric_limits<int32_t>::max()};
      attention.indices.insert(attention.indices.end(), slots, slots + 6);
      attention.counts.push_back(6);
    }
    const AttentionTruth truth = attention_truth(attention.problem());
    ASSERT_EQ(run_attention(kernels(), attention, 1).status, Status::ok);
    int64_t ties = 0;
    EXPECT_TRUE(matches(kernels(), attention, truth, &ties));
  }
}

TEST_P(Edges, BrokenOutlierRowsAreReported) {
  struct Broken {
    std::vector<int32_t> slots;
    int32_t count;
    Status expected;
  };
  const Broken rows[] = {{{3, 2, 5}, 3, Status::unsorted_outliers},
                         {{3, 3, 5}, 3, Status::unsorted_outliers},
                         {{3, 590, 300}, 3, Status::unsorted_outliers},  // of two blocks of keys
                         {{3, 900, 800}, 3, Status::unsorted_outliers},  // behind all keys
                         {{-7, -9, 599}, 3, Status::unsorted_outliers},  // before all keys
                         {{800, 900, 850}, 3, Status::unsorted_outliers},
                         {{-7, 599, 800}, 3, Status::ok},
                         {{1, 2, 3}, 4, Status::outlier_count},
                         {{1, 2, 3}, -1, Status::outlier_count},
                         {{1, 2, 0}, 2, Status::ok},
                         {{-1, -1, -1}, 0, Status::ok}};
  for (const DType dtype : kDTypes)
    for (const int64_t queries : {1, 30, 32})  // the last row alone, behind rows that are absorbed at once, among them
      for (const float gain : {0.5f, 0.0f})
        for (const Broken& broken : rows) {
          AttentionCase attention = simple_case(make_shape(1, 2, 2, queries, 600, 16), dtype);
          attention.role = Role::rebalanced;
          attention.capacity = 3;
          attention.gain = {gain, gain};
          attention.indices.assign(size_t(attention.rows() * 3), -1);
          attention.counts.assign(size_t(attention.rows()), 0);
          std::copy(broken.slots.begin(), broken.slots.end(), attention.indices.end() - 3);
          attention.counts.back() = broken.count;
          EXPECT_EQ(run_attention(kernels(), attention, 2).status, broken.expected)
              << "slots from " << broken.slots[0] << ", gain " << gain << ", " << queries << " queries";
        }
}

// Rows that are absorbed at once read their slots in parts, and ask of each whether it ascends from the one before.
TEST_P(Edges, ManySlotsAreReportedWhereverTheyBreak) {
  constexpr int64_t kSlots = 40;
  constexpr int32_t kLast = std::numeric_limits<int32_t>::max();
  for (const int32_t first : {0, 300, 1000, -1000})  // among the keys, leaving them, behind and before all of them
    for (const size_t at : {0, 1, 14, 15, 16, 17, 30, 31, 32, 33, 39})
      for (const bool last : {false, true}) {
        AttentionCase attention = simple_case(make_shape(1, 1, 1, 32, 600, 16), DType::bfloat16);
        attention.role = Role::rebalanced;
        attention.capacity = kSlots;
        attention.gain = {0.5f};
        for (int64_t i = 0; i < attention.rows() * kSlots; ++i)
          attention.indices.push_back(first + int32_t(i % kSlots) * 10);
        attention.counts.assign(size_t(attention.rows()), int32_t(kSlots));
        int32_t* row = attention.indices.data() + 20 * kSlots;
        Status expected = at == 0 ? Status::ok : Status::unsorted_outliers;
        if (last) {  // the largest slot of all, over and over, or once at the end
          std::fill(row + at, row + kSlots, kLast);
          expected = at == kSlots - 1 ? Status::ok : Status::unsorted_outliers;
        } else if (at > 0) {
          row[at] = row[at - 1];
        }
        EXPECT_EQ(run_attention(kernels(), attention, 2).status, expected)
            << "slots from " << first << ", broken at " << at << ", the largest of all: " << last;
      }
}

TEST_P(Edges, EvenWeightsOnTheThresholdFillTheRowAtMost) {
  // A hundred equal weights, each the threshold as far as float32 can tell: any may fall either way, none may overflow.
  for (const DType dtype : kDTypes)
    for (const int64_t queries : {1, 20}) {
      AttentionCase attention = simple_case(make_shape(1, 1, 1, queries, 100, 4), dtype);
      attention.role = Role::source;
      attention.visibility.causal = false;
      attention.visibility.query_offset = 500;
      attention.scoring.scale = 0.0f;
      const AttentionTruth truth = attention_truth(attention.problem());
      run_attention(kernels(), attention, 1);
      int64_t ties = 0;
      EXPECT_TRUE(matches(kernels(), attention, truth, &ties));
      EXPECT_EQ(ties, 100 * queries);
    }
}

TEST_P(Edges, WideRowsAreExact) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const Role role : {Role::source, Role::rebalanced})
      for (const auto& [width, value_width] : {std::pair<int64_t, int64_t>{200, 300}, {250, 70}, {16, 600}}) {
        AttentionCase attention = simple_case({1, 2, 1, 20, 70, width, value_width}, dtype);
        attention.role = role;
        Random random{uint64_t(width)};
        if (role == Role::rebalanced) add_outliers(attention, random, 5);
        const AttentionTruth truth = attention_truth(attention.problem());
        run_attention(kernels(), attention, 2);
        int64_t ties = 0;
        EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
      }
}

TEST_P(Edges, ReceivedAttentionOfWideRowsIsExact) {
  for (const DType dtype : {DType::float32, DType::float16})
    EXPECT_TRUE(received_matches(kernels(), simple_case(make_shape(1, 2, 1, 150, 150, 250), dtype)));
}

// Queries that are taken together, of which the first end before a block of keys that the last ones see.
TEST_P(Edges, ReceivedAttentionOfRowsThatEndBeforeABlockIsExact) {
  EXPECT_TRUE(received_matches(kernels(), simple_case(make_shape(1, 2, 1, 100, 300, 16))));
}

// A normalised row of one key is the key's value, whatever its gain.
TEST_P(Edges, AStrengthenedRowOfOneKeyIsExact) {
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    AttentionCase attention = simple_case(make_shape(1, 2, 1, 40, 40, 16), dtype);
    attention.role = Role::rebalanced;
    attention.visibility.window = 1;
    attention.rule = Rule::row;
    attention.capacity = 1;
    for (int64_t row = 0; row < attention.rows(); ++row) attention.indices.push_back(int32_t(row % 40));
    attention.counts.assign(size_t(attention.rows()), 1);
    attention.gain = {0.0038f, 0.00048f};  // just short of halfway between 1 and the next number of each type
    run_attention(kernels(), attention, 1);
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t i = 0; i < 40; ++i)
        for (int64_t d = 0; d < 16; ++d)
          EXPECT_EQ(attention.output.at(0, h, i, d), attention.value.at(0, 0, i, d)) << h << ", " << i << ", " << d;
  }
}

// Outliers anywhere in tens of thousands of keys.
TEST_P(Edges, RowsOfManyKeysAreExact) {
  AttentionCase attention = simple_case(make_shape(1, 2, 1, 3, 40000, 8));
  attention.role = Role::source;
  attention.threshold = 0.001;
  attention.scoring.scale = 0.7f;
  const AttentionTruth truth = attention_truth(attention.problem());
  run_attention(kernels(), attention, 2);
  int64_t ties = 0, outliers = 0;
  EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << attention.describe();
  for (const int32_t count : attention.found_counts) outliers += count;
  EXPECT_GT(outliers, 100);
  EXPECT_LT(ties * 20, outliers);
}

TEST_P(Edges, ScratchGrowsAndIsReused) {
  Scratch scratch;
  int64_t ties = 0;
  for (const int64_t keys : {5, 300, 40, 700}) {
    AttentionCase attention = simple_case(make_shape(2, 4, 2, 5, keys, 20));
    attention.role = Role::source;
    const AttentionProblem problem = attention.problem();
    const AttentionTruth truth = attention_truth(problem);
    ASSERT_EQ(kernels().attention(problem, test_pool(3), scratch), Status::ok);
    EXPECT_TRUE(matches(kernels(), attention, truth, &ties)) << keys << " keys";
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, Edges, ::testing::ValuesIn(tested_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
