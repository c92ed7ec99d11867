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

 private:
  const T* first_;
  const int64_t* strides_;  // where the kernel's parameters are: held in no register
};

}  // namespace attnrb::cuda
