// What laying out a problem takes: sizes, operands as kernels read them, refusals, and pieces of one allocation.
#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "launch.h"

namespace attnrb::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// See tile.h: 16-byte copies need adjacent columns and rows that begin and end on 16 bytes.
inline Operand operand_of(const View& view, int64_t width, DType dtype) {
  const int64_t size = element_size(dtype);
  Operand operand{
      view.data, {view.strides[0], view.strides[1], view.strides[2], view.strides[3]}, int32_t(width), true};
  const auto whole = [&](int64_t elements) { return elements * size % 16 == 0; };
  operand.aligned = width > 0 && (view.strides[3] == 1 || width == 1) && whole(width) && whole(view.strides[0]) &&
                    whole(view.strides[1]) && whole(view.strides[2]) &&
                    reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  return operand;
}

// Of queries and keys: see Note: [Tiles in shared memory].
inline RowLayout row_layout(int64_t columns, int64_t size) {
  const bool whole = columns * size % 128 == 0;
  return {int32_t(whole ? columns : columns + 16 / size), whole ? 7 : 0};
}

// Of a group that takes a row of 16-bit elements, a unit of 16 bytes each.
inline int lanes_of_row(int64_t width) { return width <= 64 ? 8 : width <= 128 ? 16 : 32; }

inline void check_capability(const Device& device) {
  if (device.capability < 80)
    refuse("query: expected on a device of compute capability 8.0 or newer, got one of ", device.capability / 10, ".",
           device.capability % 10);
}

inline void check_shared(const char* what, int64_t needed, const Device& device) {
  if (needed > device.shared_bytes)
    refuse(what, ": expected rows that fit shared memory, of which this device has ", device.shared_bytes,
           " bytes a block, got widths that need ", needed);
}

inline int64_t check_blocks(int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max())
    refuse("query: expected a problem of at most 2147483647 blocks, got ", blocks, ": split the batch");
  return blocks;
}

// Whether rows of weights begin and end on 16 bytes.
template <class Problem>
bool whole_rows(const View& view, const Problem& problem) {
  const int64_t size = element_size(problem.dtype);
  bool whole =
      view.strides[3] == 1 && problem.shape.keys * size % 16 == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) whole = whole && view.strides[axis] * size % 16 == 0;
  return whole;
}

// Where a warp takes a row of weights.
inline int64_t row_blocks(const Shape& shape) {
  return check_blocks(divide_up(shape.batch * shape.heads * shape.queries, kWarps));
}

inline void set_scoring(AttentionParameters& p) {
  constexpr float kLog2E = 1.44269504088896340736f;
  const Scoring& scoring = p.problem.scoring;
  p.factor = scoring.scale * kLog2E;
  if (scoring.softcap > 0.0f) {
    p.inner = scoring.scale / scoring.softcap;
    p.cap = scoring.softcap * kLog2E;
  }
}

// What the rows of a problem are made of. p.problem is set; `problem` is it, or the backward's, and has the operands.
template <class Problem>
void set_rows(AttentionParameters& p, const Problem& problem, int64_t value_width, int gain_stride) {
  const Shape& shape = problem.shape;
  p.query = operand_of(problem.query, shape.width, problem.dtype);
  p.key = operand_of(problem.key, shape.width, problem.dtype);
  p.value = operand_of(problem.value, value_width, problem.dtype);
  p.group = int32_t(shape.heads / shape.key_heads);
  p.rows = p.group * shape.queries;
  p.row_tiles = divide_up(p.rows, kTileRows);
  p.gain_stride = gain_stride;
  set_scoring(p);
}

// Cuts one allocation into aligned pieces; counts them when the base is null.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + taken_);
    taken_ += round_up(count * int64_t(sizeof(T)), 256);
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  char* base_;
  int64_t taken_ = 0;
};

}  // namespace attnrb::cuda
