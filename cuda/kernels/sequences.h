// The sequences of a problem: all alike in a batch, each of its own size where they are ragged. Which rows and keys a
// block has, and where lies what belongs to them.
//
// Note: [Ragged rows]
// The rows of a key head are numbered through all sequences, G queries' worth of heads for each query, and tiles never
// hold rows of two sequences: the tiles of sequence b are those from floor(G start_b / 64) + b on. Since floor(y) -
// floor(x) + 1 is at least the ceiling of y - x, they are enough for its rows, and their number, floor(G T / 64) + B,
// is known without a look at device memory. Some stay empty. A block finds its sequence by a binary search and keeps
// what it found in shared memory: the kernels have no register to spare for it.
#pragma once

#include "keys.h"

namespace attnrb::cuda {

// Where row r of a key head's group stands.
struct RowPlace {
  int64_t query;
  int head;
};

struct EvenSequences {
  static constexpr bool ragged = false;

  static ATTNRB_DEVICE int64_t rows(const AttentionParameters& p) { return p.rows; }
  static ATTNRB_DEVICE int64_t keys(const AttentionParameters& p) { return p.problem.shape.keys; }
  static ATTNRB_DEVICE int64_t first_query(const AttentionParameters& /*p*/) { return 0; }
  // The numbers of a row, one each.
  static ATTNRB_DEVICE int64_t index(const AttentionParameters& p, int64_t batch, const RowPlace& place) {
    return (batch * p.problem.shape.heads + place.head) * p.problem.shape.queries + place.query;
  }
  static ATTNRB_DEVICE int64_t list(const AttentionParameters& p, int64_t batch, const RowPlace& place) {
    return p.problem.edit.list(p.problem.shape.heads, p.problem.shape.queries, batch, place.head, place.query);
  }
  // Row of Partials.
  static ATTNRB_DEVICE int64_t part(const AttentionParameters& p, int64_t batch, int64_t key_head, int64_t row) {
    return (batch * p.problem.shape.key_heads + key_head) * p.rows + row;
  }
  static ATTNRB_DEVICE const float* gain(const AttentionParameters& p, int64_t /*batch*/) {
    return p.problem.edit.gain;
  }
  template <class T>
  static ATTNRB_DEVICE HeadRows<T> key_rows(const AttentionParameters& /*p*/, const Operand& operand, int64_t batch,
                                            int64_t key_head) {
    return HeadRows<T>(operand, batch, key_head);
  }
};

// Where a block has a sequence of its own, it has entered it; `batch` is its number.
struct RaggedSequences {
  static constexpr bool ragged = true;

  static ATTNRB_DEVICE int64_t first_tile(const AttentionParameters& p, int64_t sequence) {
    return p.group * p.problem.shape.query_starts[sequence] / kTileRows + sequence;
  }

  // All threads of a block, once.
  static ATTNRB_DEVICE void enter(const AttentionParameters& p, int64_t tile) {
    if (thread_index() == 0) {
      int64_t low = 0, high = p.problem.shape.batch - 1;
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (first_tile(p, middle) <= tile)
          low = middle;
        else
          high = middle - 1;
      }
      const int64_t start = p.problem.shape.query_starts[low], end = p.problem.shape.query_starts[low + 1];
      int32_t* words = known(p);
      words[0] = int32_t(low);
      words[1] = int32_t(start);
      words[2] = int32_t((end - start) * p.group);
      words[3] = int32_t(p.problem.shape.key_counts[low]);
      words[4] = int32_t(tile - first_tile(p, low));
    }
    block_sync();
  }

  static ATTNRB_DEVICE int64_t number(const AttentionParameters& p) { return known(p)[0]; }
  static ATTNRB_DEVICE int64_t first_query(const AttentionParameters& p) { return known(p)[1]; }
  static ATTNRB_DEVICE int64_t rows(const AttentionParameters& p) { return known(p)[2]; }
  static ATTNRB_DEVICE int64_t keys(const AttentionParameters& p) { return known(p)[3]; }
  static ATTNRB_DEVICE int64_t tile_row(const AttentionParameters& p) { return int64_t(known(p)[4]) * kTileRows; }

  static ATTNRB_DEVICE int64_t index(const AttentionParameters& p, int64_t /*batch*/, const RowPlace& place) {
    return place.query * p.problem.shape.heads + place.head;
  }
  static ATTNRB_DEVICE int64_t list(const AttentionParameters& p, int64_t batch, const RowPlace& place) {
    return index(p, batch, place);
  }
  static ATTNRB_DEVICE int64_t part(const AttentionParameters& p, int64_t /*batch*/, int64_t key_head, int64_t row) {
    return key_head * p.rows + first_query(p) * p.group + row;
  }
  static ATTNRB_DEVICE const float* gain(const AttentionParameters& p, int64_t batch) {
    return p.problem.edit.gain + batch * p.problem.edit.gain_stride;
  }
  template <class T>
  static ATTNRB_DEVICE BlockRows<T> key_rows(const AttentionParameters& p, const Operand& operand, int64_t batch,
                                             int64_t key_head) {
    return BlockRows<T>(p, operand, batch, key_head);
  }

  // The sequence of a query.
  static ATTNRB_DEVICE int64_t of_query(const AttentionParameters& p, int64_t query) {
    int64_t low = 0, high = p.problem.shape.batch - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (p.problem.shape.query_starts[middle] <= query)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

 private:
  static ATTNRB_DEVICE int32_t* known(const AttentionParameters& p) {
    return reinterpret_cast<int32_t*>(shared_memory() + p.of_sequence);
  }
};

}  // namespace attnrb::cuda
