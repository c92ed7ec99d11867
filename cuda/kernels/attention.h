// Attention of 64 rows: a block of four warps, sixteen rows each, walks over tiles of keys and values.
//
// Note: [Two stages]
// Shared memory holds the query rows and two buffers. While a tile's scores are computed from the first, its values
// arrive in the second; while they are used, the next keys arrive in the first. One barrier before each use makes the
// copies visible to all warps and says that all are done with the other buffer. Where a multiprocessor has room for a
// third buffer in each of two blocks, keys take turns in two of them: the next are under way together with the values.
//
// Note: [Two passes for outliers]
// The first pass computes output and log-sum-exp. An outlier at the end exceeded the running threshold when its tile
// was visited (Note: [One-pass outliers], csrc/core/kernels/rows.h), so the first pass marks the tiles in which some
// entry did, and the second computes scores anew for those alone and selects with the final threshold, in ascending
// order and straight into place: no buffer of candidates is needed.
#pragma once

#include "bias.h"
#include "kept_words.h"
#include "products.h"
#include "ragged.h"
#include "rest.h"
#include "row_outliers.h"
#include "values.h"

namespace attnrb::cuda {

template <class T, int Width, Task task, class Sequences = EvenSequences>
class AttentionBlock {
  using Tiles = Tile<T, Width>;
  static constexpr int kKeys = Tiles::keys;
  static constexpr bool kRest = task == Task::rest, kEdited = task == Task::edited || kRest;
  static constexpr bool kBiased = may_have_bias(task);
  static constexpr bool kValues = task != Task::softmax && task != Task::biased_softmax;
  static constexpr bool kMayEmit = kEdited || task == Task::source;
  static constexpr bool kMayBoost = kEdited || task == Task::rebalance;
  static constexpr bool kCommon = has_third_buffer(task, Width, sizeof(T));

 public:
  ATTNRB_DEVICE AttentionBlock(const AttentionParameters& parameters, int64_t block) : p(parameters) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % 32;
    warp = thread_index() / 32;
    split = int(block % p.splits);
    block /= p.splits;
    slice = int(block % p.slices);
    block /= p.slices;
    const int64_t heads = Sequences::ragged ? shape.key_heads : shape.batch * shape.key_heads;
    // Under a causal mask the last rows see the most keys: their blocks come first.
    const int64_t tile = p.row_tiles - 1 - block / heads;
    key_head = block % heads % shape.key_heads;
    if constexpr (Sequences::ragged) {
      Sequences::enter(p, tile);
      batch = Sequences::number(p);
      tile_row = Sequences::tile_row(p);
    } else {
      batch = block % heads / shape.key_heads;
      tile_row = tile * kTileRows;
    }
    warp_row = tile_row + 16 * warp;

    T* memory = reinterpret_cast<T*>(shared_memory());
    queries = memory;
    first_buffer = queries + kTileRows * p.layout.stride;
  }

  ATTNRB_DEVICE bool wanted() const {
    return p.wanted_tiles == nullptr ||
           p.wanted_tiles[(batch * p.problem.shape.key_heads + key_head) * p.row_tiles + tile_row / kTileRows] != 0;
  }

  // Of ragged sequences: whether the tile has rows, and those have keys.
  ATTNRB_DEVICE bool has_rows() const { return tile_row < Sequences::rows(p); }
  ATTNRB_DEVICE bool has_keys() const { return Sequences::keys(p) > 0; }
  // Where they have none, one block of those that share the rows says so.
  ATTNRB_DEVICE void leave_without_keys() const {
    if (split == 0 && slice == 0) attnrb::cuda::leave_without_keys<T>(p, key_head, warp_row);
  }

