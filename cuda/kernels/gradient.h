// Gradients of a tile: a block owns 64 rows or 64 keys, sixteen for each warp, and walks over the other side
// (Note: [Gradients in two walks]).
//
// Note: [Fragments of the backward]
// "Own" operands are queries and output gradients where a block owns rows, keys and values where it owns keys; "inner"
// operands are the other two. Scores and weight gradients come out of two products own times inner transposed, both in
// fragments c of Note: [Fragments] with own items down and inner items across. Turned into weights and score gradients
// in place, they are the left sides of the products that follow, in the layout that those want: sums [own, columns] +=
// (own x inner) times the inner operand. Nothing passes through shared memory on the way.
//
// Inner tiles come in two stages: one is used while the next arrives, with one barrier for each. Widths beyond 128 are
// cut into chunks: a block then owns one chunk of the columns of its gradients, and adds scores up over all chunks, the
// own chunk last, so that the operands which it multiplies by are in place.
#pragma once

#include "gradient_marks.h"
#include "gradient_sums.h"

namespace attnrb::cuda {

// `Edited`: there may be a key bias or rule rest.
template <class T, int Width, GradientTask task, bool Edited>
class GradientBlock {
  // Rows are those of one head.
  static constexpr bool kOneHead = task == GradientTask::bias;
  static constexpr bool kOwnsKeys = task == GradientTask::keys || task == GradientTask::received_keys || kOneHead;
  static constexpr bool kReceived = task == GradientTask::received_deltas || task == GradientTask::received_queries ||
                                    task == GradientTask::received_keys;
  // Sums of rows or keys, and no gradients of operands.
  static constexpr bool kSums = task == GradientTask::received_deltas || task == GradientTask::rest || kOneHead;
  static constexpr int kUnit = 16 / int(sizeof(T)), kStep = 2 * kUnit;
  static constexpr int kOwn = GradientTile<T>::own, kInner = GradientTile<T>::inner;
  static constexpr int kScoreTiles = kInner / 8, kSumTiles = Width / 8;
  // Keys fit 32 bits, which saves registers; rows of a group need not.
  using Own = std::conditional_t<kOwnsKeys, int, int64_t>;
  using Scores = float[kScoreTiles][4];
  using Sums = float[kSumTiles][4];

 public:
  ATTNRB_DEVICE GradientBlock(const GradientParameters& all, int64_t block) : parameters(all), p(all.rows) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % 32;
    warp = thread_index() / 32;
    slice = int(block % p.slices);
    block /= p.slices;
    const int64_t heads_of_batch = kOneHead ? shape.heads : shape.key_heads;
    const int64_t heads = shape.batch * heads_of_batch, tile = block / heads;
    batch = int(block % heads / heads_of_batch);
    key_head = int(block % heads % heads_of_batch);
    if (kOneHead) {
      in_group = key_head % p.group;
      key_head /= p.group;
    }
    // Under a causal mask the first keys are seen by the most rows, and the last rows see the most keys.
    own_first = Own((kOwnsKeys ? tile : p.row_tiles - 1 - tile) * kOwn);
    warp_first = own_first + 16 * warp;

    first_stride = row_stride<T>(p.columns);
    second_stride = row_stride<T>(p.value_columns);
  }

