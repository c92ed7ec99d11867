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

// Keys or values, [batch, key heads, keys, width]. They are strided: row j of a head lies j row strides behind its
// first.
struct KeyRows : View {
  KeyRows() = default;
  KeyRows(const View& view) : View(view) {}

  // Where the row of key `key` begins; the rows after it follow row_stride() apart.
  template <class T>
  ATTNRB_INLINE const T* row(int64_t batch, int64_t key_head, int64_t key) const {
    return static_cast<const T*>(data) + batch * strides[0] + key_head * strides[1] + key * strides[2];
  }
  ATTNRB_INLINE int64_t row_stride() const { return strides[2]; }
  ATTNRB_INLINE int64_t column_stride() const { return strides[3]; }
};

}  // namespace attnrb
