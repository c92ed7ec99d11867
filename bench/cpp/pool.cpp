#include "pool.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace attnrb::bench {

namespace {

class Threads {
 public:
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void grow(int64_t workers) {
    while (int64_t(threads_.size()) + 1 < workers) {
      const int64_t worker = int64_t(threads_.size()) + 1;
      threads_.emplace_back([this, worker, seen = call_] { serve(worker, seen); });
    }
  }

  void run(int64_t workers, ThreadPool::Body body, void* context) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      workers_ = workers;
      running_ = workers - 1;
      ++call_;
    }
    start_.notify_all();
    body(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int64_t worker, int64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return stopping_ || call_ != seen; });
      if (stopping_) return;
      seen = call_;
      if (worker >= workers_) continue;
      lock.unlock();
      body_(context_, worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> threads_;
  ThreadPool::Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t workers_ = 0, running_ = 0, call_ = 0;
  bool stopping_ = false;
};

Threads& threads() {
  static Threads standing;
  return standing;
}

}  // namespace

ThreadPool standing_pool(int64_t workers) {
  threads().grow(workers);
  return {workers, [](int64_t count, ThreadPool::Body body, void* context) { threads().run(count, body, context); }};
}

}  // namespace attnrb::bench
