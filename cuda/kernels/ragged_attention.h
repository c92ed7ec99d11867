// Attention of ragged sequences whose keys and values lie in blocks: Note: [Ragged rows].
#pragma once

#include <type_traits>

#include "attention.h"
#include "merge.h"

namespace attnrb::cuda {

// Left alone, ptxas spills two registers of edited float32 rows to fit three blocks.
template <class T, int Width, Task task>
constexpr int kRaggedBlocks = std::is_same<T, float>::value && Width == 128 && task == Task::edited ? 2 : 1;

template <class T, int Width, Task task>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, (kRaggedBlocks<T, Width, task>))
    ragged_attention_kernel(ATTNRB_PARAMETERS AttentionParameters parameters) {
  AttentionBlock<T, Width, task, RaggedSequences> block(parameters, block_index());
  if (!block.has_rows()) return;
  if (block.has_keys())
    block.run();
  else
    block.leave_without_keys();
}

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, kMergeBlocks)
    ragged_merge_kernel(ATTNRB_PARAMETERS AttentionParameters p) {
  const int64_t warps = merge_warps(p), warp = block_index() * kWarps + thread_index() / 32, index = warp / warps;
  const int64_t key_head = index / p.rows;
  if (key_head >= p.problem.shape.key_heads) return;
  const int64_t row = index % p.rows, sequence = RaggedSequences::of_query(p, row / p.group);
  // Rows without keys were told so.
  if (p.problem.shape.key_counts[sequence] > 0)
    merge_row<T, RaggedSequences>(p, sequence, key_head, row, warp % warps * 32);
}

}  // namespace attnrb::cuda
