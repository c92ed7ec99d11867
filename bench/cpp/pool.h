// Threads that stay, so that a bench times the kernels and not the starting of threads.
#pragma once

#include "core/thread_pool.h"

namespace attnrb::bench {

// A pool of `workers` threads, the caller among them. One call at a time.
ThreadPool standing_pool(int64_t workers);

}  // namespace attnrb::bench
