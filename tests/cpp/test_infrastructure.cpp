// Scratch memory, thread pool, dispatch and the outlier capacity.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/kernels.h"
#include "core/outliers.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

TEST(AlignedBuffer, IsAlignedAndOnlyGrows) {
  AlignedBuffer buffer;
  EXPECT_EQ(buffer.capacity(), 0u);
  for (const size_t bytes : {1u, 63u, 64u, 65u, 100000u}) {
    void* data = buffer.reserve(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
    EXPECT_GE(buffer.capacity(), bytes);
    std::memset(data, 1, bytes);
  }
  const size_t capacity = buffer.capacity();
  void* data = buffer.reserve(capacity);
  EXPECT_EQ(buffer.reserve(10), data);
  EXPECT_EQ(buffer.capacity(), capacity);
}

TEST(AlignedBuffer, MovesItsBlock) {
  AlignedBuffer first;
  void* data = first.reserve(100);
  AlignedBuffer second(std::move(first));
  EXPECT_EQ(second.reserve(100), data);
  AlignedBuffer third;
  third.reserve(10);
  third = std::move(second);
  EXPECT_EQ(third.reserve(100), data);
}

TEST(ScratchLease, ConcurrentCallsGetDifferentOnesAndReleaseFreesIdleOnes) {
  release_scratch();
  EXPECT_EQ(scratch_bytes(), 0u);
  {
    ScratchLease first, second;
    EXPECT_NE(&*first, &*second);
    (*first).shared.reserve(1000);
    (*second).reserve_workers(2, 2500);
    EXPECT_EQ(scratch_bytes(), 0u) << "what is lent is not idle";
  }
  EXPECT_GE(scratch_bytes(), 6000u);
  release_scratch();
  EXPECT_EQ(scratch_bytes(), 0u);
}

TEST(ScratchLease, IsGivenBackByAnException) {
  release_scratch();
  EXPECT_THROW(
      {
        ScratchLease lease;
        (*lease).shared.reserve(4096);
        throw std::runtime_error("in the middle of a call");
      },
      std::runtime_error);
  EXPECT_GE(scratch_bytes(), 4096u);
  release_scratch();
}

TEST(ScratchLease, SurvivesManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        ScratchLease lease;
        auto* bytes = static_cast<unsigned char*>((*lease).shared.reserve(256));
        std::memset(bytes, t, 256);
        std::this_thread::yield();
        for (int k = 0; k < 256; ++k) ASSERT_EQ(bytes[k], t) << "another call holds the same memory";
        if (i % 50 == 0) release_scratch();
      }
    });
  for (std::thread& thread : threads) thread.join();
  release_scratch();
}

TEST(ForEachTask, RunsEveryTaskOnceOnAWorkerThatExists) {
  for (const bool by_shares : {false, true})
    for (const int64_t workers : {1, 2, 4, 9, 70})
      for (const int64_t count : {0, 1, 2, 7, 500}) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
        const auto task = [&](int64_t worker, int64_t index) {
          EXPECT_GE(worker, 0);
          EXPECT_LT(worker, workers);
          ++runs[size_t(index)];
        };
        if (by_shares)
          for_each_task_by_shares(test_pool(workers), count, task);
        else
          for_each_task(test_pool(workers), count, task);
        for (const std::atomic<int>& run : runs) EXPECT_EQ(run.load(), 1);
      }
}

TEST(ForEachTask, SharesBeginWithTasksThatFollowEachOther) {
  // Workers run after each other, the last one first.
  const ThreadPool backwards{3, [](int64_t workers, ThreadPool::Body body, void* context) {
                               for (int64_t worker = workers - 1; worker >= 0; --worker) body(context, worker);
                             }};
  std::vector<int64_t> order;
  for_each_task_by_shares(backwards, 10, [&](int64_t worker, int64_t index) {
    EXPECT_EQ(worker, 2) << "it helps with all that is left";
    order.push_back(index);
  });
  EXPECT_EQ(order, (std::vector<int64_t>{6, 7, 8, 9, 0, 1, 2, 3, 4, 5}));
}

