// The outliers of rows whose log-sum-exp is known: scores once more, and what exceeds LSE + ln(threshold).
#pragma once

#include "correction.h"
#include "products.h"

namespace attnrb::cuda {

// A block has 64 rows and walks over tiles of 64 keys, of which one is used while the next arrives.
template <class T>
class SelectBlock {
  static constexpr int kKeys = 128 / int(sizeof(T)), kTiles = kKeys / 8;

 public:
  ATTNRB_DEVICE SelectBlock(const SparseParameters& all, int64_t block) : parameters(all), p(all.rows) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % 32;
    const int64_t heads = shape.batch * shape.key_heads;
    batch = block % heads / shape.key_heads;
    key_head = block % heads % shape.key_heads;
    tile_row = (p.row_tiles - 1 - block / heads) * kTileRows;
    warp_row = tile_row + 16 * (thread_index() / 32);
    queries = reinterpret_cast<T*>(shared_memory());
  }

  ATTNRB_DEVICE void run() {
    rows.start(p, batch, key_head, warp_row + lane / 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) start_row(i);
    const int64_t last = (tile_row + kTileRows < p.rows ? tile_row + kTileRows : p.rows) - 1;
    const Interval seen =
        visible_interval(p.problem.visibility, batch, tile_row / p.group, last / p.group + 1, p.problem.shape.keys);
    int first = int(seen.low / kKeys) * kKeys;
    int which = 0;
    load_queries();
    if (first < seen.high) load_keys(first, which);
    commit_copies();
    for (; first < seen.high; first += kKeys) {
      wait_for_copies();
      block_sync();
      if (first + kKeys < seen.high) load_keys(first + kKeys, 1 - which);
      commit_copies();
      if (rows.active(first, first + kKeys)) {
        float s[kTiles][4];
        clear(s);
        multiply_rows<T, 128>(s, queries + 16 * (thread_index() / 32) * p.layout.stride, keys(which), p.layout,
                              p.columns);
        rows.template finish_scores<T>(p, s, first, rows.partial(p, first, first + kKeys));
        if (any(above(s))) {
#pragma unroll
          for (int i = 0; i < 2; ++i) take(s, i, first);
        }
      }
      which = 1 - which;
    }
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < 2; ++i) finish_row(i);
    look_for_doubt();
  }

 private:
  ATTNRB_DEVICE void start_row(int i) {
    counts[i] = 0;
    own[i] = -1;
    threshold[i] = 0.0f;
    if (!rows.valid[i]) return;
    const RowPlace place = row_place(p, key_head, warp_row + lane / 4 + 8 * i);
    const int64_t* strides = parameters.lse_strides;
    const float lse = parameters.dense_lse[batch * strides[0] + place.head * strides[1] + place.query * strides[2]];
    if (p.problem.lse != nullptr && lane % 4 == 0) p.problem.lse[row_index(i)] = lse;
    threshold[i] = lse * kLog2E + p.threshold_log2;
    own[i] = own_key(p, batch, place.query);
  }

  // See Note: [Doubtful rows].
  ATTNRB_DEVICE void look_for_doubt() const {
    using U = Unit<T>;
#pragma unroll 4
    for (int64_t row = warp_row; row < warp_row + 16 && row < p.rows; ++row) {
      const T* output = dense_row<T>(parameters, batch, row_place(p, key_head, row));
      bool finite = true;
      for (int column = lane * U::size; column < p.problem.shape.value_width; column += 32 * U::size)
        finite = finite && is_finite(*reinterpret_cast<const U*>(output + column));
      if (!finite) note_doubt(parameters, batch, key_head, row);
    }
  }

  ATTNRB_DEVICE int64_t row_index(int i) const {
    const Shape& shape = p.problem.shape;
    const RowPlace place = row_place(p, key_head, warp_row + lane / 4 + 8 * i);
    return (batch * shape.heads + place.head) * shape.queries + place.query;
  }

  ATTNRB_DEVICE T* keys(int which) const { return queries + (kTileRows + which * kKeys) * p.layout.stride; }

  ATTNRB_DEVICE void load_queries() {
    const T* base = static_cast<const T*>(p.query.data) + batch * p.query.strides[0];
    load_tile<T, kThreads>(
        queries, kTileRows, p.columns, p.query, 0,
        [&](int r) -> const T* {
          if (tile_row + r >= p.rows) return nullptr;
          const RowPlace place = row_place(p, key_head, tile_row + r);
          return base + place.head * p.query.strides[1] + place.query * p.query.strides[2];
        },
        p.layout);
  }

  ATTNRB_DEVICE void load_keys(int first, int which) {
    const HeadRows<T> rows_of_head(p.key, batch, key_head);
    const int64_t left = p.problem.shape.keys - first;
    if (p.columns <= 8 * Unit<T>::size)
      load_keys_of_tile<T, kThreads, kKeys, 8>(keys(which), p.columns, p.key, 0, rows_of_head, first, left, p.layout);
    else
      load_keys_of_tile<T, kThreads, kKeys, 16>(keys(which), p.columns, p.key, 0, rows_of_head, first, left, p.layout);
  }

  // Whether some score of this lane is above its row's threshold, be it that of the own key: a comparison each. Most
  // tiles have none, and end with one vote.
  ATTNRB_DEVICE bool above(const float (&s)[kTiles][4]) const {
    bool found = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) found = found || s[n][e] > threshold[e / 2];
    return found;
  }

  // Appends the row's outliers in the tile, in ascending order.
  ATTNRB_DEVICE void take(const float (&s)[kTiles][4], int i, int first) {
    uint64_t mine = 0;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = 8 * n + lane % 4 * 2 + e;
        if (s[n][2 * i + e] > threshold[i] && first + key != own[i]) mine |= uint64_t(1) << key;
      }
    if (!rows.valid[i]) mine = 0;
    if (!any(mine != 0)) return;
    uint64_t all = mine | shuffle_xor(mine, 1);
    all |= shuffle_xor(all, 2);
    if (mine != 0) {
      const Emit& emit = p.problem.emit;
      int32_t* found = emit.indices + row_index(i) * emit.capacity;
      for (int key = 0; key < kKeys; ++key) {
        if (!((mine >> key) & 1)) continue;
        // See Note: [Outlier capacity].
        const int32_t at = counts[i] + count_bits(all & ((uint64_t(1) << key) - 1));
        if (at < emit.capacity) found[at] = first + key + int32_t(p.problem.visibility.key_offset);
      }
    }
    counts[i] += count_bits(all);
  }

  ATTNRB_DEVICE void finish_row(int i) {
    if (!rows.valid[i]) return;
    const Emit& emit = p.problem.emit;
    const int64_t row = row_index(i);
    const int32_t count = counts[i] < emit.capacity ? counts[i] : int32_t(emit.capacity);
    if (lane % 4 == 0) emit.counts[row] = count;
    for (int64_t c = count + lane % 4; c < emit.capacity; c += 4) emit.indices[row * emit.capacity + c] = -1;
  }

  const SparseParameters& parameters;
  const AttentionParameters& p;
  int lane;
  int64_t batch, key_head, tile_row, warp_row;
  T* queries;
  RowPair rows;
  float threshold[2];
  int own[2];
  int32_t counts[2];
};

template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 2) select_kernel(ATTNRB_PARAMETERS SparseParameters parameters) {
  SelectBlock<T> block(parameters, block_index());
  block.run();
}

}  // namespace attnrb::cuda