  ATTNRB_DEVICE void run() {
    rows.template start<Sequences>(p, batch, key_head, first_row());
    if (kBiased && has_bias()) keep_bias();
    if (p.wanted_rows != nullptr) leave_unwanted();
    if (kMayEmit) marks.start(tiles_of_keys());
    if (kMayBoost) broken = cursor.template start<Sequences>(p, batch, key_head, warp_row);
    if (kEdited) KeptWords(p).set_cursor(cursor);
    if (kRest) {
      const KeptWords kept(p);
      for (int i = 0; i < 2; ++i) kept.set_chosen(i, minus_infinity(), 0.0f);
      kept.chosen_tiles() = 0;
    }
    clear(sums);

    set_key_tiles();
    load_queries();
    if (first_tile < last_tile) load_keys(first_tile, 0);
    commit_copies();
    int keys_in = 0;
    for (int tile = first_tile; tile < last_tile; ++tile) {
      const int next_in = ahead() && keys_in == 0 ? kSecond : 0;
      visit(tile, keys_in, next_in);
      keys_in = next_in;
    }
    wait_for_copies();
    finish();
  }

 private:
  // Of a row after its last key.
  struct RowEnd {
    float max, sum, boosted;
    bool seen;
  };

  ATTNRB_DEVICE void keep_bias() const {
    BiasPair bias;
    bias.template start<Sequences>(p, batch, key_head, first_row());
    const KeptWords kept(p);
    kept.first_in_group() = uint32_t(warp_row % p.group);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first_row() + 8 * i;
      kept.bias_head(i) = uint32_t(place_of(row < Sequences::rows(p) ? row : Sequences::rows(p) - 1).head);
      kept.bias_limit(i) = uint32_t(bias.row[i].limit);
    }
  }
  ATTNRB_DEVICE BiasPair kept_bias() const {
    const KeptWords kept(p);
    BiasPair bias;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bias.row[i].aim(p, batch, int(kept.bias_head(i)));
      bias.row[i].limit = int(kept.bias_limit(i));
    }
    return bias;
  }
  // As many tiles to a bit as there are of those that hold outliers to be found.
  ATTNRB_DEVICE TileMarks chosen_marks() const { return {KeptWords(p).chosen_tiles(), marks.shift}; }

  ATTNRB_DEVICE bool has_bias() const { return p.problem.edit.key_bias != nullptr; }
  ATTNRB_DEVICE bool emits() const { return kMayEmit && (!kEdited || p.problem.emit.indices != nullptr); }
  ATTNRB_DEVICE int tiles_of_keys() const { return int((Sequences::keys(p) + kKeys - 1) / kKeys); }

  ATTNRB_DEVICE void finish() {
    RowEnd end[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // In a partial tile each lane knows of its own keys only.
      end[i] = {rows.max[i], quad_sum(rows.sum[i]), quad_sum(rows.boosted[i]),
                quad_sum(rows.seen[i] ? 1.0f : 0.0f) != 0.0f};
      if (p.splits == 1 && rows.valid[i]) join_sink(p, head_of(i), end[i].max, end[i].sum, end[i].boosted);
      if (!end[i].seen) end[i].sum = end[i].boosted = 0.0f;
    }
    if constexpr (kRest) {
      finish_rest(end);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Values were summed relative to the keys' own maximum, the denominator may stand relative to a sink.
        const float own = exp2f(reference(rows.max[i]) - reference(end[i].max));
        write_row(i, end[i], end[i].seen ? own / (end[i].sum + end[i].boosted) : 0.0f);
      }
    }
    if (emits()) select(end);
  }

  // See Note: [Rule rest on the device]. The ends are those of the others' softmax, and become the whole row's.
  ATTNRB_DEVICE void finish_rest(RowEnd (&end)[2]) {
    const KeptWords kept(p);
    float of_chosen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float chosen_max = kept.chosen_max(i), chosen_sum = quad_sum(kept.chosen_sum(i));
      const RestShares shares =
          rest_shares(end[i].max, end[i].sum, chosen_max, chosen_sum, rows.valid[i] ? gain_at(i) : 0.0f);
      of_chosen[i] = 1.0f;
      if (p.splits == 1) {
        const float own = exp2f(reference(rows.max[i]) - reference(end[i].max));
        const float of_rest = end[i].sum == 0.0f ? 0.0f : own * (shares.of_rest / end[i].sum);
#pragma unroll
        for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) sums[n][e] *= of_rest;
        of_chosen[i] = chosen_sum == 0.0f ? 0.0f : shares.of_chosen / chosen_sum;
      } else {
        write_part(i, end[i], p.partials.state, p.partials.sums);
        const RowEnd of_outliers{chosen_max, chosen_sum, 0.0f, end[i].seen};
        write_state(i, of_outliers, p.partials.chosen_state);
#pragma unroll
        for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) sums[n][e] = 0.0f;
      }
      end[i].max = shares.max;
      end[i].sum = shares.sum;
    }
    add_chosen(of_chosen);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (p.splits == 1)
        write_row(i, end[i], 1.0f);
      else
        write_sums(i, p.partials.chosen_sums);
  }

  ATTNRB_DEVICE void leave_unwanted() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (rows.valid[i])
        rows.valid[i] =
            p.wanted_rows[(batch * p.problem.shape.key_heads + key_head) * p.rows + first_row() + 8 * i] != 0;
  }

  ATTNRB_DEVICE int64_t first_row() const { return warp_row + lane / 4; }
  ATTNRB_DEVICE RowPlace place_of(int64_t row) const { return row_place<Sequences>(p, key_head, row); }
  ATTNRB_DEVICE int head_of(int i) const { return place_of(first_row() + 8 * i).head; }
  ATTNRB_DEVICE float gain_at(int i) const { return gain_of<Sequences>(p, batch, head_of(i)); }

  // The tiles of keys that some row sees, and this block's share of them.
  ATTNRB_DEVICE void set_key_tiles() {
    const int64_t count = Sequences::rows(p), first_query = Sequences::first_query(p);
    const int64_t last_row = (tile_row + kTileRows < count ? tile_row + kTileRows : count) - 1;
    const Interval interval = visible_interval(p.problem.visibility, batch, first_query + tile_row / p.group,
                                               first_query + last_row / p.group + 1, Sequences::keys(p));
    const int low = int(interval.low / kKeys), high = int((interval.high + kKeys - 1) / kKeys);
    const int tiles = interval.high > interval.low ? high - low : 0, share = (tiles + p.splits - 1) / p.splits;
    first_tile = low + (split * share < tiles ? split * share : tiles);
    last_tile = first_tile + share < low + tiles ? first_tile + share : low + tiles;
  }

  ATTNRB_DEVICE int value_stride() const { return row_stride<T>(p.value_columns); }
  ATTNRB_DEVICE bool ahead() const { return kCommon && p.ahead; }
  // The second buffer of keys, where there is one; without values it is theirs.
  static constexpr int kSecond = kValues ? 2 : 1;
  ATTNRB_DEVICE T* buffer(int which) const {
    const int keys = kKeys * p.layout.stride, values = kKeys * value_stride();
    return first_buffer + (which == 0 ? 0 : which == 1 ? keys : keys + (keys > values ? keys : values));
  }

  ATTNRB_DEVICE void load_queries() {
    const T* base = static_cast<const T*>(p.query.data) + batch * p.query.strides[0];
    load_tile<T, kThreads>(
        queries, kTileRows, p.columns, p.query, 0,
        [&](int r) -> const T* {
          const int64_t row = tile_row + r;
          if (row >= Sequences::rows(p)) return nullptr;
          const RowPlace place = place_of(row);
          return base + place.head * p.query.strides[1] + place.query * p.query.strides[2];
        },
        p.layout);
  }

  ATTNRB_DEVICE void load_operand(const Operand& operand, int columns, int first_column, int tile, int which,
                                  RowLayout of_rows) {
    const auto keys = Sequences::template key_rows<T>(p, operand, batch, key_head);
    const int64_t first = int64_t(tile) * kKeys, left = Sequences::keys(p) - first;
    if constexpr (kCommon)
      load_keys_of_tile<T, kThreads, kKeys, Width / Tiles::unit>(buffer(which), columns, operand, first_column, keys,
                                                                 first, left, of_rows);
    else
      load_tile<T, kThreads>(
          buffer(which), kKeys, columns, operand, first_column,
          [&](int r) -> const T* { return r < left ? keys.row(first + r) : nullptr; }, of_rows);
  }
  ATTNRB_DEVICE void load_keys(int tile, int which) { load_operand(p.key, p.columns, 0, tile, which, p.layout); }
  ATTNRB_DEVICE void load_values(int tile) {
    load_operand(p.value, p.value_columns, slice * Width, tile, 1, {value_stride(), 0});
  }

  // One tile of both products, whose keys are in the buffer `keys_in`. See Note: [Two stages].
  ATTNRB_DEVICE void visit(int tile, int keys_in, int next_in) {
    const int first = tile * kKeys;
    const bool active = rows.active(first, first + kKeys), more = tile + 1 < last_tile;
    wait_for_copies();
    block_sync();
    if (kValues) load_values(tile);
    commit_copies();
    if (ahead() && more) load_keys(tile + 1, next_in);
    commit_copies();
    float s[Tiles::score_tiles][4];
    if (active) score(s, buffer(keys_in));
    wait_for_copies_before_last();
    block_sync();
    if (!ahead() && more) load_keys(tile + 1, next_in);
    commit_copies();
    if (!active) return;

    bool partial = finish_scores(s, first);
    const bool found = kMayBoost && any(next_outlier() < first + kKeys);
    if (found && kRest) {
      TileMarks chosen = chosen_marks();
      chosen.mark(tile);
      KeptWords(p).chosen_tiles() = chosen.word;
      set_aside(s, first);
      // Outliers have a weight of zero here, which must not meet a value of NaN or infinity.
      partial = true;
    }
    float factor[2], largest[2];
    rows.absorb(s, factor, largest);
    if (emits()) mark_outliers(tile, largest, found && kRest);
    if (!kValues) return;
    if (found && !kRest) strengthen(s, first);
    accumulate(s, factor, partial);
  }

  // Products become scores; whether some of them are hidden.
  ATTNRB_DEVICE bool finish_scores(float (&s)[Tiles::score_tiles][4], int first) {
    bool partial = rows.partial(p, first, first + kKeys);
    if (!kBiased || !has_bias()) {
      rows.template finish_scores<T>(p, s, first, partial);
      return partial;
    }
    rows.template scale_scores<T>(p, s);
    const uint32_t removed = kept_bias().add(p, batch, key_head, int(KeptWords(p).first_in_group()), s, first);
    partial = partial || any(removed != 0);
    rows.hide_scores(p, s, first, partial, removed);
    return partial;
  }

  // s = query rows of this warp times the keys in `keys`.
  ATTNRB_DEVICE void score(float (&s)[Tiles::score_tiles][4], const T* keys) const {
    clear(s);
    multiply_rows<T, kCommon ? Width : 0>(s, queries + 16 * warp * p.layout.stride, keys, p.layout, p.columns);
  }

  // sums = factor * sums + probabilities times the values in the second buffer.
  ATTNRB_DEVICE void accumulate(const float (&s)[Tiles::score_tiles][4], const float (&factor)[2], bool partial) {
    const ValueTile<T, Width, kCommon> values{buffer(1), value_stride(), p.value_columns, lane};
    values.accumulate(sums, s, factor, partial);
  }

  // See Note: [Strengthened probabilities]: they have joined the row's sum already.
  ATTNRB_DEVICE void strengthen(float (&s)[Tiles::score_tiles][4], int first) {
    uint64_t row_bits[2];
    take_outliers(first, row_bits);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows.valid[i] || row_bits[i] == 0) continue;
      const float gain = gain_at(i);
