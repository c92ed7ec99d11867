// The emulated device itself: what it must catch, and fragment layouts against plain products.
#include <gtest/gtest.h>

#include <vector>

#include "emulation.h"

namespace attnrb::cuda {
namespace {

struct Nothing {};

void stop_half_a_warp(const Nothing&) {
  if (thread_index() % 32 < 16) any(true);
}
void meet_at_different_places(const Nothing&) {
  if (thread_index() % 2 == 0)
    any(true);
  else
    any(false);
}
void leave_before_the_barrier(const Nothing&) {
  if (thread_index() != 3) block_sync();
}
void write_past_the_end(const Nothing&) { shared_memory()[64 + thread_index()] = 1; }
void write_before_the_begin(const Nothing&) { shared_memory()[-1 - thread_index()] = 1; }
void copy_past_the_end(const Nothing&) {
  static const uint64_t source[2] = {};
  copy_async(shared_memory() + 64, source, true);
  wait_for_copies();
}
void copy_and_forget(const Nothing&) {
  alignas(16) static const uint64_t source[2] = {};
  copy_async(shared_memory(), source, true);
}
void copy_and_wait_without_a_commit(const Nothing&) {
  alignas(16) static const uint64_t source[2] = {};
  copy_async(shared_memory(), source, true);
  wait_for_copies();
}

TEST(EmulationDeathTest, StopsKernelsThatBreakTheRules) {
  EXPECT_DEATH((launch<stop_half_a_warp>(1, 32, 64, nullptr, Nothing())), "divergent warp: 16 of 32 lanes");
  EXPECT_DEATH((launch<meet_at_different_places>(1, 32, 64, nullptr, Nothing())), "divergent warp: one lane");
  EXPECT_DEATH((launch<leave_before_the_barrier>(1, 64, 64, nullptr, Nothing())), "divergent block: 63 of 64");
  EXPECT_DEATH((launch<write_past_the_end>(1, 32, 64, nullptr, Nothing())), "");
  EXPECT_DEATH((launch<write_before_the_begin>(1, 32, 64, nullptr, Nothing())), "before its begin");
  EXPECT_DEATH((launch<copy_past_the_end>(1, 32, 64, nullptr, Nothing())), "outside shared memory");
  EXPECT_DEATH((launch<copy_and_forget>(1, 32, 64, nullptr, Nothing())), "never waited for");
  EXPECT_DEATH((launch<copy_and_wait_without_a_commit>(1, 32, 64, nullptr, Nothing())), "never waited for");
}

struct Counts {
  std::vector<int>* values;
  int64_t blocks;
};

void add_up_without_a_barrier(const Counts& counts) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[thread_index()] = thread_index();
  any(true);
  if (thread_index() != 0) return;
  int sum = 0;
  for (int thread = 0; thread < 128; ++thread) sum += shared[thread];
  (*counts.values)[size_t(block_index())] = sum;
}

TEST(Emulation, ShowsAMissingBarrier) {
  std::vector<int> sums(50);
  launch<add_up_without_a_barrier>(50, 128, 512, nullptr, Counts{&sums, 50});
  int wrong = 0;
  for (const int sum : sums) wrong += sum != 127 * 128 / 2;
  EXPECT_GT(wrong, 5);  // about half of them are, by chance
}

struct CopyCheck {
  const float* source;
  bool* hidden;
};

void read_before_and_after_the_wait(const CopyCheck& check) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + 4 * thread_index();
  copy_async(shared, check.source, true);
  commit_copies();
  if (shared[0] == shared[0]) *check.hidden = false;
  wait_for_copies();
  if (shared[3] != check.source[3]) *check.hidden = false;
}

TEST(Emulation, HidesCopiesUntilTheyAreWaitedFor) {
  alignas(16) const float source[4] = {1, 2, 3, 4};
  bool hidden = true;
  launch<read_before_and_after_the_wait>(2, 64, 64 * 16, nullptr, CopyCheck{source, &hidden});
  EXPECT_TRUE(hidden);
}

void wait_for_all_but_the_last(const CopyCheck& check) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + 8 * thread_index();
  copy_async(shared, check.source, true);
  commit_copies();
  copy_async(shared + 4, check.source, true);
  commit_copies();
  wait_for_copies_before_last();
  if (shared[3] != check.source[3] || shared[4] == shared[4]) *check.hidden = false;
  // A group may be empty.
  commit_copies();
  wait_for_copies_before_last();
  if (shared[4] != check.source[0]) *check.hidden = false;
}

TEST(Emulation, WaitsForGroupsOfCopiesInTheirOrder) {
  alignas(16) const float source[4] = {1, 2, 3, 4};
  bool hidden = true;
  launch<wait_for_all_but_the_last>(2, 64, 64 * 32, nullptr, CopyCheck{source, &hidden});
  EXPECT_TRUE(hidden);
}

struct Tally {
  int32_t* counts;
  unsigned* same;
};

void count_remainders(const Tally& tally) {
  const int remainder = thread_index() % 5;
  const unsigned same = match_any(remainder);
  if (block_index() == 0 && thread_index() < 32) tally.same[thread_index()] = same;
  atomic_add(tally.counts + remainder, 1);
}

TEST(Emulation, MatchesLanesAndAddsUp) {
  int32_t counts[5] = {};
  unsigned same[32];
  launch<count_remainders>(3, 64, 64, nullptr, Tally{counts, same});
  for (int remainder = 0; remainder < 5; ++remainder) EXPECT_EQ(counts[remainder], 3 * (remainder < 4 ? 13 : 12));
  for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(same[lane], (lane % 5 < 2 ? 0x42108421u : 0x2108421u) << lane % 5);
}

// One product of 16 x 16 by 16 x 8 float16 numbers through ldmatrix and mma, as the kernels chain them.
struct ProductCheck {
  const float16 *a, *b;  // [16, 16]; [16, 8] in rows
  float* c;              // [16, 8]
};

void multiply_through_fragments(const ProductCheck& check) {
  float16* a = reinterpret_cast<float16*>(shared_memory());
  float16* b = a + 16 * 16;  // rows of 16, the upper eight columns unused
  for (int i = thread_index(); i < 256; i += 32) {
    a[i] = check.a[i];
    b[i] = i % 16 < 8 ? check.b[i / 16 * 8 + i % 16] : float16{0};
  }
  block_sync();
  const int lane = thread_index();
  uint32_t left[4], right[4];
  load_matrices(left, a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(right, b + lane % 16 * 16 + lane / 16 * 8);
  float c[4] = {};
  multiply_float16(c, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) check.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

TEST(Emulation, MultipliesThroughFragments) {
  float16 a[256], b[128];
  for (int i = 0; i < 256; ++i) a[i] = from_float<float16>(float(i * 37 % 61 - 30));
  for (int i = 0; i < 128; ++i) b[i] = from_float<float16>(float(i * 53 % 47 - 20));
  float c[128];
  launch<multiply_through_fragments>(1, 32, 1024, nullptr, ProductCheck{a, b, c});
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float expected = 0.0f;
      for (int k = 0; k < 16; ++k) expected += to_float(a[row * 16 + k]) * to_float(b[k * 8 + column]);
      EXPECT_EQ(c[row * 8 + column], expected) << row << ", " << column;
    }
}

}  // namespace
}  // namespace attnrb::cuda
