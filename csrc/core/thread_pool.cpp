#include "thread_pool.h"

#include <thread>

namespace attnrb {

void wait_for(const std::atomic<int32_t>& counter, int32_t value) {
  // A tile takes some hundred microseconds: worth a short spin, not a long one where threads outnumber cores.
  constexpr int kSpins = 2000;
  for (int spins = 0; counter.load(std::memory_order_acquire) != value; ++spins)
    if (spins >= kSpins) std::this_thread::yield();
}

}  // namespace attnrb
