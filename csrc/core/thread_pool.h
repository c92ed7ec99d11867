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

// Runs task(worker, index) for every index in [0, count), which are cut into `shares` of indices that follow each
// other. Workers that are free take the next index of the share that is theirs, and then of the others. Which worker
// runs a task must not change the task's result.
template <class Task>
void run_tasks(const ThreadPool& pool, int64_t count, int64_t shares, Task&& task) {
  if (count <= 0) return;
  if (pool.workers <= 1 || count == 1 || pool.run == nullptr) {
    for (int64_t index = 0; index < count; ++index) task(int64_t(0), index);
    return;
  }
  constexpr int64_t kMostShares = 64;
  struct Share {
    alignas(64) std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    Share share[kMostShares];
    int64_t shares;
    std::remove_reference_t<Task>* task;
  } context;
  const int64_t workers = pool.workers < count ? pool.workers : count;
  context.shares = shares < workers ? shares : workers;
  if (context.shares > kMostShares) context.shares = kMostShares;
  context.task = &task;
  for (int64_t s = 0; s < context.shares; ++s) {
    context.share[s].next = count * s / context.shares;
    context.share[s].end = count * (s + 1) / context.shares;
  }
  pool.run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& all = *static_cast<Context*>(opaque);
        for (int64_t step = 0; step < all.shares; ++step) {
          Share& share = all.share[(worker + step) % all.shares];
          for (int64_t index; (index = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
            (*all.task)(worker, index);
        }
      },
      &context);
}

// All workers take the next index of all, so tasks of unequal cost balance; put the heaviest first.
template <class Task>
void for_each_task(const ThreadPool& pool, int64_t count, Task&& task) {
  run_tasks(pool, count, 1, std::forward<Task>(task));
}

// Each worker begins with a share of its own: a core finds in its caches what its last task left there. Tasks must not
// wait for each other.
template <class Task>
void for_each_task_by_shares(const ThreadPool& pool, int64_t count, Task&& task) {
  run_tasks(pool, count, pool.workers, std::forward<Task>(task));
}

// Returns once `counter` is `value`, which another worker sees to. A task may wait for tasks of a lower index only:
// those have been taken by a worker already, so one of them always goes on.
void wait_for(const std::atomic<int32_t>& counter, int32_t value);

}  // namespace attnrb