TEST(ForEachTask, OthersHelpWithTheShareOfASlowWorker) {
  constexpr int64_t kCount = 40;
  std::atomic<int> done{0};
  for_each_task_by_shares(test_pool(2), kCount, [&](int64_t, int64_t index) {
    if (index == 0)
      while (done.load() < kCount - 1) std::this_thread::yield();
    ++done;
  });
  EXPECT_EQ(done.load(), kCount);
}

TEST(ForEachTask, NeedsNoPool) {
  int64_t sum = 0;
  for_each_task(ThreadPool(), 10, [&](int64_t worker, int64_t index) {
    EXPECT_EQ(worker, 0);
    sum += index;
  });
  for_each_task_by_shares(ThreadPool(), 10, [&](int64_t, int64_t index) { sum += index; });
  EXPECT_EQ(sum, 90);
}

TEST(Dispatch, ThePortableTableIsTheLowestAndAlwaysThere) {
  const char* const* names = available_kernels();
  ASSERT_NE(names[0], nullptr);
  EXPECT_STREQ(names[0], "portable");
  for (const char* const* name = names; *name != nullptr; ++name) {
    const Kernels* table = find_kernels(*name);
    ASSERT_NE(table, nullptr);
    EXPECT_STREQ(table->name, *name);
    EXPECT_NE(table->attention, nullptr);
    EXPECT_NE(table->received_attention, nullptr);
    EXPECT_NE(table->outlier_mask, nullptr);
    EXPECT_NE(table->rebalance, nullptr);
    EXPECT_NE(table->rebalance_gradient, nullptr);
  }
  EXPECT_EQ(find_kernels("abacus"), nullptr);
  EXPECT_EQ(find_kernels(""), nullptr);
}

// The choice is made once per process, so each is made in a process of its own.
[[noreturn]] void report_choice(const char* variable) {
  if (variable == nullptr)
    unsetenv("ATTNRB_CPU");
  else
    setenv("ATTNRB_CPU", variable, 1);
  try {
    std::fprintf(stderr, "chose %s\n", kernels().name);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "refused %s\n", error.what());
  }
  std::_Exit(0);
}

// Than the tables before it. Only AMD's processors multiply pairs as fast as single numbers.
bool is_faster(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512_bf16") return __builtin_cpu_is("amd");
#endif
  return !name.empty();
}

TEST(DispatchDeathTest, TakesTheBestUnlessTheEnvironmentNamesALowerOne) {
  const char* best = nullptr;
  for (const char* const* name = available_kernels(); *name != nullptr; ++name) {
    if (is_faster(*name)) best = *name;
    EXPECT_EXIT(report_choice(*name), ::testing::ExitedWithCode(0), "chose " + std::string(*name));
  }
  EXPECT_EXIT(report_choice(nullptr), ::testing::ExitedWithCode(0), "chose " + std::string(best));
  EXPECT_EXIT(report_choice(""), ::testing::ExitedWithCode(0), "chose " + std::string(best));
  EXPECT_EXIT(report_choice("abacus"), ::testing::ExitedWithCode(0), "refused ATTNRB_CPU: .*portable.*abacus");
}

TEST(OutlierCapacity, IsTheMostThatCanExceedTheThreshold) {
  EXPECT_EQ(outlier_capacity(0.01), 99);
  EXPECT_EQ(outlier_capacity(0.5), 1);
  EXPECT_EQ(outlier_capacity(0.3), 3);
  EXPECT_EQ(outlier_capacity(0.999), 1);
  EXPECT_EQ(outlier_capacity(0.01, 40), 40);
  EXPECT_EQ(outlier_capacity(0.01, 4000), 99);
  // n entries above the threshold sum to less than 1.
  for (double threshold = 0.001; threshold < 1.0; threshold *= 1.07) {
    const double capacity = double(outlier_capacity(threshold));
    EXPECT_LT(capacity * threshold, 1.0) << threshold;
    EXPECT_GE((capacity + 1.0) * threshold, 1.0) << threshold;
  }
}

}  // namespace
}  // namespace attnrb::testing
