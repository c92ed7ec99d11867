// The sparse part beside a dense kernel of another library, on the emulated device or a real one. In that kernel's
// place stands our own plain attention, whose results are spoilt in some rows, as others spoil theirs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "runner.h"
#include "sparse.h"
#include "sparse_cases.h"
#include "table.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

// The dense part of `problem`: its output in place, its log-sum-exp with rows padded as some kernels leave them.
struct DensePart {
  explicit DensePart(const AttentionProblem& problem) {
    const Shape& shape = problem.shape;
    AttentionProblem plain = problem;
    std::vector<float> rows(size_t(shape.batch * shape.heads * shape.queries));
    plain.lse = rows.data();
    plain.emit = {};
    plain.edit = {};
    ScratchLease scratch;
    emulated_cuda_kernels.attention(plain, test_pool(1), *scratch);
    const int64_t padded = (shape.queries + 31) / 32 * 32;
    strides[0] = shape.heads * padded;
    strides[1] = padded;
    strides[2] = 1;
    lse.assign(size_t(shape.batch * shape.heads * padded), std::numeric_limits<float>::quiet_NaN());
    for (size_t row = 0; row < rows.size(); ++row)
      lse[row / size_t(shape.queries) * size_t(padded) + row % size_t(shape.queries)] = rows[row];
  }

  // What a value that is not finite leaves in a row which does not see it.
  void spoil(AttentionCase& attention, int64_t batch, int64_t head, int64_t query, int64_t column) {
    attention.output.set(
        batch, head, query, column,
        column % 2 == 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity());
    lse[size_t(batch * strides[0] + head * strides[1] + query)] = std::numeric_limits<float>::infinity();
  }

  // Puts the output elsewhere, in a layout of its own.
  void move(AttentionCase& attention, Random& random) {
    const Sizes& sizes = attention.output.sizes();
    elsewhere = aligned_array(attention.dtype, sizes, random);
    for (int64_t b = 0; b < sizes[0]; ++b)
      for (int64_t h = 0; h < sizes[1]; ++h)
        for (int64_t i = 0; i < sizes[2]; ++i)
          for (int64_t d = 0; d < sizes[3]; ++d) elsewhere.set(b, h, i, d, attention.output.at(b, h, i, d));
    attention.output.fill_sentinel();
    moved = true;
  }

  cuda::DensePart part(const AttentionProblem& problem) const {
    const int64_t* of_output = problem.output_strides;
    const View in_place{problem.output, {of_output[0], of_output[1], of_output[2], 1}};
    return {moved ? elsewhere.view() : in_place, lse.data(), {strides[0], strides[1], strides[2]}};
  }

  std::vector<float> lse;
  int64_t strides[3];
  Array elsewhere;
  bool moved = false;
};

Status add_sparse_part(const AttentionProblem& problem, const DensePart& dense) {
  return attnrb::add_sparse_part(problem, dense.part(problem));
}

// What the two parts are to give together: y = (dense + g sum of A_ij v_j) / z. The dense part may be wrong by what
// plain attention may be, its rounding included, which is then divided by z; the rest by what Note: [Error bounds]
// says, since |g| <= 1 + g here.
AttentionTruth truth_of_parts(const AttentionProblem& problem) {
  AttentionTruth truth = attention_truth(problem);
  if (problem.edit.indices == nullptr) return truth;
  AttentionProblem plain = problem;
  plain.edit = {};
  const AttentionTruth dense = attention_truth(plain);
  for (size_t i = 0; i < truth.output.size(); ++i) {
    const size_t row = i / size_t(problem.shape.value_width);
    const double z = std::exp(truth.lse[row].value - dense.lse[row].value);
    truth.output[i].cuda_tolerance += dense.output[i].cuda_tolerance / z;
  }
  return truth;
}

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return text == nullptr ? 100 : std::atoll(text) / 4;
}

constexpr int kParts = 8;  // so that the cases can be spread over processes

class GeneratedSparsePart : public ::testing::TestWithParam<int> {};

