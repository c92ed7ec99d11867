// What a block of rows remembers between its passes: the tiles that it has to look at again, and words kept in shared
// memory.
#pragma once

#include "marks.h"

namespace attnrb::cuda {

// Tiles marked for the second pass, one bit each, or for several tiles where there are more than 1,024: lane l has word
// l.
struct TileMarks {
  uint32_t word = 0;
  int shift = 0;

  ATTNRB_DEVICE void start(int tiles) {
    word = 0;
    shift = 0;
    while ((tiles >> shift) >= 1024) ++shift;
  }
  ATTNRB_DEVICE void mark(int tile) {
    const int bit = tile >> shift;
    if (thread_index() % 32 == bit / 32) word |= 1u << (bit % 32);
  }
  // The first marked tile from `tile` on, or `end`. The same in all lanes.
  ATTNRB_DEVICE int next(int tile, int end) const {
    for (; tile < end; ++tile) {
      const int bit = tile >> shift;
      if ((shuffle(word, bit / 32) >> (bit % 32)) & 1u) return tile;
    }
    return end;
  }
  // Every warp gets the marks of all. `memory` holds 4 x 32 words that nobody else reads or writes.
  ATTNRB_DEVICE void join(uint32_t* memory) {
    memory[thread_index()] = word;
    block_sync();
    for (int warp = 0; warp < kWarps; ++warp) word |= memory[32 * warp + thread_index() % 32];
    block_sync();
  }
};

// This thread's words: see Note: [Kept words].
class KeptWords {
 public:
  ATTNRB_DEVICE explicit KeptWords(const AttentionParameters& p)
      : words(reinterpret_cast<uint32_t*>(shared_memory() + p.kept) + thread_index()) {}

  // Of the two rows, their heads and the keys that have a bias.
  ATTNRB_DEVICE uint32_t& bias_head(int i) const { return words[i * kThreads]; }
  ATTNRB_DEVICE uint32_t& bias_limit(int i) const { return words[(2 + i) * kThreads]; }
  ATTNRB_DEVICE uint32_t& first_in_group() const { return words[14 * kThreads]; }  // head of the warp's first row
  // The softmax of the rows' outliers (the sum is this lane's share), and the tiles that hold some.
  ATTNRB_DEVICE float chosen_max(int i) const { return bit_cast<float>(words[(4 + i) * kThreads]); }
  ATTNRB_DEVICE float chosen_sum(int i) const { return bit_cast<float>(words[(6 + i) * kThreads]); }
  ATTNRB_DEVICE void set_chosen(int i, float max, float sum) const {
    words[(4 + i) * kThreads] = bit_cast<uint32_t>(max);
    words[(6 + i) * kThreads] = bit_cast<uint32_t>(sum);
  }
  ATTNRB_DEVICE uint32_t& chosen_tiles() const { return words[8 * kThreads]; }
  // Where this lane is in the outlier list of a row.
  ATTNRB_DEVICE int cursor_position() const { return int(words[9 * kThreads]); }
  ATTNRB_DEVICE BoostCursor cursor() const {
    const uint64_t slots = uint64_t(words[12 * kThreads]) | uint64_t(words[13 * kThreads]) << 32;
    return {reinterpret_cast<const int32_t*>(slots), int32_t(words[10 * kThreads]), int32_t(words[11 * kThreads]),
            cursor_position()};
  }
  ATTNRB_DEVICE void set_cursor(const BoostCursor& cursor) const {
    const uint64_t slots = reinterpret_cast<uint64_t>(cursor.slots);
    words[9 * kThreads] = uint32_t(cursor.position);
    words[10 * kThreads] = uint32_t(cursor.count);
    words[11 * kThreads] = uint32_t(cursor.next);
    words[12 * kThreads] = uint32_t(slots);
    words[13 * kThreads] = uint32_t(slots >> 32);
  }

 private:
  uint32_t* words;
};

}  // namespace attnrb::cuda
