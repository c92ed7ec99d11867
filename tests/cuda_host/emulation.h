// Runs the CUDA kernels on the host. It has the functions of cuda/kernels/device.h, with a fiber for each CUDA thread.
//
// What it checks beyond results: that all lanes of a warp arrive at the same warp operation and all threads of a block
// at the same barrier; that shared memory is not read or written past its ends (the pages around it are not there) nor
// used before it is written (it starts as NaN); that copy_async() targets are aligned and inside, and not read before
// they were waited for (until then they hold NaN); that every copy is waited for. Fibers run in an order drawn anew at
// every step, from ATTNRB_EMULATION_SEED (1 unless set), so that a missing barrier shows.
//
// What it cannot see: races that need the hardware's weaker memory order, bank conflicts, coalescing, time. Additions
// inside one tensor-core step are exact and cut off once, where hardware cuts off a little more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

#define ATTNRB_KERNEL static
#define ATTNRB_DEVICE inline
#define ATTNRB_PARAMETERS const
#define ATTNRB_BLOCK_THREADS(...)
// Read at every step: not through the function that a shared library asks for its thread-local variables.
#define ATTNRB_EMULATION_LOCAL __attribute__((tls_model("initial-exec")))

namespace attnrb::cuda {

namespace emulation {

// What the running fiber knows of itself.
struct Lane {
  int thread;
  int64_t block;
  unsigned char* shared;
};
extern ATTNRB_EMULATION_LOCAL __thread Lane current;

// The 32 lanes of a warp meet: the last to arrive calls operate(arguments of all lanes), then all go on. `what` and
// `line` name the operation: lanes that meet at different ones have diverged.
void warp_meet(const char* what, int line, void* argument, void (*operate)(void* const (&arguments)[32]));
void block_meet(int line);
void start_copy(void* shared, const void* global, bool valid);
void commit_copies();
void finish_copies(int groups_left);  // of those that were committed

// Stops the program: a kernel that breaks the rules has no result.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs body(argument) on every thread of every block.
void run_blocks(int64_t blocks, int threads, int64_t shared_bytes, void (*body)(const void*), const void* argument);

}  // namespace emulation

inline int thread_index() { return emulation::current.thread; }
inline int64_t block_index() { return emulation::current.block; }
inline unsigned char* shared_memory() { return emulation::current.shared; }
inline void block_sync(int line = __builtin_LINE()) { emulation::block_meet(line); }

inline unsigned ballot(bool x, int line = __builtin_LINE()) {
  struct Vote {
    bool mine;
    unsigned all;
  } vote{x, 0};
  emulation::warp_meet("ballot", line, &vote, [](void* const(&lanes)[32]) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= unsigned(static_cast<Vote*>(lanes[lane])->mine) << lane;
    for (void* lane : lanes) static_cast<Vote*>(lane)->all = all;
  });
  return vote.all;
}
inline void warp_sync(int line = __builtin_LINE()) { ballot(true, line); }
inline bool any(bool x, int line = __builtin_LINE()) { return ballot(x, line) != 0; }

template <class T>
T shuffle(T x, int lane, int line = __builtin_LINE()) {
  struct Exchange {
    T mine, got;
    int from;
  } exchange{x, x, lane};
  emulation::warp_meet("shuffle", line, &exchange, [](void* const(&lanes)[32]) {
    for (void* lane : lanes) {
      Exchange* to = static_cast<Exchange*>(lane);
      to->got = static_cast<Exchange*>(lanes[to->from & 31])->mine;
    }
  });
  return exchange.got;
}
template <class T>
T shuffle_xor(T x, int mask, int line = __builtin_LINE()) {
  return shuffle(x, (thread_index() ^ mask) & 31, line);
}

inline void keep_loads_apart() {}
inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }

inline void copy_async(void* shared, const void* global, bool valid) { emulation::start_copy(shared, global, valid); }
inline void commit_copies() { emulation::commit_copies(); }
inline void wait_for_copies() { emulation::finish_copies(0); }
inline void wait_for_copies_before_last() { emulation::finish_copies(1); }

void load_matrices(uint32_t (&r)[4], const void* row, int line = __builtin_LINE());
void load_matrices_transposed(uint32_t (&r)[4], const void* row, int line = __builtin_LINE());
void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE());
void multiply_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE());
void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE());

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float fast_reciprocal(float x) { return 1.0f / x; }

template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T>
float widen(T x) {
  return to_float(x);
}
template <class T>
T narrow(float x) {
  return from_float<T>(x);
}

inline unsigned match_any(int32_t x, int line = __builtin_LINE()) {
  struct Match {
    int32_t mine;
    unsigned same;
  } match{x, 0};
  emulation::warp_meet("match", line, &match, [](void* const(&lanes)[32]) {
    for (void* to : lanes)
      for (int lane = 0; lane < 32; ++lane)
        if (static_cast<Match*>(lanes[lane])->mine == static_cast<Match*>(to)->mine)
          static_cast<Match*>(to)->same |= 1u << lane;
  });
  return match.same;
}
// Fibers run one at a time.
inline int32_t atomic_add(int32_t* at, int32_t x) {
  const int32_t before = *at;
  *at += x;
  return before;
}
inline void atomic_or(uint32_t* at, uint32_t x) { *at |= x; }

inline void report_status(int32_t* status, int32_t code) {
  if (status != nullptr && *status < code) *status = code;
}

template <auto kernel, class Parameters>
void launch(int64_t blocks, int threads, int64_t shared_bytes, void* /*stream*/, const Parameters& parameters) {
  emulation::run_blocks(
      blocks, threads, shared_bytes, [](const void* opaque) { kernel(*static_cast<const Parameters*>(opaque)); },
      &parameters);
}

}  // namespace attnrb::cuda
