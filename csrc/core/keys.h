// Where keys and values lie. Everything that reads a key or a value asks here for its address.
#pragma once

#include <cstdint>

#include "types.h"

namespace attnrb {

// A read-only operand [batch, heads, rows, columns]. Strides count elements.
struct View {
  const void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
};

// Rows at one distance: rows[i] is the i-th of them.
template <class T>
struct EvenRows {
  const T* first;
  int64_t stride;
  ATTNRB_INLINE const T* operator[](int64_t i) const { return first + i * stride; }
};

// Keys or values. Strided, they are [batch, key heads, keys, width]: row j of a head lies j row strides behind its
// first. In blocks, they are [blocks, key heads, block_rows, width]: row j of a head of sequence b is row
// j mod block_rows of block table[b][j / block_rows], and only rows of one block lie at one distance.
struct KeyRows : View {
  KeyRows() = default;
  KeyRows(const View& view) : View(view) {}

  const int32_t* table = nullptr;  // [batch, ...], or null: strided
  int64_t table_stride = 0;        // entries from one sequence to the next
  uint32_t block_rows = 0;

  ATTNRB_INLINE bool in_blocks() const { return table != nullptr; }

  // Where the row of key `key` begins; run() says how many after it follow row_stride() apart.
  template <class T>
  ATTNRB_INLINE const T* row(int64_t batch, int64_t key_head, int64_t key) const {
    int64_t block = batch;
    if (in_blocks()) {
      block = table[batch * table_stride + uint32_t(key) / block_rows];
      key = uint32_t(key) % block_rows;
    }
    return static_cast<const T*>(data) + block * strides[0] + key_head * strides[1] + key * strides[2];
  }
  template <class T>
  ATTNRB_INLINE EvenRows<T> rows(int64_t batch, int64_t key_head, int64_t key) const {
    return {row<T>(batch, key_head, key), row_stride()};
  }
  // How many of the `count` rows from `key` on lie at one distance.
  ATTNRB_INLINE int64_t run(int64_t key, int64_t count) const {
    if (!in_blocks()) return count;
    const int64_t left = int64_t(block_rows - uint32_t(key) % block_rows);
    return left < count ? left : count;
  }
  ATTNRB_INLINE int64_t row_stride() const { return strides[2]; }
  ATTNRB_INLINE int64_t column_stride() const { return strides[3]; }
};

}  // namespace attnrb
