// Which rows have a key among their outliers: see Note: [Sparse part of gradients].
#pragma once

#include "gradient_rows.h"
#include "sparse_gradient_parameters.h"

namespace attnrb::cuda {

// A warp for each chunk of rows: counts, or (`Fill`) puts the rows in place.
template <bool Fill>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads)
    index_rows_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  const AttentionParameters& p = parameters.all.rows;
  const AttentionProblem& problem = p.problem;
  const Shape& shape = problem.shape;
  const int lane = thread_index() % 32;
  const int64_t index = block_index() * kWarps + thread_index() / 32, heads = index / kIndexChunks;
  if (heads >= shape.batch * shape.key_heads) return;
  const int64_t batch = heads / shape.key_heads, chunk = index % kIndexChunks, first = chunk * parameters.chunk_rows;
  const int64_t last = first + parameters.chunk_rows < p.rows ? first + parameters.chunk_rows : p.rows;
  for (int64_t r = first; r < last; ++r) {
    GradientRow row;
    const uint32_t* words = parameters.all.words + 8 * (heads * p.rows + r);
    row.read(words, words + 4);
    if (row.buckets == 0) continue;
    const RowPlace place = row_place(p, heads % shape.key_heads, r);
    const OutlierList list = outliers_of(p, batch, place);
    // No key twice in a row: no two lanes meet.
    for (int32_t c = lane; c < list.count; c += 32) {
      const int64_t key = int64_t(list.slots[c]) - problem.visibility.key_offset;
      if (key < row.low || key >= row.high) continue;
      int32_t& at = parameters.places[(heads * shape.keys + key) * kIndexChunks + chunk];
      if (Fill)
        parameters
            .entries[heads * p.rows * problem.edit.capacity + parameters.starts[heads * (shape.keys + 1) + key] + at] =
            int32_t(r);
      at = at + 1;
    }
    warp_sync();
  }
}

// Counts become places among the rows of their key, whose number goes to starts. A thread for each key.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads)
    index_places_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  const Shape& shape = parameters.all.rows.problem.shape;
  const int64_t index = block_index() * Threads + thread_index(), heads = index / shape.keys;
  if (heads >= shape.batch * shape.key_heads) return;
  int32_t* places = parameters.places + index * kIndexChunks;
  int32_t sum = 0;
  for (int chunk = 0; chunk < kIndexChunks; ++chunk) {
    const int32_t count = places[chunk];
    places[chunk] = sum;
    sum += count;
  }
  parameters.starts[heads * (shape.keys + 1) + index % shape.keys] = sum;
}

// Numbers of rows become starts. A block for each key head, whose threads have a range of keys each.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads)
    index_starts_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  const int64_t keys = parameters.all.rows.problem.shape.keys, range = (keys + Threads - 1) / Threads;
  int32_t* starts = parameters.starts + block_index() * (keys + 1);
  int32_t* sums = reinterpret_cast<int32_t*>(shared_memory());
  const int64_t first = thread_index() * range, last = first + range < keys ? first + range : keys;
  int32_t sum = 0;
  for (int64_t key = first; key < last; ++key) sum += starts[key];
  sums[thread_index()] = sum;
  block_sync();
  int32_t start = 0;
  for (int i = 0; i < thread_index(); ++i) start += sums[i];
  for (int64_t key = first; key < last; ++key) {
    const int32_t count = starts[key];
    starts[key] = start;
    start += count;
  }
  if (thread_index() == Threads - 1) starts[keys] = start;
}

}  // namespace attnrb::cuda
