// Which rows have a key among their outliers: see Note: [Index of outliers].
#pragma once

#include "gradient_rows.h"
#include "sparse_gradient_parameters.h"

namespace attnrb::cuda {

ATTNRB_DEVICE int lowest_bit(unsigned x) { return count_bits((x & (0u - x)) - 1u); }

// A lane for each row of a key head's group: counts the rows of each key, or (`Fill`) puts them in place.
template <bool Fill>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads)
    index_rows_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  constexpr int kFlight = 4;
  const AttentionParameters& p = parameters.all.rows;
  const Shape& shape = p.problem.shape;
  const int lane = thread_index() % 32;
  const int64_t groups = (p.rows + 31) / 32, index = block_index() * kWarps + thread_index() / 32;
  const int64_t heads = index / groups, r = index % groups * 32 + lane;
  if (heads >= shape.batch * shape.key_heads) return;
  GradientRow row;
  OutlierList list;
  if (r < p.rows) {
    const uint32_t* words = parameters.all.words + 8 * (heads * p.rows + r);
    row.read(words, words + 4);
    if (row.buckets != 0) list = outliers_of(p, heads / shape.key_heads, row_place(p, heads % shape.key_heads, r));
  }
  int32_t* numbers = (Fill ? parameters.ends : parameters.counts) + heads * shape.keys;
  int32_t* entries = parameters.entries + heads * p.rows * p.problem.edit.capacity;
  for (int32_t first = 0; any(first < list.count); first += kFlight) {
    int32_t keys[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int64_t key =
          first + f < list.count ? int64_t(list.slots[first + f]) - p.problem.visibility.key_offset : -1;
      keys[f] = key >= row.low && key < row.high ? int32_t(key) : -1;
    }
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const unsigned same = match_any(keys[f]);
      const int leader = lowest_bit(same);
      int32_t at = 0;
      if (keys[f] >= 0 && lane == leader) at = atomic_add(numbers + keys[f], count_bits(same));
      if constexpr (Fill) {
        at = shuffle(at, leader) + count_bits(same & ((1u << lane) - 1));
        if (keys[f] >= 0) entries[at] = int32_t(r);
      }
    }
  }
}

// Gives each key room for its rows, and long keys a place among those and their parts. A thread for each key of a head.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads)
    index_starts_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  const int64_t keys = parameters.all.rows.problem.shape.keys, blocks = (keys + Threads - 1) / Threads;
  const int64_t heads = block_index() / blocks, key = block_index() % blocks * Threads + thread_index();
  const int64_t index = heads * keys + key;
  const int lane = thread_index() % 32;
  const int32_t count = key < keys ? parameters.counts[index] : 0;
  int32_t sum = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t before = shuffle(sum, lane - distance);
    if (lane >= distance) sum += before;
  }
  int32_t start = 0;
  if (lane == 31 && sum > 0) start = atomic_add(parameters.taken + heads, sum);
  start = shuffle(start, 31) + sum - count;
  if (key >= keys) return;
  parameters.starts[index] = parameters.ends[index] = start;
  if (count <= kPart) return;
  parameters.long_keys[atomic_add(parameters.totals, 1)] = int32_t(index);
  const int32_t parts = (count + kPart - 1) / kPart, first = atomic_add(parameters.totals + 1, parts);
  const bool room = first + parts <= parameters.most_parts;
  parameters.first_parts[index] = room ? first : -1;
  for (int32_t part = first; room && part < first + parts; ++part) parameters.part_keys[part] = int32_t(index) + 1;
}

// Puts the rows of long keys in order. A block for each in turn.
template <int Threads>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(Threads)
    index_order_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  const AttentionParameters& p = parameters.all.rows;
  const int64_t words = (p.rows + 31) / 32, range = (words + Threads - 1) / Threads;
  const int64_t first = thread_index() * range, last = first + range < words ? first + range : words;
  uint32_t* bits = parameters.bits + block_index() * words;
  int32_t* sums = reinterpret_cast<int32_t*>(shared_memory());
  for (int64_t i = block_index(); i < parameters.totals[0]; i += parameters.sorters) {
    const int64_t index = parameters.long_keys[i], heads = index / p.problem.shape.keys;
    int32_t* rows = parameters.entries + heads * p.rows * p.problem.edit.capacity + parameters.starts[index];
    const int32_t count = parameters.counts[index];
    for (int64_t word = thread_index(); word < words; word += Threads) bits[word] = 0;
    block_sync();
    for (int32_t c = thread_index(); c < count; c += Threads) atomic_or(bits + rows[c] / 32, 1u << (rows[c] % 32));
    block_sync();
    int32_t sum = 0;
    for (int64_t word = first; word < last; ++word) sum += count_bits(bits[word]);
    sums[thread_index()] = sum;
    block_sync();
    int32_t at = 0;
    for (int other = 0; other < thread_index(); ++other) at += sums[other];
    for (int64_t word = first; word < last; ++word)
      for (uint32_t left = bits[word]; left != 0; left &= left - 1) rows[at++] = int32_t(32 * word) + lowest_bit(left);
    block_sync();
  }
}

}  // namespace attnrb::cuda
