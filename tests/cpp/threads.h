// A thread pool for tests: one std::thread per worker and call. Slow to start, and as parallel as it gets.
#pragma once

#include <thread>
#include <vector>

#include "core/thread_pool.h"

namespace attnrb::testing {

inline void run_on_threads(int64_t workers, ThreadPool::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

inline ThreadPool test_pool(int64_t workers) { return {workers, run_on_threads}; }

}  // namespace attnrb::testing
