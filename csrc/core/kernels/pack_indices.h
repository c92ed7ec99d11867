// Vec::compress_indices() where no instruction packs lanes.
#pragma once

#include "../types.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Of `width` indices those that are `chosen`, a bit each, but for `except`, each plus `add`. Returns how many; all
// places of `to` may be written.
template <int width>
ATTNRB_INLINE int pack_indices(uint32_t chosen, const int32_t* from, int32_t except, int32_t add, int32_t* to) {
  int count = 0;
  for (int i = 0; i < width; ++i) {
    to[count] = int32_t(uint32_t(from[i]) + uint32_t(add));  // lanes that are not chosen hold anything
    count += int(chosen >> i & 1u) & int(from[i] != except);
  }
  return count;
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