TEST_P(GeneratedSparsePart, MatchesTheOracleWhateverTheDensePartSpoilt) {
  int64_t ties = 0;
  for (int64_t seed = GetParam(); seed < case_count(); seed += kParts) {
    Random random{uint64_t(seed)};
    AttentionCase attention = sparse_case(random, 256);
    const AttentionProblem problem = attention.problem();
    ASSERT_TRUE(cuda::sparse_suits(problem)) << attention.describe();
    DensePart dense(problem);
    const Shape& shape = attention.shape;
    for (int spoilt = int(random.pick<int64_t>({0, 0, 1, 5})); spoilt > 0; --spoilt)
      dense.spoil(attention, random.integer(0, shape.batch - 1), random.integer(0, shape.heads - 1),
                  random.integer(0, shape.queries - 1), random.integer(0, shape.width - 1));
    if (problem.edit.indices != nullptr && random.chance(0.6)) {
      dense.move(attention, random);
      ASSERT_TRUE(cuda::dense_suits(problem, dense.elsewhere.view()));
    }
    ASSERT_EQ(add_sparse_part(problem, dense), Status::ok) << attention.describe();
    ASSERT_TRUE(matches(emulated_cuda_kernels, attention, truth_of_parts(problem), &ties))
        << "seed " << seed << ": " << attention.describe();
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, GeneratedSparsePart, ::testing::Range(0, kParts));

TEST(SparsePart, LeavesRowsThatAreNotInDoubtAlone) {
  // A dense part that is wrong but finite shows which rows were done anew: those, and no others of their tiles.
  AttentionCase attention = simple_case({2, 4, 2, 100, 100, 32, 32}, DType::bfloat16);
  attention.role = Role::source;
  const AttentionProblem problem = attention.problem();
  DensePart dense(problem);
  const auto every_row = [&](auto&& visit) {
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t h = 0; h < 4; ++h)
        for (int64_t i = 0; i < 100; ++i) visit(b, h, i);
  };
  every_row([&](int64_t b, int64_t h, int64_t i) { attention.output.set(b, h, i, 3, 17.0); });
  // The last row of a tile of one head, the first of a tile of another, one inside.
  const int64_t rows[3][3] = {{1, 3, 31}, {0, 0, 32}, {1, 1, 77}};
  for (const auto& row : rows) dense.spoil(attention, row[0], row[1], row[2], 30);
  ASSERT_EQ(add_sparse_part(problem, dense), Status::ok);
  every_row([&](int64_t b, int64_t h, int64_t i) {
    bool spoilt = false;
    for (const auto& row : rows) spoilt = spoilt || (b == row[0] && h == row[1] && i == row[2]);
    EXPECT_EQ(attention.output.at(b, h, i, 3) == 17.0, !spoilt) << b << ", " << h << ", " << i;
  });
}

TEST(SparsePart, MakesRowsOfBrokenOutliersNaN) {
  for (const bool unsorted : {false, true}) {
    AttentionCase attention = simple_case({1, 2, 1, 70, 70, 64, 64}, DType::float16);
    Random random(5);
    add_outliers(attention, random, 6);
    const size_t row = 70 + 33;
    attention.counts[row] = unsorted ? 3 : 7;
    for (size_t c = 0; c < 3; ++c) attention.indices[6 * row + c] = c == 1 ? 9 : 12;
    const AttentionProblem problem = attention.problem();
    const DensePart dense(problem);
    EXPECT_EQ(add_sparse_part(problem, dense), unsorted ? Status::unsorted_outliers : Status::outlier_count);
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t i = 0; i < 70; ++i)
        for (int64_t d = 0; d < 64; ++d)
          ASSERT_EQ(std::isnan(attention.output.at(0, h, i, d)), size_t(70 * h + i) == row) << h << ", " << i;
  }
}

TEST(SparsePart, TakesOnlyWhatAnyLibraryComputes) {
  const auto suits = [](auto&& change) {
    AttentionCase attention = simple_case({1, 2, 1, 16, 16, 64, 64}, DType::bfloat16);
    attention.role = Role::source;
    AttentionProblem problem = attention.problem();
    change(problem);
    return cuda::sparse_suits(problem);
  };
  const float sink = 0.0f;
  const int64_t slot = 0;
  const bool seen = true;
  EXPECT_TRUE(suits([](AttentionProblem&) {}));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.dtype = DType::float32; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.scoring.scale = -p.scoring.scale; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.scoring.scale = 0.0f; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.scoring.softcap = 5.0f; }));
  EXPECT_FALSE(suits([&](AttentionProblem& p) { p.scoring.sinks = &sink; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.visibility.window = 4; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.visibility.query_offset = 1; }));
  EXPECT_FALSE(suits([&](AttentionProblem& p) { p.visibility.key_start = &slot; }));
  EXPECT_FALSE(suits([&](AttentionProblem& p) { p.visibility.key_end = &slot; }));
  EXPECT_FALSE(suits([&](AttentionProblem& p) { p.visibility.mask = &seen; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.shape.value_width = 32; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.query.strides[2] += 1; }));
  EXPECT_FALSE(suits([](AttentionProblem& p) { p.shape.batch = 65536; }));
}

}  // namespace
}  // namespace attnrb::testing
