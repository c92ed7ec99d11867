// Attention against the oracle over generated cases. ATTNRB_TEST_CASES sets how many (3,000 unless set).
#include <cstdlib>

#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr int kParts = 8;  // so that the cases can be spread over processes

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return text == nullptr ? 3000 : std::atoll(text);
}

// Every kernel table gets the same cases, so agreement with the oracle is agreement with each other.
void check_cases(int part, int64_t count, AttentionCase (*generate)(uint64_t, const Rarities&),
                 const std::vector<const Kernels*>& tables) {
  int64_t ties = 0, outliers = 0;
  for (int64_t seed = part; seed < count; seed += kParts) {
    AttentionCase attention = generate(uint64_t(seed), {});
    const AttentionTruth truth = attention_truth(attention.problem());
    for (const Kernels* kernels : tables) {
      const Written alone = run_attention(*kernels, attention, 1);
      ASSERT_EQ(alone.status, Status::ok) << kernels->name << ", seed " << seed << ": " << attention.describe();
      ASSERT_TRUE(matches(*kernels, attention, truth, &ties))
          << kernels->name << ", seed " << seed << ": " << attention.describe();
      for (const int32_t count_of_row : attention.found_counts) outliers += count_of_row;
      for (const int64_t threads : other_threads())
        ASSERT_TRUE(run_attention(*kernels, attention, threads) == alone)
            << kernels->name << " on " << threads << " threads, seed " << seed << ": " << attention.describe();
    }
  }
  ::testing::Test::RecordProperty("outliers", std::to_string(outliers));
  ::testing::Test::RecordProperty("ties", std::to_string(ties));
  // Where ties are not rare, the comparison says nothing; a few are chance in a run of few cases.
  EXPECT_LE(ties, 3 + outliers / 1000) << ties << " entries near the threshold among " << outliers << " outliers";
}

class GeneratedAttention : public ::testing::TestWithParam<int> {};

TEST_P(GeneratedAttention, MatchesTheOracleOnAnyNumberOfThreads) {
  check_cases(GetParam(), case_count(), generate_case, tested_kernels());
}

TEST_P(GeneratedAttention, WithEveryOptionOfAnEditMatchesTheOracle) {
  check_cases(GetParam(), case_count() / 2, generate_edited_case, tested_kernels());
}

INSTANTIATE_TEST_SUITE_P(Cases, GeneratedAttention, ::testing::Range(0, kParts));

void check_received(int part, int64_t count, AttentionCase (*generate)(uint64_t, const Rarities&),
                    const std::vector<const Kernels*>& tables) {
  for (int64_t seed = part; seed < count; seed += kParts) {
    const AttentionCase attention = generate(uint64_t(seed), {});
    std::vector<float> received;
    const ReceivedProblem problem = attention.received_problem(received);
    const std::vector<Bounded> truth = received_truth(problem);
    for (const Kernels* kernels : tables) {
      const auto run = [&](int64_t threads) {
        received.assign(received.size(), -77.0f);
        ScratchLease scratch;
        kernels->received_attention(problem, test_pool(threads), *scratch);
      };
      run(1);
      const std::vector<float> alone = received;
      ASSERT_TRUE(numbers_match(*kernels, "received", received, truth))
          << kernels->name << ", seed " << seed << "; " << attention.describe();
      for (const int64_t threads : other_threads()) {
        run(threads);
        ASSERT_EQ(received, alone) << kernels->name << " on " << threads << " threads, seed " << seed;
      }
    }
  }
}

class GeneratedReceived : public ::testing::TestWithParam<int> {};

TEST_P(GeneratedReceived, MatchesTheOracleOnAnyNumberOfThreads) {
  check_received(GetParam(), case_count() / 4, generate_case, tested_kernels());
}

TEST_P(GeneratedReceived, WithEveryOptionOfAnEditMatchesTheOracle) {
  check_received(GetParam(), case_count() / 8, generate_edited_case, tested_kernels());
}

INSTANTIATE_TEST_SUITE_P(Cases, GeneratedReceived, ::testing::Range(0, kParts));

}  // namespace
}  // namespace attnrb::testing