#pragma unroll
      for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!((row_bits[i] >> (8 * n + e)) & 1)) continue;
          const float before = s[n][2 * i + e];
          s[n][2 * i + e] *= 1.0f + gain;
          // What the output really gains: rounded probabilities must not be divided by exact ones.
          if (p.problem.edit.rule == Rule::row) rows.boosted[i] += widen(narrow<T>(s[n][2 * i + e])) - before;
        }
    }
  }

  ATTNRB_DEVICE int next_outlier() const { return kEdited ? KeptWords(p).cursor_position() : cursor.position; }

  // The outliers of this lane's rows in a tile: bit 8 n + e for this lane's element e of score tile n.
  ATTNRB_DEVICE void take_outliers(int first, uint64_t (&row_bits)[2]) {
    uint64_t bits = 0;
    if (kEdited) {
      const KeptWords kept(p);
      BoostCursor at = kept.cursor();
      bits = at.take(p, first, kKeys);
      kept.set_cursor(at);
    } else {
      bits = cursor.take(p, first, kKeys);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) row_bits[i] = shuffle(bits, lane / 4 + 8 * i) >> (lane % 4 * 2);
  }

  // Takes the outliers' scores out of a tile and adds them to their own softmax: see Note: [Rule rest on the device].
  ATTNRB_DEVICE void set_aside(float (&s)[Tiles::score_tiles][4], int first) {
    const KeptWords kept(p);
    uint64_t row_bits[2];
    take_outliers(first, row_bits);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = minus_infinity();
#pragma unroll
      for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if ((row_bits[i] >> (8 * n + e)) & 1) largest = fmaxf(largest, s[n][2 * i + e]);
      const float high = fmaxf(kept.chosen_max(i), quad_max(largest)), from = reference(high);
      float sum = kept.chosen_sum(i) * fast_exp2(kept.chosen_max(i) - from);
#pragma unroll
      for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!((row_bits[i] >> (8 * n + e)) & 1)) continue;
          sum += fast_exp2(s[n][2 * i + e] - from);
          s[n][2 * i + e] = minus_infinity();
        }
      kept.set_chosen(i, high, sum);
    }
  }

  // Adds factor times the outliers' values, weighed relative to their maximum, to the sums.
  ATTNRB_DEVICE void add_chosen(const float (&factor)[2]) {
    TileMarks chosen = chosen_marks();
    chosen.join(reinterpret_cast<uint32_t*>(first_buffer));
    BoostCursor start = KeptWords(p).cursor();
    start.restart(p);
    KeptWords(p).set_cursor(start);
    for (int tile = chosen.next(first_tile, last_tile); tile < last_tile; tile = chosen.next(tile + 1, last_tile)) {
      const int first = tile * kKeys;
      load_keys(tile, 0);
      load_values(tile);
      commit_copies();
      wait_for_copies();
      block_sync();
      if (rows.active(first, first + kKeys)) {
        float s[Tiles::score_tiles][4];
        score(s, buffer(0));
        finish_scores(s, first);
        const KeptWords kept(p);
        uint64_t row_bits[2];
        take_outliers(first, row_bits);
#pragma unroll
        for (int n = 0; n < Tiles::score_tiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = e / 2;
            const bool taken = (row_bits[i] >> (8 * n + e % 2)) & 1;
            s[n][e] = taken ? fast_exp2(s[n][e] - reference(kept.chosen_max(i))) * factor[i] : 0.0f;
          }
        const float unchanged[2] = {1.0f, 1.0f};
        accumulate(s, unchanged, true);
      }
      block_sync();
    }
  }

  // See Note: [Two passes for outliers]. The sum is at least 1 from the first visible key on.
  // `certainly`: scores were set aside, of which `largest` does not tell.
  ATTNRB_DEVICE void mark_outliers(int tile, const float (&largest)[2], bool certainly) {
    if (certainly) marks.mark(tile);
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

  // Writes what is known of a row after its last key; `by`: what its sums are multiplied by.
  ATTNRB_DEVICE void write_row(int i, const RowEnd& end, float by) {
    if (!rows.valid[i]) return;
    if (p.splits > 1) {
      write_part(i, end, p.partials.state, p.partials.sums);
      return;
    }
    const AttentionProblem& problem = p.problem;
    const RowPlace place = place_of(first_row() + 8 * i);
    const int column = lane % 4 * 2, first_column = slice * Width;
    if (lane % 4 == 0 && slice == 0) {
      const int64_t index = Sequences::index(p, batch, place);
      if (problem.lse != nullptr)
        problem.lse[index] = end.seen ? (end.max + log2f(end.sum + end.boosted)) * kLn2 : minus_infinity();
      if (problem.softmax != nullptr) {
        problem.softmax[2 * index] = end.max;
        problem.softmax[2 * index + 1] = end.sum;
      }
    }
    if (!kValues) return;
    if (is_broken(i)) by = bit_cast<float>(uint32_t(0x7fc00000u));
    T* out = static_cast<T*>(problem.output) + batch * problem.output_strides[0] +
             place.head * problem.output_strides[1] + place.query * problem.output_strides[2] + first_column;
#pragma unroll
    for (int n = 0; n < Tiles::value_tiles; ++n) {
      const int left = int(problem.shape.value_width) - (first_column + 8 * n + column);
      if (left <= 0) continue;
      T* at = out + 8 * n + column;
      at[0] = narrow<T>(sums[n][2 * i] * by);
      if (left > 1) at[1] = narrow<T>(sums[n][2 * i + 1] * by);
    }
  }

  // A split's share of a row: see Note: [Split keys].
  ATTNRB_DEVICE void write_part(int i, const RowEnd& end, float* states, float* all_sums) {
    write_state(i, end, states);
    if (kValues) write_sums(i, all_sums);
  }
  ATTNRB_DEVICE void write_state(int i, const RowEnd& end, float* states) {
    if (!rows.valid[i] || lane % 4 != 0 || slice != 0) return;
    float* state = states + 4 * partial_index(first_row() + 8 * i);
    state[0] = end.max;
    state[1] = end.sum;
    state[2] = is_broken(i) ? bit_cast<float>(uint32_t(0x7fc00000u)) : end.boosted;
    state[3] = end.seen ? 1.0f : 0.0f;
  }
  ATTNRB_DEVICE void write_sums(int i, float* all_sums) {
    if (!rows.valid[i]) return;
    const int width = int(p.problem.shape.value_width), column = slice * Width + lane % 4 * 2, left = width - column;
    float* out = all_sums + partial_index(first_row() + 8 * i) * width + column;
#pragma unroll
    for (int n = 0; n < Tiles::value_tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e < left) out[8 * n + e] = sums[n][2 * i + e];
  }

  ATTNRB_DEVICE bool is_broken(int i) const { return kMayBoost && ((broken >> (lane / 4 + 8 * i)) & 1u) != 0; }

  ATTNRB_DEVICE int64_t partial_index(int64_t row) const {
    return Sequences::part(p, batch, key_head, row) * p.splits + split;
  }

  // The second pass of Note: [Two passes for outliers].
  ATTNRB_DEVICE void select(const RowEnd (&end)[2]) {
    if (slice != 0) return;
    // All warps are done with the first buffer: behind the last tile's scores there was a barrier.
    marks.join(reinterpret_cast<uint32_t*>(first_buffer));
    RowOutliers outliers[2];
    const AttentionProblem& problem = p.problem;
    const int64_t capacity = problem.emit.capacity;
    const int slot_offset = p.splits > 1 ? 0 : int(problem.visibility.key_offset);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      outliers[i].threshold = end[i].max + log2f(end[i].sum) + p.threshold_log2;
      if (!rows.valid[i]) continue;
      const RowPlace place = place_of(first_row() + 8 * i);
      outliers[i].own = own_key<Sequences>(p, batch, place.query);
      if (p.splits > 1) {
        outliers[i].found = p.partials.candidates + partial_index(first_row() + 8 * i) * capacity;
        outliers[i].scores = p.partials.candidate_scores + partial_index(first_row() + 8 * i) * capacity;
      } else {
        outliers[i].found = problem.emit.indices + Sequences::index(p, batch, place) * capacity;
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
        finish_scores(s, first);
#pragma unroll
        for (int i = 0; i < 2; ++i) outliers[i].take(p, s, i, rows.valid[i], first, slot_offset);
      }
      tile = next;
      which = 1 - which;
    }
    wait_for_copies();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!rows.valid[i]) continue;
      const int32_t count = outliers[i].count < capacity ? outliers[i].count : int32_t(capacity);
      const int64_t row = first_row() + 8 * i;
      int32_t* total = p.splits > 1 ? p.partials.candidate_counts + partial_index(row)
                                    : problem.emit.counts + Sequences::index(p, batch, place_of(row));
      if (lane % 4 == 0) *total = count;
      if (p.splits == 1)
        for (int64_t c = count + lane % 4; c < capacity; c += 4) outliers[i].found[c] = -1;
    }
  }

  const AttentionParameters& p;
  int lane, warp, split, slice, first_tile, last_tile;
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
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, task == Task::softmax || task == Task::biased_softmax ? 3 : 1)
    attention_kernel(ATTNRB_PARAMETERS AttentionParameters parameters) {
  AttentionBlock<T, Width, task> block(parameters, block_index());
  if (block.wanted()) block.run();
}

}  // namespace attnrb::cuda
