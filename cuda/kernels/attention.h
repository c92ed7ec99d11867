// Attention of 64 rows: a block of four warps, sixteen rows each, walks over tiles of keys and values.
//
// Note: [Two stages]
// Shared memory holds the query rows and two buffers. While a tile's scores are computed from the first, its values
// arrive in the second; while they are used, the next keys arrive in the first. One barrier before each use makes the
// copies visible to all warps and says that all are done with the other buffer.
//
// Note: [Two passes for outliers]
// The first pass computes output and log-sum-exp. An outlier at the end exceeded the running threshold when its tile
// was visited (Note: [One-pass outliers], csrc/core/kernels/rows.h), so the first pass marks the tiles in which some
// entry did, and the second computes scores anew for those alone and selects with the final threshold, in ascending
// order and straight into place: no buffer of candidates is needed.
#pragma once

#include "products.h"
#include "rows.h"

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

template <class T, int Width, Task task>
class AttentionBlock {
  using Tiles = Tile<T, Width>;
  static constexpr int kKeys = Tiles::keys;

 public:
  ATTNRB_DEVICE AttentionBlock(const AttentionParameters& parameters, int64_t block) : p(parameters) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % 32;
    warp = thread_index() / 32;
    split = int(block % p.splits);
    block /= p.splits;
    slice = int(block % p.slices);
    block /= p.slices;
    const int64_t heads = shape.batch * shape.key_heads;
    batch = block % heads / shape.key_heads;
    key_head = block % heads % shape.key_heads;
    // Under a causal mask the last rows see the most keys: their blocks come first.
    tile_row = (p.row_tiles - 1 - block / heads) * kTileRows;
    warp_row = tile_row + 16 * warp;

