// Where keys and values lie: the device's side of csrc/core/keys.h. Every kernel that reads a key or a value asks here
// for its address.
#pragma once

#include "device.h"
#include "parameters.h"

namespace attnrb::cuda {

// Keys or values of one key head, from a column on.
template <class T>
class HeadRows {
 public:
  ATTNRB_DEVICE HeadRows(const Operand& operand, int64_t batch, int64_t key_head, int64_t column = 0)
      : first_(static_cast<const T*>(operand.data) + batch * operand.strides[0] + key_head * operand.strides[1] +
               column),
        strides_(operand.strides) {}

  ATTNRB_DEVICE const T* row(int64_t key) const { return first_ + key * strides_[2]; }

  // Calls visit(i, row) for `Count` rows, `Step` keys apart, from `key` on: an addition each.
  template <int Count, int Step, class Visit>
  ATTNRB_DEVICE void each(int64_t key, Visit&& visit) const {
    const T* at = row(key);
    const int64_t step = Step * strides_[2];
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      visit(i, at);
      at += step;
    }
  }

 private:
  const T* first_;
  const int64_t* strides_;  // where the kernel's parameters are: held in no register
};

// The same of one sequence where they lie in blocks. Only keys that the sequence has are asked for, and tables.h saw to
// it that its blocks are among those that there are.
template <class T>
class BlockRows {
 public:
  ATTNRB_DEVICE BlockRows(const AttentionParameters& p, const Operand& operand, int64_t sequence, int64_t key_head)
      : blocks_(p.blocks),
        table_(p.blocks.table + sequence * p.blocks.stride),
        first_(static_cast<const T*>(operand.data) + key_head * operand.strides[1]),
        strides_(operand.strides) {}

  ATTNRB_DEVICE const T* row(int64_t key) const {
    const uint32_t block = blocks_.of(uint32_t(key)), row = uint32_t(key) - block * blocks_.rows;
    return first_ + table_[block] * strides_[0] + row * strides_[2];
  }

  template <int Count, int Step, class Visit>
  ATTNRB_DEVICE void each(int64_t key, Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) visit(i, row(key + i * Step));
  }

 private:
  const BlockTable& blocks_;
  const int32_t* table_;
  const T* first_;
  const int64_t* strides_;
};

}  // namespace attnrb::cuda
