// Attention of few queries: bound by the reading of keys and values, which are used where they lie.
//
// The G query heads of a key head (times the queries, if there are a few) are rows of one small product, so that keys
// and values are read once. Keys are split into spans of fixed length, each a task of its own with a partial softmax;
// spans are merged in order, so the result does not depend on how many threads there are.
#pragma once

#include <type_traits>

#include "float_engine.h"
#include "pairs.h"
#include "prefill.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Rows that will be read next, fetched into the cache a few at a time while others are being used: keys and values
// alternate block by block, which the hardware's own prefetchers take for the end of a stream each time.
struct Upcoming {
  const char* next = nullptr;
  int64_t stride = 0, row_bytes = 0, rows = 0;

  // Adjacent rows become `shares` times as many, for as many walks over a block to fetch them between them.
  void divide(int64_t shares) {
    if (shares == 0 || stride != row_bytes) return;  // no walk: values of width 0
    rows *= shares;
    stride = row_bytes = (row_bytes + shares - 1) / shares;
  }

  // May ask for a line beyond the last row, which harms nothing.
  ATTNRB_INLINE void fetch(int64_t count) {
    if (rows <= 0) return;
    rows -= count;
    const bool adjacent = stride == row_bytes;
    const int64_t runs = adjacent ? 1 : count, bytes = adjacent ? count * row_bytes : row_bytes;
    for (int64_t run = 0; run < runs; ++run, next += adjacent ? bytes : stride)
      for (int64_t byte = 0; byte < bytes; byte += 128) {
        __builtin_prefetch(next + byte, 0, 3);
        __builtin_prefetch(next + byte + 64, 0, 3);
      }
  }
};

// Products of query rows with key and value rows where they lie, for any input type, in float32. Rows are read in
// chunks of two vectors; load_pair may deal out a chunk's components between the two in whatever order is
// cheapest, which packed queries and output sums then follow (`place`).
template <class T>
struct FloatDot : FloatProbabilities {
  using Input = T;
  using Query = float;
  static constexpr int exp2_degree = 6;
  static constexpr int chunk = 2 * Vec::width;

  // Where component d lies in a row of packed queries or sums.
  static ATTNRB_INLINE int64_t place(int64_t d) { return d / chunk * chunk + pair_place(T(), int(d % chunk)); }

  static void pack_query(Query* out, const T* query, int64_t stride, int64_t width, float factor) {
    for (int64_t d = 0; d < round_up(width, chunk); ++d)
      out[place(d)] = d < width ? factor * to_float(query[d * stride]) : 0.0f;
  }

  // scores[r][0..Keys) for r < Rows with Rows * Keys = Vec::width accumulators in flight.
  template <int Rows>
  static ATTNRB_INLINE void dot(const Query* queries, int64_t query_stride, const T* keys, int64_t key_stride,
                                int64_t width, float* scores, int64_t score_stride) {
    constexpr int Keys = Vec::width / Rows;
    Vec sum[Rows * Keys];
    for (int i = 0; i < Rows * Keys; ++i) sum[i] = Vec::zero();
    int64_t d = 0;
    for (; d + chunk <= width; d += chunk) {
      Vec low[Keys], high[Keys];
      for (int k = 0; k < Keys; ++k) load_pair(keys + k * key_stride + d, low[k], high[k]);
      add_products<Rows, Keys>(sum, queries + d, query_stride, low, high);
    }
    if (d < width) {
      Vec low[Keys], high[Keys];
      for (int k = 0; k < Keys; ++k) load_pair(keys + k * key_stride + d, int(width - d), low[k], high[k]);
      add_products<Rows, Keys>(sum, queries + d, query_stride, low, high);
    }
    float total[Vec::width];
    Vec::sums(sum).store(total);
    for (int r = 0; r < Rows; ++r) std::memcpy(scores + r * score_stride, total + r * Keys, Keys * sizeof(float));
  }

