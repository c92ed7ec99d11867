// The core never starts threads: whoever calls it lends a pool (torch's, or a test's).
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace attnrb {

struct ThreadPool {
  // Calls body(context, worker) once for every worker in [0, workers), in parallel if it can, and returns when all
  // have.
  using Body = void (*)(void* context, int64_t worker);
  int64_t workers = 1;
  void (*run)(int64_t workers, Body body, void* context) = nullptr;
};

// Runs task(worker, index) for every index in [0, count). Workers take the next index when they are free, so tasks of
// unequal cost balance; put the heaviest first. Which worker runs a task must not change the task's result.
template <class Task>
void for_each_task(const ThreadPool& pool, int64_t count, Task&& task) {
  if (count <= 0) return;
  if (pool.workers <= 1 || count == 1 || pool.run == nullptr) {
    for (int64_t index = 0; index < count; ++index) task(int64_t(0), index);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count;
    std::remove_reference_t<Task>* task;
  } context;
  context.count = count;
  context.task = &task;
  const int64_t workers = pool.workers < count ? pool.workers : count;
  pool.run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& shared = *static_cast<Context*>(opaque);
        for (int64_t index; (index = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;)
          (*shared.task)(worker, index);
      },
      &context);
}

// The same, but each worker begins with a share of its own, of tasks that follow each other, and then helps with what
// is left of the others' shares: a core finds in its caches what its last task left there. Tasks must not wait for
// each other.
template <class Task>
void for_each_task_by_shares(const ThreadPool& pool, int64_t count, Task&& task) {
  constexpr int64_t kMostShares = 64;
  if (pool.workers <= 1 || pool.workers > kMostShares || count <= pool.workers || pool.run == nullptr) {
    for_each_task(pool, count, std::forward<Task>(task));
    return;
  }
  struct Share {
    alignas(64) std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    Share shares[kMostShares];
    int64_t workers;
    std::remove_reference_t<Task>* task;
  } context;
  context.workers = pool.workers;
  context.task = &task;
  for (int64_t w = 0; w < pool.workers; ++w) {
    context.shares[w].next = count * w / pool.workers;
    context.shares[w].end = count * (w + 1) / pool.workers;
  }
  pool.run(
      pool.workers,
      [](void* opaque, int64_t worker) {
        Context& all = *static_cast<Context*>(opaque);
        for (int64_t step = 0; step < all.workers; ++step) {
          Share& share = all.shares[(worker + step) % all.workers];
          for (int64_t index; (index = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
            (*all.task)(worker, index);
        }
      },
      &context);
}

// Returns once `counter` is `value`, which another worker sees to. A task may wait for tasks of a lower index only:
// those have been taken by a worker already, so one of them always goes on.
void wait_for(const std::atomic<int32_t>& counter, int32_t value);

}  // namespace attnrb
