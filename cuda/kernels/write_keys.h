// Writing new keys and values into blocks.
#pragma once

#include "device.h"
#include "parameters.h"

namespace attnrb::cuda {

// What a lane copies at a time: 16, 4 or 2 bytes.
struct alignas(16) SixteenBytes {
  uint32_t word[4];
};

// A warp for a head of a row, whose key and value it copies. A slot outside the pools is nowhere, like -1. Of two rows
// for one place either may stay.
template <class U>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads) write_keys_kernel(ATTNRB_PARAMETERS WriteProblem p) {
  const int64_t index = block_index() * kWarps + thread_index() / 32, row = index / p.heads;
  if (row >= p.rows) return;
  const int64_t head = index - row * p.heads, slot = p.slots[row];
  if (slot < 0 || slot >= p.blocks * p.block_rows) return;
  const int64_t block = slot / p.block_rows, of_block = slot - block * p.block_rows;
#pragma unroll
  for (int pool = 0; pool < 2; ++pool) {
    const WrittenRows& each = p.pools[pool];
    const U* from = reinterpret_cast<const U*>(each.from + row * each.from_strides[0] + head * each.from_strides[1]);
    U* to = reinterpret_cast<U*>(each.to + block * each.to_strides[0] + head * each.to_strides[1] +
                                 of_block * each.to_strides[2]);
    const int units = int(each.row_bytes / int64_t(sizeof(U)));
    for (int unit = thread_index() % 32; unit < units; unit += 32) to[unit] = from[unit];
  }
}

}  // namespace attnrb::cuda