  // sums[r][..] += probabilities[r][0..count) * values over Chunks chunks of columns, of which `columns` exist.
  template <int Rows, int Chunks, bool Whole>
  static ATTNRB_INLINE void mix(const Probability* probabilities, int64_t probability_stride, const T* values,
                                int64_t value_stride, int64_t count, int64_t columns, float* sums, int64_t sum_stride,
                                Upcoming& ahead) {
    constexpr int Vectors = 2 * Chunks;
    Vec sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::load(sums + r * sum_stride + v * Vec::width);
    for (int64_t j = 0; j < count; ++j, values += value_stride) {
      ahead.fetch(1);
      Vec value[Vectors];
      for (int c = 0; c < Chunks; ++c) {
        if (Whole)
          load_pair(values + c * chunk, value[2 * c], value[2 * c + 1]);
        else
          load_pair(values + c * chunk, int(columns - c * chunk), value[2 * c], value[2 * c + 1]);
      }
      for (int r = 0; r < Rows; ++r) {
        const Vec p = Vec::set(probabilities[r * probability_stride + j]);
        for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec::fma(p, value[v], sum[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v].store(sums + r * sum_stride + v * Vec::width);
  }

 private:
  template <int Rows, int Keys>
  static ATTNRB_INLINE void add_products(Vec* sum, const Query* queries, int64_t query_stride, const Vec* low,
                                         const Vec* high) {
    for (int r = 0; r < Rows; ++r) {
      const Vec query_low = Vec::load(queries + r * query_stride);
      const Vec query_high = Vec::load(queries + r * query_stride + Vec::width);
      for (int k = 0; k < Keys; ++k)
        sum[r * Keys + k] = Vec::fma(query_low, low[k], Vec::fma(query_high, high[k], sum[r * Keys + k]));
    }
  }
};

template <class Dot>
class Decode : Driver<Decode<Dot>> {
  using Base = Driver<Decode>;
  friend Base;
  using Base::note, Base::pool_;
  using Input = typename Dot::Input;
  using Probability = typename Dot::Probability;
  static constexpr int kBlockKeys =
      64;  // keys and values of width 128 in bfloat16 fill two thirds of a first-level cache
  static constexpr int64_t kMixColumns = 2 * Dot::chunk;  // columns of values that are summed in registers at a time
  static constexpr int kMaxRowBlock = Vec::width < 4 ? Vec::width : 4;

 public:
  // More rows than this are faster packed.
  static constexpr int64_t kMaxRows = 16;

  // Where operands lie has no say in it: the same numbers give the same bits in any layout.
  static bool suits(const AttentionProblem& problem) {
    const Shape& shape = problem.shape;
    return shape.queries == 1 || shape.queries * (shape.heads / shape.key_heads) <= kMaxRows;
  }

  Decode(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : Base(pool, scratch),
        problem_(problem),
        shape_(problem.shape),
        rules_(problem),
        group_(problem.shape.heads / problem.shape.key_heads),
        rows_(group_ * problem.shape.queries),
        query_columns_(round_up(problem.shape.width, Dot::chunk)),
        sum_columns_(round_up(problem.shape.value_width, Dot::chunk)),
        candidate_capacity_(rules_.marks.candidate_capacity(kBlockKeys)) {
    // Enough spans for a few tasks a thread on any machine of today, none so short that merging shows.
    constexpr int64_t kTasks = 32, kShortest = 512;
    const int64_t heads = shape_.batch * shape_.key_heads;
    const int64_t wanted = (kTasks + heads - 1) / heads;
    span_keys_ = round_up((shape_.keys + wanted - 1) / wanted, kBlockKeys);
    if (span_keys_ < kShortest) span_keys_ = kShortest;
    spans_ = (shape_.keys + span_keys_ - 1) / span_keys_;
  }

  Status run() {
    const int64_t heads = shape_.batch * shape_.key_heads, partials = heads * spans_ * rows_;
    this->reserve_shared([&](Carver& carver) {
      rows_state_ = carver.take<Row>(partials);
      sums_ = carver.take<float>(partials * sum_columns_);
      marked_ = carver.take<float>(rules_.marks.parts() ? partials * sum_columns_ : 0);
      candidate_scores_ = carver.take<float>(partials * candidate_capacity_);
      candidates_ = carver.take<int32_t>(partials * candidate_capacity_);
      left_ = carver.take<std::atomic<int32_t>>(heads);
    });
    this->reserve_workers();

    // The last span to finish merges its key head: no second round of tasks.
    for (int64_t h = 0; h < heads; ++h) new (&left_[h]) std::atomic<int32_t>(int32_t(spans_));
    for_each_task(pool_, heads * spans_, [&](int64_t worker, int64_t task) {
      const int64_t head = task / spans_;
      attend(worker, head / shape_.key_heads, head % shape_.key_heads, task % spans_);
      if (left_[head].fetch_sub(1, std::memory_order_acq_rel) == 1)
        merge(worker, head / shape_.key_heads, head % shape_.key_heads);
    });
    return this->status();
  }

 private:
  struct Worker {
    typename Dot::Query* queries;
    float* scores;
    Probability* probabilities;
    Input* keys;      // a copy of keys or values whose columns do not follow each other
    float* row;       // output sums in the order of their columns
    BiasBlock* bias;  // of each head
    float* bias_values;
    float* merged_scores;
    int32_t* merged;
  };

  Worker carve(Carver& carver) const {
    Worker worker;
    worker.queries = carver.take<typename Dot::Query>(rows_ * query_columns_);
    worker.scores = carver.take<float>(rows_ * kBlockKeys);
    worker.probabilities = carver.take<Probability>(rows_ * kBlockKeys);
    worker.keys = carver.take<Input>(copies() ? kBlockKeys * larger(shape_.width, shape_.value_width) : 0);
    worker.row = carver.take<float>(sum_columns_);
    worker.bias = carver.take<BiasBlock>(group_);
    worker.bias_values = carver.take<float>(rules_.bias.any() ? group_ * kBlockKeys : 0);
    worker.merged_scores = carver.take<float>(candidate_capacity_ * spans_);
    worker.merged = carver.take<int32_t>(candidate_capacity_ * spans_);
    return worker;
  }

  bool copies() const { return problem_.key.column_stride() != 1 || problem_.value.column_stride() != 1; }

  int64_t head_of(int64_t key_head, int64_t r) const { return key_head * group_ + r / shape_.queries; }
  int64_t query_of(int64_t r) const { return r % shape_.queries; }
  int64_t partial_index(int64_t batch, int64_t key_head, int64_t span) const {
    return ((batch * shape_.key_heads + key_head) * spans_ + span) * rows_;
  }

  void attend(int64_t worker_index, int64_t batch, int64_t key_head, int64_t span) {
    const FlushSubnormals flush;
    const Worker worker = this->worker(worker_index);
    const int64_t index = partial_index(batch, key_head, span);
    Row* rows = rows_state_ + index;
    float* sums = sums_ + index * sum_columns_;
    for (int64_t r = 0; r < rows_; ++r) {
      Row& row = *new (&rows[r]) Row();
      note(rules_.start(row, batch, head_of(key_head, r), query_of(r), worker.bias + r / shape_.queries));
      if (span > 0) row.sum = 0.0f, row.max = -kInfinity;  // a sink joins the denominator once
      if (rules_.marks.emits()) {
        row.found.scores = candidate_scores_ + (index + r) * candidate_capacity_;
        row.found.positions = candidates_ + (index + r) * candidate_capacity_;
      }
      const Input* query = row_of<Input>(problem_.query, batch, head_of(key_head, r), query_of(r));
      Dot::pack_query(worker.queries + r * query_columns_, query, problem_.query.strides[3], shape_.width,
                      rules_.query_factor());
    }
    for (int64_t i = 0; i < rows_ * sum_columns_; ++i) sums[i] = 0.0f;
    if (rules_.marks.parts())
      for (int64_t i = 0; i < rows_ * sum_columns_; ++i) marked_[index * sum_columns_ + i] = 0.0f;

    const Interval seen = visible_interval(problem_.visibility, batch, 0, shape_.queries, shape_.keys);
    const int64_t begin = span * span_keys_ > seen.low ? span * span_keys_ : seen.low;
    const int64_t end = (span + 1) * span_keys_ < seen.high ? (span + 1) * span_keys_ : seen.high;
    for (int64_t key = begin; key < end; key += kBlockKeys) attend_block(worker, index, batch, key_head, key, end);
    for (int64_t r = 0; r < rows_; ++r) note(MarkRules::finish(rows[r].marks));
  }

  // Rows of keys or values with adjacent columns: where they lie, or copied.
  const Input* block_rows(const Worker& worker, const KeyRows& operand, int64_t batch, int64_t key_head, int64_t key,
                          int64_t count, int64_t columns, int64_t* row_stride) const {
    const Input* data = operand.template row<Input>(batch, key_head, key);
    const int64_t step = operand.row_stride(), column_step = operand.column_stride();
    *row_stride = step;
    if (column_step == 1) return data;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < columns; ++d) worker.keys[j * columns + d] = data[j * step + d * column_step];
    *row_stride = columns;
    return worker.keys;
  }

  // The first block of the keys [key, end), for the partial rows from `index` on.
  void attend_block(const Worker& worker, int64_t index, int64_t batch, int64_t key_head, int64_t key, int64_t end) {
    Row* rows = rows_state_ + index;
    float* sums = sums_ + index * sum_columns_;
    const int64_t count = end - key < kBlockKeys ? end - key : kBlockKeys;
    int64_t stride;
    const Input* keys = block_rows(worker, problem_.key, batch, key_head, key, count, shape_.width, &stride);
    Upcoming values_ahead = upcoming(problem_.value, batch, key_head, key, count, shape_.value_width);
    dot_rows(worker, keys, stride, count, values_ahead);

    bool partial = problem_.visibility.mask != nullptr;
    for (int64_t r = 0; r < rows_; ++r) partial = partial || rows[r].low > key || rows[r].high < key + count;
    const int64_t padded = round_up(count, 2 * Vec::width);
    if (rules_.bias.any())
      for (int64_t g = 0; g < group_; ++g) {
        worker.bias[g] =
            rules_.bias.block(batch, key_head * group_ + g, key, padded, worker.bias_values + g * kBlockKeys);
        partial = partial || worker.bias[g].removes;
      }
    for (int64_t r = 0; r < rows_; ++r) {
      const auto rescale = [&](float factor) {
        scale_sums(sums + r * sum_columns_, sum_columns_, factor);
        if (rules_.marks.parts()) scale_sums(marked_ + (index + r) * sum_columns_, sum_columns_, factor);
      };
      const auto take = [&](int64_t j, float weight) {
        add_scaled(marked_ + (index + r) * sum_columns_, weight,
                   problem_.value.template row<Input>(batch, key_head, key + j), problem_.value.column_stride(),
                   shape_.value_width);
      };
      rules_.template absorb<Dot>(rows[r], worker.scores + r * kBlockKeys, key, padded, count,
                                  partial || count < padded, worker.probabilities + r * kBlockKeys, rescale, take);
    }

    const Input* values = block_rows(worker, problem_.value, batch, key_head, key, count, shape_.value_width, &stride);
    if (partial && !all_finite(values, stride, 1, count, shape_.value_width)) {
      // A masked value of NaN or infinity must not meet a probability of zero: their product is NaN.
      for (int64_t r = 0; r < rows_; ++r)
        for (int64_t j = 0; j < count; ++j)
          if (rules_.visible(rows[r], key + j))
            for (int64_t d = 0; d < shape_.value_width; ++d)
              sums[r * sum_columns_ + Dot::place(d)] +=
                  Dot::load_probability(worker.probabilities + r * kBlockKeys, j) * to_float(values[j * stride + d]);
      return;
    }
    const int64_t left = end - key - count;
    Upcoming keys_ahead =
        upcoming(problem_.key, batch, key_head, key + count, left < kBlockKeys ? left : kBlockKeys, shape_.width);
    keys_ahead.divide((shape_.value_width + kMixColumns - 1) / kMixColumns);
    mix_rows(worker, values, stride, count, sums, keys_ahead);
  }

  Upcoming upcoming(const KeyRows& operand, int64_t batch, int64_t key_head, int64_t key, int64_t count,
                    int64_t columns) const {
    Upcoming ahead;
    if (operand.column_stride() != 1) return ahead;
    ahead.next = reinterpret_cast<const char*>(operand.template row<Input>(batch, key_head, key));
    ahead.stride = operand.row_stride() * int64_t(sizeof(Input));
    ahead.row_bytes = columns * int64_t(sizeof(Input));
    ahead.rows = count;
    return ahead;
  }

  void dot_rows(const Worker& worker, const Input* keys, int64_t stride, int64_t count, Upcoming& ahead) const {
    int64_t r = 0;
    for (; r + kMaxRowBlock <= rows_; r += kMaxRowBlock) dot_keys<kMaxRowBlock>(worker, r, keys, stride, count, ahead);
    if (r + 2 <= rows_) dot_keys<2>(worker, r, keys, stride, count, ahead), r += 2;
    if (r < rows_) dot_keys<1>(worker, r, keys, stride, count, ahead);
  }

  template <int Rows>
  void dot_keys(const Worker& worker, int64_t r, const Input* keys, int64_t stride, int64_t count,
                Upcoming& ahead) const {
    constexpr int64_t kKeys = Vec::width / Rows;
    const typename Dot::Query* queries = worker.queries + r * query_columns_;
    float* scores = worker.scores + r * kBlockKeys;
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys) {
      ahead.fetch(kKeys);
      Dot::template dot<Rows>(queries, query_columns_, keys + j * stride, stride, shape_.width, scores + j, kBlockKeys);
    }
    if (j < count) {
      // The last few keys once more from an earlier start, or one by one where there are too few.
      if (count >= kKeys) {
        j = count - kKeys;
        Dot::template dot<Rows>(queries, query_columns_, keys + j * stride, stride, shape_.width, scores + j,
                                kBlockKeys);
      } else {
        for (; j < count; ++j)
          for (int i = 0; i < Rows; ++i) {
            float one[Vec::width];
            Dot::template dot<1>(queries + i * query_columns_, query_columns_, keys + j * stride, 0, shape_.width, one,
                                 0);
            scores[i * kBlockKeys + j] = one[0];
          }
      }
    }
  }

  void mix_rows(const Worker& worker, const Input* values, int64_t stride, int64_t count, float* sums,
                Upcoming& ahead) const {
    for (int64_t d = 0; d < shape_.value_width; d += kMixColumns) {
      const int64_t left = shape_.value_width - d;
      int64_t r = 0;
      for (; r + kMaxRowBlock <= rows_; r += kMaxRowBlock)
        mix_columns<kMaxRowBlock>(worker, r, values + d, stride, count, left, sums + d, ahead);
      if (r + 2 <= rows_) mix_columns<2>(worker, r, values + d, stride, count, left, sums + d, ahead), r += 2;
      if (r < rows_) mix_columns<1>(worker, r, values + d, stride, count, left, sums + d, ahead);
    }
  }

  template <int Rows>
  void mix_columns(const Worker& worker, int64_t r, const Input* values, int64_t stride, int64_t count, int64_t columns,
                   float* sums, Upcoming& ahead) const {
    const Probability* probabilities = worker.probabilities + r * kBlockKeys;
    float* out = sums + r * sum_columns_;
    const auto mix = [&](auto chunks, auto whole) {
      Dot::template mix<Rows, decltype(chunks)::value, decltype(whole)::value>(
          probabilities, kBlockKeys, values, stride, count, columns, out, sum_columns_, ahead);
    };
    if (columns >= kMixColumns)
      mix(std::integral_constant<int, 2>(), std::true_type());
    else if (columns > Dot::chunk)
      mix(std::integral_constant<int, 2>(), std::false_type());
    else if (columns == Dot::chunk)
      mix(std::integral_constant<int, 1>(), std::true_type());
    else
      mix(std::integral_constant<int, 1>(), std::false_type());
  }

  // Partial softmaxes with references m_s and sums l_s merge into m = max m_s, l = sum l_s 2^(m_s - m).
  void merge(int64_t worker_index, int64_t batch, int64_t key_head) {
    const Worker worker = this->worker(worker_index);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t first = partial_index(batch, key_head, 0) + r;
      Row total = rows_state_[first];
      float* sums = sums_ + first * sum_columns_;
      for (int64_t span = 1; span < spans_; ++span) join(total, first, first + span * rows_);

      const int64_t head = head_of(key_head, r), query = query_of(r);
      const int64_t index = (batch * shape_.heads + head) * shape_.queries + query;
      rules_.report(total, index);
      for (int64_t d = 0; d < shape_.value_width; ++d) worker.row[d] = sums[Dot::place(d)];
      if (shape_.value_width > 0)
        write_output<Input>(problem_, rules_, total, worker.row,
                            rules_.marks.parts() ? marked_ + first * sum_columns_ : nullptr, batch, head, query);
      if (!rules_.marks.emits()) continue;
      int64_t count = 0;
      for (int64_t span = 0; span < spans_; ++span) {
        const Row& part = rows_state_[first + span * rows_];
        for (int32_t c = 0; c < part.found.count; ++c, ++count) {
          worker.merged_scores[count] = part.found.scores[c];
          worker.merged[count] = part.found.positions[c];
        }
      }
      rules_.marks.emit(worker.merged_scores, worker.merged, count, total.max, rules_.mass(total), total.own, index);
    }
  }

  // The partial row `index` joins the one at `first`, whose state is `total`.
  void join(Row& total, int64_t first, int64_t index) const {
    const Row& part = rows_state_[index];
    if (!part.seen) return;
    const float max = part.max > total.max ? part.max : total.max;
    const float keep = total.max == -kInfinity ? 0.0f : std::exp2(total.max - max), add = std::exp2(part.max - max);
    total.sum = total.sum * keep + part.sum * add;
    total.marks.mass = total.marks.mass * keep + part.marks.mass * add;
    total.max = max;
    total.seen = true;
    join_sums(sums_, first, keep, index, add);
    if (rules_.marks.parts()) join_sums(marked_, first, keep, index, add);
  }

  void join_sums(float* sums, int64_t first, float keep, int64_t index, float add) const {
    float* to = sums + first * sum_columns_;
    const float* from = sums + index * sum_columns_;
    for (int64_t d = 0; d < sum_columns_; d += Vec::width)
      Vec::fma(Vec::load(from + d), Vec::set(add), Vec::load(to + d) * Vec::set(keep)).store(to + d);
  }

  const AttentionProblem& problem_;
  const Shape& shape_;
  const RowRules rules_;
  const int64_t group_, rows_, query_columns_, sum_columns_, candidate_capacity_;
  int64_t span_keys_, spans_;
  Row* rows_state_ = nullptr;
  float *sums_ = nullptr, *marked_ = nullptr;
  float* candidate_scores_ = nullptr;
  int32_t* candidates_ = nullptr;
  std::atomic<int32_t>* left_ = nullptr;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
