// What the drivers (prefill, decode, received, gradient) share: working memory, the first thing found wrong, and small
// loops over rows of numbers.
#pragma once

#include <atomic>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../problem.h"
#include "../scratch.h"
#include "../thread_pool.h"
#include "panels.h"
#include "subnormals.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Cuts one allocation into aligned pieces; counts them where there is none yet. AddressSanitizer stops whoever leaves a
// piece: there is a gap behind each.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * int64_t(sizeof(T)), room = round_up(bytes, 64) + kGap;
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + taken_);
#if defined(__SANITIZE_ADDRESS__)
    if (piece != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(base_ + taken_, bytes);
      ASAN_POISON_MEMORY_REGION(base_ + taken_ + bytes, room - bytes);
    }
#endif
    taken_ += room;
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = 64;
#else
  static constexpr int64_t kGap = 0;
#endif
  char* base_;
  int64_t taken_ = 0;
};

// The base of a driver. Kind has a struct Worker, what one thread works with, and carve(carver), which lays it out.
template <class Kind>
class Driver {
 protected:
  Driver(const ThreadPool& pool, Scratch& scratch) : pool_(pool), scratch_(scratch) {}

  // Calls layout(carver) twice: to count what all workers share, and to lay it out.
  template <class Layout>
  void reserve_shared(Layout&& layout) {
    Carver count(nullptr);
    layout(count);
    Carver carver(scratch_.shared.reserve(size_t(count.taken())));
    layout(carver);
  }

  void reserve_workers() {
    Carver count(nullptr);
    kind().carve(count);
    scratch_.reserve_workers(pool_.workers, size_t(count.taken()));
  }

  auto worker(int64_t index) const {
    Carver carver(scratch_.worker(index));
    return kind().carve(carver);
  }

  void note(Status status) {
    if (status != Status::ok) status_.store(int32_t(status), std::memory_order_relaxed);
  }
  Status status() const { return Status(status_.load()); }

  const ThreadPool& pool_;

 private:
  const Kind& kind() const { return static_cast<const Kind&>(*this); }

  Scratch& scratch_;
  std::atomic<int32_t> status_{0};
};

// A row of queries or outputs.
template <class T>
ATTNRB_INLINE const T* row_of(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(view.data) + batch * view.strides[0] + head * view.strides[1] + row * view.strides[2];
}

// The first n <= Vec::width elements; zeros follow.
template <class T>
ATTNRB_INLINE Vec load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return n == Vec::width ? Vec::load(p) : Vec::load(p, n);
  float lanes[Vec::width] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i * stride]);
  return Vec::load(lanes);
}

// sums *= factor, over whole vectors that lie as Places says.
template <class Places = InOrder>
ATTNRB_INLINE void scale_sums(float* sums, int64_t columns, float factor) {
  const Vec by = Vec::set(factor);
  for (int64_t d = 0; d < columns; d += Vec::width) {
    float* const at = sums + Places::place(d);
    (Vec::load(at) * by).store(at);
  }
}

// sums += factor * row. Sums end on a whole vector.
template <class T>
ATTNRB_INLINE void add_scaled(float* sums, float factor, const T* row, int64_t stride, int64_t width) {
  const Vec by = Vec::set(factor);
  for (int64_t d = 0; d < width; d += Vec::width) {
    const int n = int(smaller(width - d, int64_t(Vec::width)));
    Vec::fma(by, load_strided(row + d * stride, stride, n), Vec::load(sums + d)).store(sums + d);
  }
}

// a * b + c of one number with the rounding of a vector: left to a compiler, it would depend on its options.
inline float fma_alone(float a, float b, float c) {
  float lanes[Vec::width];
  Vec::fma(Vec::set(a), Vec::set(b), Vec::set(c)).store(lanes);
  return lanes[0];
}

// out = factor * sums, which lie as Places says.
template <class Places = InOrder, class T>
ATTNRB_INLINE void write_scaled(T* out, const float* sums, int64_t width, float factor) {
  const Vec by = Vec::set(factor);
  int64_t d = 0;
  for (; d + Vec::width <= width; d += Vec::width) (Vec::load(sums + Places::place(d)) * by).store(out + d);
  if (d < width) (Vec::load(sums + Places::place(d), int(width - d)) * by).store(out + d, int(width - d));
}

// x * 0 is 0 for finite x and NaN otherwise.
ATTNRB_INLINE bool is_finite(float x) { return x * 0.0f == 0.0f; }

template <class T>
bool all_finite(const T* rows, int64_t row_stride, int64_t column_stride, int64_t count, int64_t width) {
  // Sums of their own, so that none waits for the one before it.
  Vec test = Vec::zero(), other = Vec::zero();
  float rest = 0.0f;
  for (int64_t r = 0; r < count; ++r, rows += row_stride) {
    int64_t d = 0;
    if (column_stride == 1)
      for (; d + 2 * Vec::width <= width; d += 2 * Vec::width) {
        test = Vec::fma(Vec::load(rows + d), Vec::zero(), test);
        other = Vec::fma(Vec::load(rows + d + Vec::width), Vec::zero(), other);
      }
    if (column_stride == 1 && d + Vec::width <= width) {
      test = Vec::fma(Vec::load(rows + d), Vec::zero(), test);
      d += Vec::width;
    }
    for (; d < width; ++d) rest += to_float(rows[d * column_stride]) * 0.0f;
  }
  return test.sum() + other.sum() + rest == 0.0f;
}

// Of the rows [key, key + count) of a key head.
template <class T>
bool all_finite(const KeyRows& operand, int64_t batch, int64_t key_head, int64_t key, int64_t count, int64_t width) {
  for (int64_t at = 0, run; at < count; at += run) {
    run = operand.run(key + at, count - at);
    if (!all_finite(operand.template row<T>(batch, key_head, key + at), operand.row_stride(), operand.column_stride(),
                    run, width))
      return false;
  }
  return true;
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