    T* memory = reinterpret_cast<T*>(shared_memory());
    query_stride = row_stride<T>(p.columns);
    value_stride = row_stride<T>(p.value_columns);
    queries = memory;
    first_buffer = queries + kTileRows * query_stride;
    buffer_size = kKeys * (query_stride > value_stride ? query_stride : value_stride);
  }

  ATTNRB_DEVICE bool wanted() const {
    return p.wanted_tiles == nullptr ||
           p.wanted_tiles[(batch * p.problem.shape.key_heads + key_head) * p.row_tiles + tile_row / kTileRows] != 0;
  }

  ATTNRB_DEVICE void run() {
    rows.start(p, batch, key_head, warp_row + lane / 4);
    if (p.wanted_rows != nullptr) leave_unwanted();
    if (task == Task::source) marks.start(int((p.problem.shape.keys + kKeys - 1) / kKeys));
    if (task == Task::rebalance) broken = cursor.start(p, batch, key_head, warp_row);
#pragma unroll
    for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] = 0.0f;

    set_key_tiles();
    load_queries();
    if (first_tile < last_tile) load_keys(first_tile, 0);
    commit_copies();
    for (int tile = first_tile; tile < last_tile; ++tile) visit(tile);
    wait_for_copies();

    float max[2], sum[2], boosted[2];
    bool seen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max[i] = rows.max[i];
      sum[i] = quad_sum(rows.sum[i]);
      boosted[i] = quad_sum(rows.boosted[i]);
      // In a partial tile each lane knows of its own keys only.
      seen[i] = quad_sum(rows.seen[i] ? 1.0f : 0.0f) != 0.0f;
      if (p.splits == 1 && rows.valid[i])
        join_sink(p, row_place(p, key_head, first_row() + 8 * i).head, max[i], sum[i], boosted[i]);
      if (!seen[i]) sum[i] = boosted[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) write_row(i, max[i], sum[i], boosted[i], seen[i]);
    if (task == Task::source) select(max, sum);
  }

 private:
  ATTNRB_DEVICE void leave_unwanted() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (rows.valid[i])
        rows.valid[i] =
            p.wanted_rows[(batch * p.problem.shape.key_heads + key_head) * p.rows + first_row() + 8 * i] != 0;
  }

  ATTNRB_DEVICE int64_t first_row() const { return warp_row + lane / 4; }

  // The tiles of keys that some row sees, and this block's share of them.
  ATTNRB_DEVICE void set_key_tiles() {
    const int64_t last_row = (tile_row + kTileRows < p.rows ? tile_row + kTileRows : p.rows) - 1;
    const Interval interval =
        visible_interval(p.problem.visibility, batch, tile_row / p.group, last_row / p.group + 1, p.problem.shape.keys);
    const int low = int(interval.low / kKeys), high = int((interval.high + kKeys - 1) / kKeys);
    const int tiles = interval.high > interval.low ? high - low : 0, share = (tiles + p.splits - 1) / p.splits;
    first_tile = low + (split * share < tiles ? split * share : tiles);
    last_tile = first_tile + share < low + tiles ? first_tile + share : low + tiles;
  }

  ATTNRB_DEVICE T* buffer(int which) const { return first_buffer + which * buffer_size; }

  ATTNRB_DEVICE void load_queries() {
    const T* base = static_cast<const T*>(p.query.data) + batch * p.query.strides[0];
    load_tile<T, kThreads>(queries, kTileRows, p.columns, p.query, 0, [&](int r) -> const T* {
      const int64_t row = tile_row + r;
      if (row >= p.rows) return nullptr;
      const RowPlace place = row_place(p, key_head, row);
      return base + place.head * p.query.strides[1] + place.query * p.query.strides[2];
    });
  }

  ATTNRB_DEVICE void load_operand(const Operand& operand, int columns, int first_column, int tile, int which) {
    const T* base = static_cast<const T*>(operand.data) + batch * operand.strides[0] + key_head * operand.strides[1];
    const int64_t first = int64_t(tile) * kKeys, left = p.problem.shape.keys - first;
    load_tile<T, kThreads>(buffer(which), kKeys, columns, operand, first_column, [&](int r) -> const T* {
      return r < left ? base + (first + r) * operand.strides[2] : nullptr;
    });
  }
  ATTNRB_DEVICE void load_keys(int tile, int which) { load_operand(p.key, p.columns, 0, tile, which); }
  ATTNRB_DEVICE void load_values(int tile) { load_operand(p.value, p.value_columns, slice * Width, tile, 1); }

  // One tile of both products. See Note: [Two stages].
  ATTNRB_DEVICE void visit(int tile) {
    const int first = tile * kKeys;
    const bool active = rows.active(first, first + kKeys);
    wait_for_copies();
    block_sync();
    if (task != Task::softmax) load_values(tile);
    commit_copies();
    float s[Tiles::score_tiles][4];
    if (active) score(s, buffer(0));
    wait_for_copies();
    block_sync();
    if (tile + 1 < last_tile) load_keys(tile + 1, 0);
    commit_copies();
    if (!active) return;

    const bool partial = rows.partial(p, first, first + kKeys);
    rows.finish_scores(p, s, first, partial);
    float factor[2], largest[2];
    rows.absorb(s, factor, largest);
    if (task == Task::source) mark_outliers(tile, largest);
    if (task == Task::softmax) return;
    if (task == Task::rebalance && cursor.any_before(first + kKeys)) strengthen(s, first);
    accumulate(s, factor, partial);
  }

  // s = query rows of this warp times the keys in `keys`.
  ATTNRB_DEVICE void score(float (&s)[Tiles::score_tiles][4], const T* keys) const {
    clear(s);
    multiply_rows(s, queries + 16 * warp * query_stride, keys, query_stride, p.columns);
  }

  // sums = factor * sums + probabilities times the values in the second buffer.
  ATTNRB_DEVICE void accumulate(const float (&s)[Tiles::score_tiles][4], const float (&factor)[2], bool partial) {
    if (any(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[n][e] *= factor[e / 2];
    }
    const T* values = buffer(1);
    // A hidden value of NaN or infinity must not meet a probability of zero: their product is NaN.
    if (!partial || all_finite(values)) {
      multiply_values<false>(s, values);
    } else {
      multiply_values<true>(s, values);
      add_non_finite(s, values);
    }
  }

  // `Finite`: what is not finite in the values counts as zero.
  template <bool Finite>
  ATTNRB_DEVICE void multiply_values(const float (&s)[Tiles::score_tiles][4], const T* values) {
#pragma unroll
    for (int step = 0; step < kKeys / Tiles::step; ++step) {
      uint32_t a[4];
      Engine<T>::probabilities(a, s, step);
#pragma unroll
      for (int n = 0; n < Tiles::value_tiles; n += 2) {
        if (n * 8 >= p.value_columns) break;
        uint32_t b[4];
        Engine<T>::values(b, values, value_stride, step, n * 8, lane);
        if (Finite) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] = Engine<T>::finite_part(b[i]);
        }
        Engine<T>::multiply(sums[n], a, b[0], b[1]);
        Engine<T>::multiply(sums[n + 1], a, b[2], b[3]);
      }
    }
  }

  // Adds the values that are not finite to the rows that see them: rare, and so one at a time.
  ATTNRB_DEVICE void add_non_finite(const float (&s)[Tiles::score_tiles][4], const T* values) {
    uint64_t sees[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (s[n][e] != 0.0f) sees[e / 2] |= uint64_t(1) << (8 * n + lane % 4 * 2 + e % 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sees[i] |= shuffle_xor(sees[i], 1);
      sees[i] |= shuffle_xor(sees[i], 2);
    }
#pragma unroll
    for (int n = 0; n < Tiles::value_tiles; ++n) {
      if (n * 8 >= p.value_columns) break;
#pragma unroll 1
      for (int key = 0; key < kKeys; ++key)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = to_float(values[key * value_stride + 8 * n + lane % 4 * 2 + e]);
          if (value - value == 0.0f) continue;
          if ((sees[0] >> key) & 1) sums[n][e] += value;
          if ((sees[1] >> key) & 1) sums[n][2 + e] += value;
        }
    }
  }

  // Each warp looks at the whole tile; only tiles with hidden keys are looked at.
  ATTNRB_DEVICE bool all_finite(const T* values) const {
    bool finite = true;
    for (int key = 0; key < kKeys; ++key)
      for (int column = lane; column < p.value_columns; column += 32) {
        const float value = to_float(values[key * value_stride + column]);
        finite = finite && value - value == 0.0f;
      }
    return !any(!finite);
  }

  // See Note: [Strengthened probabilities]: they have joined the row's sum already.
  ATTNRB_DEVICE void strengthen(float (&s)[Tiles::score_tiles][4], int first) {
    const uint64_t bits = cursor.take(p, first, kKeys);
    const uint64_t row_bits[2] = {shuffle(bits, lane / 4) >> (lane % 4 * 2),
                                  shuffle(bits, lane / 4 + 8) >> (lane % 4 * 2)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows.valid[i] || row_bits[i] == 0) continue;
      const Edit& edit = p.problem.edit;
      const float gain = edit.gain[row_place(p, key_head, first_row() + 8 * i).head * p.gain_stride];
#pragma unroll
      for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!((row_bits[i] >> (8 * n + e)) & 1)) continue;
          const float before = s[n][2 * i + e];
          s[n][2 * i + e] *= 1.0f + gain;
          // What the output really gains: rounded probabilities must not be divided by exact ones.
          if (edit.rule == Rule::row) rows.boosted[i] += to_float(from_float<T>(s[n][2 * i + e])) - before;
        }
    }
  }

  // See Note: [Two passes for outliers]. The sum is at least 1 from the first visible key on.
  ATTNRB_DEVICE void mark_outliers(int tile, const float (&largest)[2]) {
    const float slack = p.threshold_log2 - 1e-4f;
    if (!any((rows.valid[0] && largest[0] > rows.max[0] + slack) ||
             (rows.valid[1] && largest[1] > rows.max[1] + slack)))
      return;
    bool above = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(rows.sum[i]);
      above = above || (rows.valid[i] && largest[i] > rows.max[i] + log2f(sum) + slack);
    }
    if (any(above)) marks.mark(tile);
  }

  // Writes what is known of a row after its last key.
  ATTNRB_DEVICE void write_row(int i, float max, float sum, float boosted, bool seen) {
    const int64_t row = first_row() + 8 * i;
    if (!rows.valid[i]) return;
    const AttentionProblem& problem = p.problem;
    const RowPlace place = row_place(p, key_head, row);
    const int column = lane % 4 * 2, first_column = slice * Width;
    if (p.splits > 1) {
      const int64_t index = partial_index(row);
      if (lane % 4 == 0 && slice == 0) {
        float* state = p.partials.state + 4 * index;
        state[0] = max;
        state[1] = sum;
        state[2] = is_broken(i) ? bit_cast<float>(uint32_t(0x7fc00000u)) : boosted;
        state[3] = seen ? 1.0f : 0.0f;
      }
      if (task == Task::softmax) return;
      float* out = p.partials.sums + index * problem.shape.value_width + first_column;
#pragma unroll
      for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (first_column + 8 * n + column + e < problem.shape.value_width)
            out[8 * n + column + e] = sums[n][2 * i + e];
      return;
    }
    if (lane % 4 == 0 && slice == 0) {
      const int64_t index = (batch * problem.shape.heads + place.head) * problem.shape.queries + place.query;
      if (problem.lse != nullptr) problem.lse[index] = seen ? (max + log2f(sum + boosted)) * kLn2 : minus_infinity();
      if (problem.softmax != nullptr) {
        problem.softmax[2 * index] = max;
        problem.softmax[2 * index + 1] = sum;
      }
    }
    if (task == Task::softmax) return;
    const float denominator = sum + boosted;
    // Values were summed relative to the keys' own maximum, the denominator may stand relative to a sink.
    float by = seen ? exp2f(reference(rows.max[i]) - reference(max)) / denominator : 0.0f;
    if (is_broken(i)) by = bit_cast<float>(uint32_t(0x7fc00000u));
    T* out = static_cast<T*>(problem.output) + batch * problem.output_strides[0] +
             place.head * problem.output_strides[1] + place.query * problem.output_strides[2] + first_column;
#pragma unroll
    for (int n = 0; n < Tiles::value_tiles; ++n) {
      const int left = int(problem.shape.value_width) - (first_column + 8 * n + column);
      if (left <= 0) continue;
      T* at = out + 8 * n + column;
      at[0] = from_float<T>(sums[n][2 * i] * by);
      if (left > 1) at[1] = from_float<T>(sums[n][2 * i + 1] * by);
    }
  }

  ATTNRB_DEVICE bool is_broken(int i) const {
    return task == Task::rebalance && ((broken >> (lane / 4 + 8 * i)) & 1u) != 0;
  }

  ATTNRB_DEVICE int64_t partial_index(int64_t row) const {
    return ((batch * p.problem.shape.key_heads + key_head) * p.rows + row) * p.splits + split;
  }

  // The second pass of Note: [Two passes for outliers].
  ATTNRB_DEVICE void select(const float (&max)[2], const float (&sum)[2]) {
    if (slice != 0) return;
    // All warps are done with the first buffer: behind the last tile's scores there was a barrier.
    marks.join(reinterpret_cast<uint32_t*>(first_buffer));
    int32_t* found[2] = {nullptr, nullptr};
    float* scores[2] = {nullptr, nullptr};
    int32_t counts[2] = {0, 0};
    int own[2];
    float threshold[2];
    const AttentionProblem& problem = p.problem;
    const int64_t capacity = problem.emit.capacity;
    const int slot_offset = p.splits > 1 ? 0 : int(problem.visibility.key_offset);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      threshold[i] = max[i] + log2f(sum[i]) + p.threshold_log2;
      own[i] = -1;
      if (!rows.valid[i]) continue;
      const RowPlace place = row_place(p, key_head, first_row() + 8 * i);
      const int64_t position = problem.visibility.query_offset + place.query - problem.visibility.key_offset;
      if (position >= 0 && position < problem.shape.keys) own[i] = int(position);
      if (p.splits > 1) {
        found[i] = p.partials.candidates + partial_index(first_row() + 8 * i) * capacity;
        scores[i] = p.partials.candidate_scores + partial_index(first_row() + 8 * i) * capacity;
      } else {
        found[i] = problem.emit.indices +
                   ((batch * problem.shape.heads + place.head) * problem.shape.queries + place.query) * capacity;
      }
    }

    int tile = marks.next(first_tile, last_tile), which = 0;
    if (tile < last_tile) load_keys(tile, which);
    commit_copies();
    while (tile < last_tile) {
      const int next = marks.next(tile + 1, last_tile), first = tile * kKeys;
      wait_for_copies();
      block_sync();
      if (next < last_tile) load_keys(next, 1 - which);
      commit_copies();
      if (rows.active(first, first + kKeys)) {
        float s[Tiles::score_tiles][4];
        score(s, buffer(which));
        rows.finish_scores(p, s, first, rows.partial(p, first, first + kKeys));
#pragma unroll
        for (int i = 0; i < 2; ++i)
          take(s, i, first, threshold[i], own[i], found[i], scores[i], slot_offset, counts[i]);
      }
      tile = next;
      which = 1 - which;
    }
    wait_for_copies();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows.valid[i]) continue;
      const int32_t count = counts[i] < capacity ? counts[i] : int32_t(capacity);
      const int64_t row = first_row() + 8 * i;
      const RowPlace place = row_place(p, key_head, row);
      int32_t* total =
          p.splits > 1
              ? p.partials.candidate_counts + partial_index(row)
              : problem.emit.counts + (batch * problem.shape.heads + place.head) * problem.shape.queries + place.query;
      if (lane % 4 == 0) *total = count;
      if (p.splits == 1)
        for (int64_t c = count + lane % 4; c < capacity; c += 4) found[i][c] = -1;
    }
  }

  // Appends a row's outliers among a tile's scores, in ascending order.
  ATTNRB_DEVICE void take(const float (&s)[Tiles::score_tiles][4], int i, int first, float threshold, int own,
                          int32_t* found, float* scores, int slot_offset, int32_t& count) const {
    const int column = lane % 4 * 2;
    uint64_t mine = 0;
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (s[n][2 * i + e] > threshold && first + 8 * n + column + e != own)
          mine |= uint64_t(1) << (8 * n + column + e);
    if (!rows.valid[i]) mine = 0;
    if (!any(mine != 0)) return;
    uint64_t all = mine | shuffle_xor(mine, 1);
    all |= shuffle_xor(all, 2);
#pragma unroll
    for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = 8 * n + column + e;
        if (!((mine >> key) & 1)) continue;
        // See Note: [Outlier capacity].
        const int32_t at = count + count_bits(all & ((uint64_t(1) << key) - 1));
        if (at >= p.problem.emit.capacity) continue;
        found[at] = first + key + slot_offset;
        if (scores != nullptr) scores[at] = s[n][2 * i + e];
      }
    count += count_bits(all);
  }

  const AttentionParameters& p;
  int lane, warp, split, slice, query_stride, value_stride, buffer_size, first_tile, last_tile;
  int64_t batch, key_head, tile_row, warp_row;
  T *queries, *first_buffer;
  RowPair rows;
  TileMarks marks;
  BoostCursor cursor;
  unsigned broken = 0;
  float sums[Tiles::value_tiles][4];
};

// Left alone, ptxas spills a register of the softmax kernel to come below 96 or 128 of them: shared memory holds three
// blocks of it at a time, and that many registers do not press.
template <class T, int Width, Task task>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, task == Task::softmax ? 3 : 1)
    attention_kernel(ATTNRB_PARAMETERS AttentionParameters parameters) {
  AttentionBlock<T, Width, task> block(parameters, block_index());
  if (block.wanted()) block.run();
}

}  // namespace attnrb::cuda