  ATTNRB_DEVICE void run() {
    // They take all chunks and have one owner.
    if (kSums && slice != 0) return;
    start_own();
    clear(first_sums);
    clear(second_sums);
    int64_t first = set_inner();
    int stage = 0;
    if (parameters.chunks == 1) {
      load_own(0);
      if (first < inner_end) load_inner(first, 0, 0);
      commit_copies();
    }
    for (; first < inner_end; first += kInner) {
      if (parameters.chunks == 1) {
        wait_for_copies();
        block_sync();
        if (first + kInner < inner_end) load_inner(first + kInner, 1 - stage, 0);
        commit_copies();
      } else {
        load_chunk(first, 0);
      }
      // Before there are scores, which take registers.
      const uint32_t marks = find_outliers(first, stage);
      Scores scores, products;
      clear(scores);
      clear(products);
      for (int c = 0; c < parameters.chunks; ++c) {
        if (c > 0) load_chunk(first, c);
        multiply_rows(scores, own_operand(0), inner_operand(0, stage), first_stride, p.columns);
        if (!kReceived)
          multiply_rows(products, own_operand(1), inner_operand(1, stage), second_stride, p.value_columns);
      }
      visit(scores, products, first, stage, marks);
      if (parameters.chunks == 1) stage = 1 - stage;
    }
    wait_for_copies();
    finish();
  }

 private:
  ATTNRB_DEVICE int group() const { return kOneHead ? 1 : p.group; }
  ATTNRB_DEVICE int64_t row_count() const { return kOneHead ? p.problem.shape.queries : p.rows; }
  ATTNRB_DEVICE bool biased() const { return Edited && p.problem.edit.key_bias != nullptr; }
  ATTNRB_DEVICE bool rest() const { return Edited && parameters.rest_rows != nullptr; }

  template <int Tiles>
  static ATTNRB_DEVICE void clear(float (&c)[Tiles][4]) {
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
  }

  // ---------------------------------------------------------------------------------------------- operands

  // Where they lie in shared memory: both own operands, then two stages of each inner one. Not kept in registers.
  ATTNRB_DEVICE T* own_operand(int which) const {
    return reinterpret_cast<T*>(shared_memory()) + which * kOwn * first_stride;
  }
  ATTNRB_DEVICE T* inner_operand(int which, int stage) const {
    const int all_own = kOwn * (first_stride + second_stride);
    return reinterpret_cast<T*>(shared_memory()) + all_own +
           (which == 0 ? stage * kInner * first_stride : 2 * kInner * first_stride + stage * kInner * second_stride);
  }

