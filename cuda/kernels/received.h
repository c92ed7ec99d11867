// Column means of the weights. A first launch of the attention kernel leaves every row's softmax; here a block keeps a
// tile of keys and walks over the queries. Sums are added in one order, so equal inputs give equal bits.
#pragma once

#include "bias.h"

namespace attnrb::cuda {

template <class T, int Width, bool Biased>
class ReceivedBlock {
  using Tiles = Tile<T, Width>;
  static constexpr int kKeys = Tiles::keys;

 public:
  ATTNRB_DEVICE ReceivedBlock(const ReceivedParameters& parameters, int64_t block)
      : p(parameters.rows), received(parameters.received), stages(parameters.stages) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % 32;
    warp = thread_index() / 32;
    const int64_t heads = shape.batch * shape.heads;
    batch = block % heads / shape.heads;
    head = block % heads % shape.heads;
    first_key = int(block / heads * kKeys);
    stride = row_stride<T>(p.columns);
    keys = reinterpret_cast<T*>(shared_memory());
    queries = keys + kKeys * stride;
  }

  ATTNRB_DEVICE void run() {
    const Shape& shape = p.problem.shape;
    const int64_t key_head = head / (shape.heads / shape.key_heads), left = shape.keys - first_key;
    const HeadRows<T> rows_of_head(p.key, batch, key_head);
    load_tile<T, kThreads>(keys, kKeys, p.columns, p.key, 0,
                           [&](int r) -> const T* { return r < left ? rows_of_head.row(first_key + r) : nullptr; });
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[n][e] = 0.0f, counts[n][e] = 0;

    int64_t tile = next_tile(0);
    int which = 0;
    if (tile < p.row_tiles) load_queries(tile, which);
    commit_copies();
    while (tile < p.row_tiles) {
      const int64_t next = next_tile(tile + 1);
      wait_for_copies();
      block_sync();
      if (stages == 2 && next < p.row_tiles) load_queries(next, 1 - which);
      commit_copies();
      visit(tile, which);
      if (stages == 1) {
        block_sync();
        if (next < p.row_tiles) load_queries(next, 0);
        commit_copies();
      }
      tile = next;
      which = stages - 1 - which;
    }
    wait_for_copies();
    finish();
  }

 private:
  // The first tile of queries from `tile` on of which one may see one of the keys.
  ATTNRB_DEVICE int64_t next_tile(int64_t tile) const {
    for (; tile < p.row_tiles; ++tile) {
      const int64_t first = tile * kTileRows, last = first + kTileRows < p.rows ? first + kTileRows : p.rows;
      const Interval seen = visible_interval(p.problem.visibility, batch, first, last, p.problem.shape.keys);
      if (seen.high > first_key && seen.low < first_key + kKeys) break;
    }
    return tile;
  }

  ATTNRB_DEVICE void load_queries(int64_t tile, int which) {
    const T* base = static_cast<const T*>(p.query.data) + batch * p.query.strides[0] + head * p.query.strides[1];
    const int64_t first = tile * kTileRows;
    load_tile<T, kThreads>(
        queries + which * kTileRows * stride, kTileRows, p.columns, p.query, 0,
        [&](int r) -> const T* { return first + r < p.rows ? base + (first + r) * p.query.strides[2] : nullptr; });
  }

  ATTNRB_DEVICE void visit(int64_t tile, int which) {
    const int64_t first_row = tile * kTileRows + 16 * warp + lane / 4;
    RowPair rows;
    rows.start(p, batch, head, first_row);
    if (!rows.active(first_key, first_key + kKeys)) return;

    float s[Tiles::score_tiles][4];
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
    const T* query = queries + which * kTileRows * stride + (16 * warp + lane % 16) * stride + lane / 16 * Tiles::unit;
    const T* key = keys + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * Tiles::unit;
    for (int column = 0; column < p.columns; column += Tiles::step) {
      uint32_t a[4];
      load_matrices(a, query + column);
#pragma unroll
      for (int n = 0; n < Tiles::score_tiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, key + n * 8 * stride + column);
        Engine<T>::multiply(s[n], a, b[0], b[1]);
        Engine<T>::multiply(s[n + 1], a, b[2], b[3]);
      }
    }
    const bool partial = rows.partial(p, first_key, first_key + kKeys);
    rows.template scale_scores<T>(p, s);
    uint32_t removed = 0;
    if (Biased) {
      BiasPair bias;
      bias.start(p, batch, head, first_row);
      removed = bias.add(p, batch, head, 0, s, first_key);
    }

    float from[2] = {0.0f, 0.0f}, share[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows.valid[i]) continue;
      const float* softmax = p.problem.softmax +
                             2 * ((batch * p.problem.shape.heads + head) * p.problem.shape.queries + first_row + 8 * i);
      from[i] = reference(softmax[0]);
      share[i] = softmax[1] == 0.0f ? 0.0f : 1.0f / softmax[1];
    }
    const int column = first_key + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = e / 2;
        const bool shown = rows.valid[i] && !((removed >> (4 * n + e)) & 1u) &&
                           (!partial || rows.visible(p, i, column + 8 * n + e % 2));
        // A row whose softmax is NaN must not reach the keys that it does not see.
        sums[n][e % 2] += shown ? fast_exp2(s[n][e] - from[i]) * share[i] : 0.0f;
        counts[n][e % 2] += shown ? 1 : 0;
      }
  }

  ATTNRB_DEVICE void finish() {
    float* warp_sums = reinterpret_cast<float*>(shared_memory());
    int* warp_counts = reinterpret_cast<int*>(warp_sums + kWarps * kKeys);
    block_sync();
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = sums[n][e];
        int count = counts[n][e];
        for (int mask = 4; mask < 32; mask *= 2) {
          sum += shuffle_xor(sum, mask);
          count += shuffle_xor(count, mask);
        }
        if (lane < 4) {
          warp_sums[warp * kKeys + 8 * n + 2 * lane + e] = sum;
          warp_counts[warp * kKeys + 8 * n + 2 * lane + e] = count;
        }
      }
    block_sync();
    const int key = thread_index();
    if (key >= kKeys || first_key + key >= p.problem.shape.keys) return;
    float sum = 0.0f;
    int count = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += warp_sums[w * kKeys + key];
      count += warp_counts[w * kKeys + key];
    }
    received[(batch * p.problem.shape.heads + head) * p.problem.shape.keys + first_key + key] =
        count > 0 ? sum / float(count) : 0.0f;
  }

  const AttentionParameters& p;
  float* received;
  int stages;  // of queries in shared memory
  int lane, warp, first_key, stride;
  int64_t batch, head;
  T *keys, *queries;
  float sums[Tiles::score_tiles][2];
  int counts[Tiles::score_tiles][2];
};

// `Biased`: scores have a key bias. Left alone, ptxas spills a few registers there to come down to 128.
template <class T, int Width, bool Biased>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, Biased ? 2 : 1)
    received_kernel(ATTNRB_PARAMETERS ReceivedParameters parameters) {
  ReceivedBlock<T, Width, Biased> block(parameters, block_index());
  block.run();
}

}  // namespace attnrb::cuda
