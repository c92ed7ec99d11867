// The tables of ragged sequences, looked at before anything that they lead to is read.
//
// Nothing waits for the device, so what breaks the rules of csrc/ops/paging.h raises no error here. It becomes a
// sequence with kBrokenSequence keys, whose rows the kernels make NaN; where query_starts break them, nobody knows
// whose rows are whose, and all rows become those of one such sequence.
#pragma once

#include "device.h"
#include "parameters.h"

namespace attnrb::cuda {

ATTNRB_DEVICE int64_t number_at(const void* numbers, bool wide, int64_t at) {
  return wide ? static_cast<const int64_t*>(numbers)[at] : int64_t(static_cast<const int32_t*>(numbers)[at]);
}

// Whether it is so for some thread of the block. `words`: kWarps of them, for this call alone.
ATTNRB_DEVICE bool any_thread(bool x, int32_t* words) {
  const bool of_warp = any(x);
  if (thread_index() % 32 == 0) words[thread_index() / 32] = of_warp;
  block_sync();
  bool found = false;
  for (int warp = 0; warp < kWarps; ++warp) found = found || words[warp] != 0;
  return found;
}

// A block for a sequence, each of which looks at all query_starts: they are few.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads) tables_kernel(ATTNRB_PARAMETERS TableParameters p) {
  int32_t* words = reinterpret_cast<int32_t*>(shared_memory());
  const int64_t b = block_index();
  bool wrong = false;
  for (int64_t i = thread_index(); i <= p.batch; i += Threads) {
    const int64_t start = number_at(p.starts, p.wide_starts, i);
    const int64_t before = i == 0 ? 0 : number_at(p.starts, p.wide_starts, i - 1);
    wrong = wrong || start < before || (i == 0 && start != 0) || (i == p.batch && start != p.queries);
  }
  wrong = any_thread(wrong, words);

  const int64_t start = wrong ? (b == 0 ? 0 : p.queries) : number_at(p.starts, p.wide_starts, b);
  const int64_t end = wrong ? p.queries : number_at(p.starts, p.wide_starts, b + 1);
  const int64_t length = wrong ? kBrokenSequence : number_at(p.lengths, p.wide_lengths, b);
  bool broken = wrong || length < 0 || length > p.room || (length > 0 && length < end - start);
  if (!broken) {
    const int64_t needed = (length + p.block_rows - 1) / p.block_rows;
    for (int64_t j = thread_index(); j < needed; j += Threads) {
      const int32_t block = p.table[b * p.table_stride + j];
      broken = broken || block < 0 || block >= p.blocks;
    }
  }
  broken = any_thread(broken, words + kWarps);
  if (thread_index() != 0) return;
  p.query_starts[b] = start;
  if (b == p.batch - 1) p.query_starts[p.batch] = p.queries;
  p.key_counts[b] = broken ? kBrokenSequence : length;
  p.query_offsets[b] = broken ? 0 : length - end;
}

}  // namespace attnrb::cuda