  // What this lane knows of its two own items.
  ATTNRB_DEVICE void start_own() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums_of_row[i] = 0.0f;
      rest_sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      own_mask[i] = nullptr;
      own_head[i] = 0;
      if (kOwnsKeys) continue;
      const int64_t row = warp_first + lane / 4 + 8 * i;
      if (row >= p.rows) continue;
      const uint32_t* words = row_words(row);
      own_row[i].read(words, words + 4);
      if (rest() && task == GradientTask::queries) own_row[i].read_rest(parameters, row_index(row));
      const RowPlace place = row_place(p, key_head, row);
      own_head[i] = place.head;
      if (biased()) own_bias[i].start(p, batch, place);
      const Visibility& visibility = p.problem.visibility;
      if (visibility.mask != nullptr)
        own_mask[i] = visibility.mask + batch * visibility.mask_strides[0] + place.head * visibility.mask_strides[1] +
                      place.query * visibility.mask_strides[2];
    }
    if (kOwnsKeys || p.problem.edit.indices == nullptr || lane >= 16 || warp_first + lane >= p.rows) return;
    GradientRow row;
    row.read(row_words(warp_first + lane), row_words(warp_first + lane) + 4);
    if (row.buckets != 0) walk.list = outliers_of(p, batch, row_place(p, key_head, warp_first + lane));
  }

  ATTNRB_DEVICE int64_t row_index(int64_t row) const {
    return (batch * p.problem.shape.key_heads + key_head) * p.rows + (kOneHead ? row * p.group + in_group : row);
  }
  ATTNRB_DEVICE const uint32_t* row_words(int64_t row) const { return parameters.words + 8 * row_index(row); }

  // The inner items that some own item meets; returns the first.
  ATTNRB_DEVICE int64_t set_inner() {
    const Visibility& visibility = p.problem.visibility;
    const Shape& shape = p.problem.shape;
    if (kOwnsKeys) {
      const auto seen = [&](int64_t query) { return visible_interval(visibility, batch, query, shape.keys); };
      inner_end =
          group() * first_query(shape.queries, [&](int64_t query) { return seen(query).low >= own_first + kOwn; });
      return group() * first_query(shape.queries, [&](int64_t query) { return seen(query).high > own_first; });
    }
    const int64_t last = (own_first + kOwn < p.rows ? own_first + kOwn : p.rows) - 1;
    const Interval interval = visible_interval(visibility, batch, own_first / p.group, last / p.group + 1, shape.keys);
    inner_end = interval.high;
    return interval.low;
  }

  ATTNRB_DEVICE void load_own(int chunk) {
    if (kOwnsKeys)
      load_keys(own_operand(0), own_operand(1), kOwn, own_first, chunk);
    else
      load_rows(own_operand(0), own_operand(1), kOwn, own_first, chunk);
  }
  ATTNRB_DEVICE void load_inner(int64_t first, int stage, int chunk) {
    T *into_first = inner_operand(0, stage), *into_second = inner_operand(1, stage);
    if (kOwnsKeys)
      load_rows(into_first, into_second, kInner, first, chunk);
    else
      load_keys(into_first, into_second, kInner, first, chunk);
  }

  // One chunk of all four operands, the own chunk after all others. Nothing arrives meanwhile.
  ATTNRB_DEVICE void load_chunk(int64_t first, int c) {
    const int chunk = (slice + 1 + c) % parameters.chunks;
    block_sync();
    load_own(chunk);
    load_inner(first, 0, chunk);
    commit_copies();
    wait_for_copies();
    block_sync();
  }

  ATTNRB_DEVICE void load_keys(T* keys, T* values, int count, int64_t first, int chunk) {
    const auto load = [&](T* tile, int columns, const Operand& operand) {
      const HeadRows<T> rows(operand, batch, key_head);
      load_tile<T, kThreads>(tile, count, columns, operand, chunk * Width, [&](int r) -> const T* {
        return first + r < p.problem.shape.keys ? rows.row(first + r) : nullptr;
      });
    };
    load(keys, p.columns, p.key);
    if (!kReceived) load(values, p.value_columns, p.value);
  }

  // Rows of the group with their words behind them.
  ATTNRB_DEVICE void load_rows(T* queries, T* gradients, int count, int64_t first, int chunk) {
    const int64_t first_query = first / group();
    const uint32_t rest = uint32_t(first - first_query * group()), heads = uint32_t(group());
    const auto load = [&](T* tile, int columns, const Operand& operand) {
      const T* base = static_cast<const T*>(operand.data) + batch * operand.strides[0] +
                      (kOneHead ? key_head * p.group + in_group : key_head * heads) * operand.strides[1];
      load_tile<T, kThreads>(tile, count, columns, operand, chunk * Width, [&](int r) -> const T* {
        if (first + r >= row_count()) return nullptr;
        const uint32_t query = (rest + uint32_t(r)) / heads, head = rest + uint32_t(r) - query * heads;
        return base + head * operand.strides[1] + (first_query + query) * operand.strides[2];
      });
    };
    load(queries, p.columns, p.query);
    if (!kReceived) load(gradients, p.value_columns, parameters.grad_output);
    if constexpr (kOwnsKeys) load_words_behind(queries, gradients, count, first);
  }

  // Two threads a row.
  ATTNRB_DEVICE void load_words_behind(T* queries, T* gradients, int count, int64_t first) {
    for (int r = thread_index() / 2; r < count; r += kThreads / 2) {
      const bool valid = first + r < row_count();
      const uint32_t* words = valid ? row_words(first + r) : parameters.words;
      if (thread_index() % 2 == 0)
        copy_async(queries + r * first_stride + p.columns, words, valid);
      else
        copy_async(gradients + r * second_stride + p.value_columns, words + 4, valid);
    }
  }

  ATTNRB_DEVICE GradientRow inner_row(int stage, int r) const {
    GradientRow row;
    row.read(inner_operand(0, stage) + r * first_stride + p.columns,
             inner_operand(1, stage) + r * second_stride + p.value_columns);
    return row;
  }

  // ---------------------------------------------------------------------------------------------- products

  // c += this warp's own items times the inner ones.
  ATTNRB_DEVICE void multiply_rows(Scores& c, const T* own, const T* inner, int stride, int columns) const {
    const T* left = own + (16 * warp + lane % 16) * stride + lane / 16 * kUnit;
    const T* right = inner + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * kUnit;
    for (int column = 0; column < columns; column += kStep) {
      uint32_t a[4];
      load_matrices(a, left + column);
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];
        load_matrices(b, right + n * 8 * stride + column);
        Engine<T>::multiply(c[n], a, b[0], b[1]);
        Engine<T>::multiply(c[n + 1], a, b[2], b[3]);
      }
    }
  }

  // sums += left times the inner operand in `tile`. Where some pair is hidden, what is not finite in the operand must
  // not meet its zero: their product is NaN.
  ATTNRB_DEVICE void accumulate(Sums& sums, const Scores& left, const T* tile, int stride, int columns, uint32_t seen,
                                bool hidden) const {
    if (!hidden || all_finite(tile, stride, columns)) {
      multiply_inner<false>(sums, left, tile, stride, columns);
    } else {
      multiply_inner<true>(sums, left, tile, stride, columns);
      add_non_finite(sums, left, tile, stride, columns, seen);
    }
  }

  // `Finite`: what is not finite in the operand counts as zero.
  template <bool Finite>
  ATTNRB_DEVICE void multiply_inner(Sums& sums, const Scores& left, const T* tile, int stride, int columns) const {
#pragma unroll
    for (int step = 0; step < kInner / kStep; ++step) {
      uint32_t a[4];
      Engine<T>::probabilities(a, left, step);
#pragma unroll
      for (int n = 0; n < kSumTiles; n += 2) {
        if (n * 8 >= columns) break;
        uint32_t b[4];
        Engine<T>::values(b, tile, stride, step, n * 8, lane);
        if (Finite) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] = Engine<T>::finite_part(b[i]);
        }
        Engine<T>::multiply(sums[n], a, b[0], b[1]);
        Engine<T>::multiply(sums[n + 1], a, b[2], b[3]);
      }
    }
  }

  ATTNRB_DEVICE bool all_finite(const T* tile, int stride, int columns) const {
    bool finite = true;
    for (int r = 0; r < kInner; ++r)
      for (int column = lane; column < columns; column += 32) {
        const float x = widen(tile[r * stride + column]);
        finite = finite && x - x == 0.0f;
      }
    return !any(!finite);
  }

  // Adds products with what is not finite, where the pair is seen: rare, and so one inner item at a time.
  ATTNRB_DEVICE void add_non_finite(Sums& sums, const Scores& left, const T* tile, int stride, int columns,
                                    uint32_t seen) const {
#pragma unroll 1
    for (int r = 0; r < kInner; ++r) {
      float factor[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (8 * n + e % 2 == r / 8 * 8 + r % 2) factor[e / 2] = left[n][e];
      const int from = lane / 4 * 4 + r % 8 / 2, bit = r / 8 * 4 + r % 2;
      factor[0] = shuffle(factor[0], from);
      factor[1] = shuffle(factor[1], from);
      const uint32_t meets = shuffle(seen, from) >> bit;
#pragma unroll
      for (int n = 0; n < kSumTiles; ++n) {
        if (n * 8 >= columns) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = widen(tile[r * stride + 8 * n + lane % 4 * 2 + e]);
          if (x - x == 0.0f) continue;
          if (meets & 1u) sums[n][e] += factor[0] * x;
          if (meets & 4u) sums[n][2 + e] += factor[1] * x;
        }
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- tiles

  // Where the rows of an inner tile stand, for what is looked up of a few.
  struct InnerRows {
    int64_t first_query;
    uint32_t rest;
  };
  ATTNRB_DEVICE InnerRows inner_rows(int64_t first) const {
    const int64_t query = first / group();
    return {query, uint32_t(first - query * group())};
  }
  ATTNRB_DEVICE RowPlace place_of(const InnerRows& rows, int r) const {
    const uint32_t at = rows.rest + uint32_t(r), query = at / uint32_t(group());
    return {rows.first_query + query, key_head * p.group + (kOneHead ? in_group : int(at - query * uint32_t(group())))};
  }

  ATTNRB_DEVICE void visit(Scores& scores, Scores& products, int64_t first, int stage, uint32_t marks) {
    const uint32_t seen = differentiate(scores, products, first, stage, marks);
    if (kSums) return;
    constexpr uint32_t kAll = (1u << (4 * kScoreTiles)) - 1u;
    const bool hidden = any(seen != kAll);
    accumulate(first_sums, products, inner_operand(0, stage), first_stride, p.columns, seen, hidden);
    if (task == GradientTask::keys)
      accumulate(second_sums, scores, inner_operand(1, stage), second_stride, p.value_columns, seen, hidden);
  }

  // Which of this lane's pairs are outliers: bit 4 n + e for element e of score tile n.
  ATTNRB_DEVICE uint32_t find_outliers(int64_t first, int stage) {
    if (kReceived || p.problem.edit.indices == nullptr) return 0;
    if constexpr (kOwnsKeys)
      return search_outliers(first, stage);
    else
      return walk_outliers(first);
  }

  ATTNRB_DEVICE uint32_t walk_outliers(int64_t first) {
    const uint32_t bits = walk.take(p.problem.visibility.key_offset, first, kInner);
    if (!any(bits != 0)) return 0;
    uint32_t marks = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t of_row = shuffle(bits, lane / 4 + 8 * i) >> (lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) marks |= ((of_row >> (8 * n)) & 3u) << (4 * n + 2 * i);
    }
    return marks;
  }

  // Each lane looks into the list of one row, if that row has outliers near these sixteen keys at all.
  ATTNRB_DEVICE uint32_t search_outliers(int64_t first, int stage) const {
    const int64_t key_offset = p.problem.visibility.key_offset;
    uint32_t bits = 0;
    const int64_t last = warp_first + 15 < p.problem.shape.keys ? warp_first + 15 : p.problem.shape.keys - 1;
    if (lane < kInner && first + lane < row_count() && last >= warp_first) {
      const GradientRow row = inner_row(stage, lane);
      const int low = int(warp_first >> parameters.bucket_shift), high = int(last >> parameters.bucket_shift);
      const uint64_t near = (~uint64_t(0) << low) & (~uint64_t(0) >> (63 - high));
      if ((row.buckets & near) != 0) {
        const OutlierList list = outliers_of(p, batch, place_of(inner_rows(first), lane));
        const int64_t base = warp_first + key_offset;
        int32_t at = int32_t(first_query(list.count, [&](int64_t c) { return int64_t(list.slots[c]) >= base; }));
        for (; at < list.count && int64_t(list.slots[at]) - base < 16; ++at)
          bits |= 1u << (int64_t(list.slots[at]) - base);
      }
    }
    if (!any(bits != 0)) return 0;
    uint32_t marks = 0;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t of_row = shuffle(bits, 8 * n + lane % 4 * 2 + e) >> (lane / 4);
        marks |= (of_row & 1u) << (4 * n + e) | ((of_row >> 8) & 1u) << (4 * n + 2 + e);
      }
    return marks;
  }

  // Scores become weights and gradients of weights become gradients of scores, in place. Returns which of this lane's
  // pairs are seen, in bits as above.
  ATTNRB_DEVICE uint32_t differentiate(Scores& scores, Scores& products, int64_t first, int stage, uint32_t marks) {
    const bool capped = p.cap != 0.0f, normalize = p.problem.edit.rule == Rule::row;
    if (capped) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[n][e] = Engine<T>::tanh(scores[n][e] * p.inner);
    }
    const float factor = capped ? p.cap : p.factor;
    const bool masked = p.problem.visibility.mask != nullptr;
    const int64_t own_key = warp_first + lane / 4;
    // Shares of received attention; the walk of a bias has both kinds.
    const bool received = kReceived || (kOneHead && parameters.grad_received != nullptr);
    const bool placed = kOwnsKeys && (masked || received || biased());
    InnerRows rows{0, 0};
    if (placed) rows = inner_rows(first);
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int r = 8 * n + lane % 4 * 2 + column;
        if (kOwnsKeys) keep_loads_apart();
        GradientRow of_column;
        RowPlace place{0, 0};
        BiasRow bias_of_column;
        if (kOwnsKeys) of_column = inner_row(stage, r);
        if (placed) place = place_of(rows, r);
        if (kOwnsKeys && first + r < row_count()) {
          if (rest()) of_column.read_rest(parameters, row_index(first + r));
          if (biased()) bias_of_column.start(p, batch, place);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int e = 2 * i + column;
          const GradientRow& row = kOwnsKeys ? of_column : own_row[i];
          const int64_t key = kOwnsKeys ? own_key + 8 * i : first + r;
          bool visible = key >= row.low && key < row.high;
          if (masked) visible = visible && mask_shows(kOwnsKeys ? mask_row(place) : own_mask[i], key);
          float bias = 0.0f;
          const BiasRow& bias_row = kOwnsKeys ? bias_of_column : own_bias[i];
          if (biased()) {
            bias = bias_row.of(p, int(key));
            visible = visible && bias != minus_infinity();
          }
          seen |= uint32_t(visible) << (4 * n + e);
          float gradient = products[n][e];
          if (received) gradient = visible ? share_of(kOwnsKeys ? place.head : own_head[i], key) : 0.0f;

          const float score = scores[n][e];
          float from = -row.reference, low_part = row.rest;
          if (biased()) {
            from = fmaf(bias, kLog2E, from);
            low_part = fmaf(bias, -kLog2ERest, low_part);
          }
          const float weight = visible ? fast_exp2(fmaf(score, factor, from) - low_part) : 0.0f;
          const bool marked = (marks >> (4 * n + e)) & 1u;
          if (task == GradientTask::received_deltas) {
            sums_of_row[i] += weight * gradient;
            continue;
          }
          if (task == GradientTask::rest) {
            if (visible) rest_sums[i].add(marked, weight, weight * gradient);
            continue;
          }
          float boost = marked ? 1.0f + row.gain : 1.0f;
          if (!kOwnsKeys && marked && visible) sums_of_row[i] += weight * (normalize ? gradient - row.delta : gradient);
          float of_score = normalize ? boost * (gradient - row.delta) : boost * gradient - row.delta;
          if (rest()) {
            if (!marked) boost = row.of_others;
            of_score = boost * gradient - (marked ? row.outlier_delta : row.delta);
          }
          if (kOneHead) {
            if (visible && key < bias_row.limit) sums_of_row[i] += weight * of_score;
            continue;
          }
          if (capped) of_score *= 1.0f - score * score;
          scores[n][e] = weight * boost;
          products[n][e] = visible ? weight * of_score : 0.0f;
        }
      }
    return seen;
  }

  ATTNRB_DEVICE const bool* mask_row(const RowPlace& place) const {
    const Visibility& visibility = p.problem.visibility;
    return visibility.mask + batch * visibility.mask_strides[0] + place.head * visibility.mask_strides[1] +
           place.query * visibility.mask_strides[2];
  }
  ATTNRB_DEVICE bool mask_shows(const bool* row, int64_t key) const {
    return row[key * p.problem.visibility.mask_strides[3]];
  }
  ATTNRB_DEVICE float share_of(int head, int64_t key) const {
    const Shape& shape = p.problem.shape;
    return parameters.shares[(batch * shape.heads + head) * shape.keys + key];
  }

  // ---------------------------------------------------------------------------------------------- results

  ATTNRB_DEVICE void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t own = warp_first + lane / 4 + 8 * i;
      const float sum = quad_sum(sums_of_row[i]);
      if (task == GradientTask::rest) rest_sums[i].join();
      if (own >= (kOwnsKeys ? p.problem.shape.keys : p.rows)) continue;
      const float scale = p.problem.scoring.scale;
      if (task == GradientTask::rest) {
        if (lane % 4 == 0) finish_rest(parameters, own_row[i], rest_sums[i], own_head[i], row_index(own));
      } else if (kOneHead) {
        const Shape& shape = p.problem.shape;
        const int64_t head = int64_t(key_head) * p.group + in_group;
        if (lane % 4 == 0) parameters.bias_keys[(batch * shape.heads + head) * shape.keys + own] = sum;
      } else if (task == GradientTask::received_deltas) {
        if (lane % 4 == 0) const_cast<uint32_t*>(row_words(own))[2] = bit_cast<uint32_t>(sum);
      } else if (kOwnsKeys) {
        write(parameters.grad_key, key_head, own, p.problem.shape.width, first_sums, i, scale);
        if (!kReceived) write(parameters.grad_value, key_head, own, p.problem.shape.value_width, second_sums, i, 1.0f);
      } else {
        const RowPlace place = row_place(p, key_head, own);
        write(parameters.grad_query, place.head, place.query, p.problem.shape.width, first_sums, i, scale);
        if (parameters.gain_rows != nullptr && !rest() && lane % 4 == 0 && slice == 0)
          parameters.gain_rows[(batch * p.problem.shape.key_heads + key_head) * p.rows + own] = sum;
      }
    }
  }

  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };

  ATTNRB_DEVICE void write(const GradientProblem::Target& target, int64_t head, int64_t row, int64_t width,
                           const Sums& sums, int i, float factor) const {
    const int first_column = slice * Width + lane % 4 * 2;
    T* out = static_cast<T*>(target.data) + batch * target.strides[0] + head * target.strides[1] +
             row * target.strides[2] + first_column;
    const bool pairs = reinterpret_cast<uintptr_t>(out) % sizeof(Pair) == 0;
#pragma unroll
    for (int n = 0; n < kSumTiles; ++n) {
      const int64_t left = width - (first_column + 8 * n);
      if (left <= 0) continue;
      const Pair both{narrow<T>(sums[n][2 * i] * factor), narrow<T>(sums[n][2 * i + 1] * factor)};
      if (pairs && left > 1) {
        *reinterpret_cast<Pair*>(out + 8 * n) = both;
      } else {
        out[8 * n] = both.first;
        if (left > 1) out[8 * n + 1] = both.second;
      }
    }
  }

  const GradientParameters& parameters;
  const AttentionParameters& p;
  int lane, warp, slice, batch, key_head, first_stride, second_stride;
  int in_group = 0;  // of the one head
  Own own_first, warp_first;
  int64_t inner_end;
  GradientRow own_row[2];
  const bool* own_mask[2];
  int own_head[2];
  float sums_of_row[2];  // of the gain's gradient, or delta, or the bias' gradient: this lane's share
  RestSums rest_sums[2];
  BiasRow own_bias[2];
  OutlierWalk walk;
  Sums first_sums, second_sums;
};

template <class T, int Width, GradientTask task, bool Edited>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 2) gradient_kernel(ATTNRB_PARAMETERS GradientParameters parameters) {
  if (!is_wanted<task>(parameters)) return;
  GradientBlock<T, Width, task, Edited> block(parameters, block_index());
  block.run();
}

}  // namespace attnrb::cuda
