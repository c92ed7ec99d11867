// Attention of few queries: bound by the reading of keys and values, which are used where they lie.
//
// The G query heads of a key head (times the queries, if there are a few) are rows of one small product, so that keys
// and values are read once. Keys are split into spans of fixed length, each a task of its own with a partial softmax;
// spans are merged in order, so the result does not depend on how many threads there are.
#pragma once

#include <type_traits>

#include "float_dot.h"
#include "prefill.h"

namespace attnrb {
namespace ATTNRB_ISA {

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
  // Where operands lie has no say in it: the same numbers give the same bits in any layout. Of ragged sequences this
  // driver serves those with few queries.
  static bool suits(const AttentionProblem& problem) { return few_queries(problem.shape, problem.shape.queries); }

  Decode(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : Base(pool, scratch),
        problem_(problem),
        shape_(problem.shape),
        rules_(problem),
        group_(problem.shape.heads / problem.shape.key_heads),
        query_columns_(round_up(problem.shape.width, Dot::chunk)),
        sum_columns_(round_up(problem.shape.value_width, Dot::chunk)),
        candidate_capacity_(rules_.marks.candidate_capacity(kBlockKeys)) {}

  Status run() {
    list_sequences(nullptr);
    if (count_ == 0) return Status::ok;
    const int64_t heads = count_ * shape_.key_heads;
    this->reserve_shared([&](Carver& carver) {
      sequences_ = carver.take<Sequence>(count_);
      rows_state_ = carver.take<Row>(partials_);
      sums_ = carver.take<float>(partials_ * sum_columns_);
      marked_ = carver.take<float>(rules_.marks.parts() ? partials_ * sum_columns_ : 0);
      candidate_scores_ = carver.take<float>(partials_ * candidate_capacity_);
      candidates_ = carver.take<int32_t>(partials_ * candidate_capacity_);
      left_ = carver.take<std::atomic<int32_t>>(heads);
    });
    list_sequences(sequences_);
    this->reserve_workers();

    // The last span to finish merges its key head: no second round of tasks.
    for (int64_t h = 0; h < heads; ++h)
      new (&left_[h]) std::atomic<int32_t>(int32_t(sequences_[h / shape_.key_heads].spans));
    for_each_task(pool_, sequences_[count_ - 1].tasks_end, [&](int64_t worker, int64_t task) {
      const Sequence& sequence = entry_of(sequences_, count_, &Sequence::tasks_end, task);
      const int64_t own = task - (sequence.tasks_end - shape_.key_heads * sequence.spans);
      const int64_t key_head = own / sequence.spans;
      attend(worker, sequence, key_head, own % sequence.spans);
      std::atomic<int32_t>& left = left_[(&sequence - sequences_) * shape_.key_heads + key_head];
      if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) merge(worker, sequence, key_head);
    });
    return this->status();
  }

 private:
  struct Sequence {
    int64_t batch, first_query, queries, keys;
    int64_t rows;  // of a key head
    int64_t span_keys, spans;
    int64_t partials;   // rows of all spans before its own
    int64_t tasks_end;  // one past its last task
  };

  // Keys of a span. In a batch there are enough spans for a few tasks a thread on any machine of today, none so short
  // that merging shows. Of ragged sequences all spans are that short: what else is in a call changes no bit of a
  // result.
  int64_t span_keys(int64_t keys) const {
    constexpr int64_t kTasks = 32, kShortest = 512;
    if (shape_.ragged()) return kShortest;
    const int64_t heads = shape_.batch * shape_.key_heads, wanted = (kTasks + heads - 1) / heads;
    return larger(round_up((keys + wanted - 1) / wanted, kBlockKeys), kShortest);
  }

  // Fills `sequences`, or only counts them and what they need.
  void list_sequences(Sequence* sequences) {
    int64_t count = 0, partials = 0, tasks = 0;
    each_sequence(shape_, true, [&](int64_t batch, int64_t first_query, int64_t queries, int64_t keys) {
      Sequence each;
      each.batch = batch;
      each.first_query = first_query;
      each.queries = queries;
      each.keys = keys;
      each.rows = group_ * queries;
      each.span_keys = span_keys(keys);
      each.spans = (keys + each.span_keys - 1) / each.span_keys;
      each.partials = partials;
      partials += shape_.key_heads * each.spans * each.rows;
      each.tasks_end = tasks += shape_.key_heads * each.spans;
      most_rows_ = larger(most_rows_, each.rows);
      most_spans_ = larger(most_spans_, each.spans);
      if (sequences != nullptr) sequences[count] = each;
      ++count;
    });
    count_ = count;
    partials_ = partials;
  }

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
    worker.queries = carver.take<typename Dot::Query>(most_rows_ * query_columns_);
    worker.scores = carver.take<float>(most_rows_ * kBlockKeys);
    worker.probabilities = carver.take<Probability>(most_rows_ * kBlockKeys);
    worker.keys = carver.take<Input>(copies() ? kBlockKeys * larger(shape_.width, shape_.value_width) : 0);
    worker.row = carver.take<float>(sum_columns_);
    worker.bias = carver.take<BiasBlock>(group_);
    worker.bias_values = carver.take<float>(rules_.bias.any() ? group_ * kBlockKeys : 0);
    worker.merged_scores = carver.take<float>(candidate_capacity_ * most_spans_);
    worker.merged = carver.take<int32_t>(candidate_capacity_ * most_spans_);
    return worker;
  }

  bool copies() const { return problem_.key.column_stride() != 1 || problem_.value.column_stride() != 1; }

  int64_t head_of(const Sequence& sequence, int64_t key_head, int64_t r) const {
    return key_head * group_ + r / sequence.queries;
  }
  static int64_t query_of(const Sequence& sequence, int64_t r) { return sequence.first_query + r % sequence.queries; }
  static int64_t partial_index(const Sequence& sequence, int64_t key_head, int64_t span) {
    return sequence.partials + (key_head * sequence.spans + span) * sequence.rows;
  }

  void attend(int64_t worker_index, const Sequence& sequence, int64_t key_head, int64_t span) {
    const FlushSubnormals flush;
    const Worker worker = this->worker(worker_index);
    const int64_t index = partial_index(sequence, key_head, span), batch = sequence.batch, row_count = sequence.rows;
    Row* rows = rows_state_ + index;
    float* sums = sums_ + index * sum_columns_;
    for (int64_t r = 0; r < row_count; ++r) {
      Row& row = *new (&rows[r]) Row();
      const int64_t head = head_of(sequence, key_head, r), query = query_of(sequence, r);
      note(rules_.start(row, batch, head, query, worker.bias + r / sequence.queries));
      if (span > 0) row.sum = 0.0f, row.max = -kInfinity;  // a sink joins the denominator once
      if (rules_.marks.emits()) {
        row.found.scores = candidate_scores_ + (index + r) * candidate_capacity_;
        row.found.positions = candidates_ + (index + r) * candidate_capacity_;
      }
      Dot::pack_query(worker.queries + r * query_columns_, row_of<Input>(problem_.query, batch, head, query),
                      problem_.query.strides[3], shape_.width, rules_.query_factor());
    }
    for (int64_t i = 0; i < row_count * sum_columns_; ++i) sums[i] = 0.0f;
    if (rules_.marks.parts())
      for (int64_t i = 0; i < row_count * sum_columns_; ++i) marked_[index * sum_columns_ + i] = 0.0f;

    const Interval seen = visible_interval(problem_.visibility, batch, sequence.first_query,
                                           sequence.first_query + sequence.queries, sequence.keys);
    const int64_t begin = larger(span * sequence.span_keys, seen.low);
    const int64_t end = smaller((span + 1) * sequence.span_keys, seen.high);
    for (int64_t key = begin; key < end; key += kBlockKeys) attend_block(worker, sequence, index, key_head, key, end);
    for (int64_t r = 0; r < row_count; ++r) note(MarkRules::finish(rows[r].marks));
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
  void attend_block(const Worker& worker, const Sequence& sequence, int64_t index, int64_t key_head, int64_t key,
                    int64_t end) {
    Row* rows = rows_state_ + index;
    float* sums = sums_ + index * sum_columns_;
    const int64_t batch = sequence.batch, row_count = sequence.rows, count = smaller(end - key, int64_t(kBlockKeys));
    int64_t stride;
    for (int64_t at = 0, run; at < count; at += run) {
      run = problem_.key.run(key + at, count - at);
      const Input* keys = block_rows(worker, problem_.key, batch, key_head, key + at, run, shape_.width, &stride);
      Upcoming values_ahead = upcoming(problem_.value, batch, key_head, key + at, run, shape_.value_width);
      dot_rows(worker, row_count, keys, stride, at, run, values_ahead);
    }

    bool partial = problem_.visibility.mask != nullptr;
    for (int64_t r = 0; r < row_count; ++r) partial = partial || rows[r].low > key || rows[r].high < key + count;
    const int64_t padded = round_up(count, 2 * Vec::width);
    if (rules_.bias.any())
      for (int64_t g = 0; g < group_; ++g) {
        worker.bias[g] =
            rules_.bias.block(batch, key_head * group_ + g, key, padded, worker.bias_values + g * kBlockKeys);
        partial = partial || worker.bias[g].removes;
      }
    for (int64_t r = 0; r < row_count; ++r) {
      const BlockOfRow of{key, padded, count, partial || count < padded};
      float* scores = worker.scores + r * kBlockKeys;
      Probability* probabilities = worker.probabilities + r * kBlockKeys;
      if (rules_.whole(rows[r], of))
        rules_.template absorb_whole<Dot>(rows[r], of, scores, probabilities,
                                          [&](float factor) { rescale(index + r, factor); });
      else
        absorb_other(rows[r], of, scores, probabilities, index + r, batch, key_head);
    }

    if (partial && !all_finite<Input>(problem_.value, batch, key_head, key, count, shape_.value_width)) {
      // A masked value of NaN or infinity must not meet a probability of zero: their product is NaN.
      for (int64_t r = 0; r < row_count; ++r)
        for (int64_t j = 0; j < count; ++j)
          if (rules_.visible(rows[r], key + j)) {
            const float weight = Dot::load_probability(worker.probabilities + r * kBlockKeys, j);
            const Input* values = problem_.value.template row<Input>(batch, key_head, key + j);
            for (int64_t d = 0; d < shape_.value_width; ++d) {
              float& sum = sums[r * sum_columns_ + Dot::place(d)];
              sum = fma_alone(weight, to_float(values[d * problem_.value.column_stride()]), sum);
            }
          }
      return;
    }
    for (int64_t at = 0, run; at < count; at += run) {
      run = problem_.value.run(key + at, count - at);
      const Input* values =
          block_rows(worker, problem_.value, batch, key_head, key + at, run, shape_.value_width, &stride);
      // As many keys of the next block as this run has values; the last one asks for the rest.
      const int64_t next = key + count + at, asked = at + run == count ? kBlockKeys - at : run;
      const int64_t there = next < end ? problem_.key.run(next, smaller(asked, end - next)) : 0;
      Upcoming keys_ahead = upcoming(problem_.key, batch, key_head, next, there, shape_.width);
      keys_ahead.divide((shape_.value_width + kMixColumns - 1) / kMixColumns);
      mix_rows(worker, row_count, values, stride, at, run, sums, keys_ahead);
    }
  }

  // Of the partial row `index`; stands apart so that the loop over whole rows stays small.
  [[gnu::noinline]] void absorb_other(Row& row, const BlockOfRow& of, float* scores, Probability* probabilities,
                                      int64_t index, int64_t batch, int64_t key_head) const {
    rules_.template absorb_other<Dot>(
        row, of, scores, probabilities, [&](float factor) { rescale(index, factor); },
        [&](int64_t j, float weight) {
          add_scaled(marked_ + index * sum_columns_, weight,
                     problem_.value.template row<Input>(batch, key_head, of.key + j), problem_.value.column_stride(),
                     shape_.value_width);
        });
  }

  [[gnu::noinline]] void rescale(int64_t index, float factor) const {
    scale_sums(sums_ + index * sum_columns_, sum_columns_, factor);
    if (rules_.marks.parts()) scale_sums(marked_ + index * sum_columns_, sum_columns_, factor);
  }

  Upcoming upcoming(const KeyRows& operand, int64_t batch, int64_t key_head, int64_t key, int64_t count,
                    int64_t columns) const {
    Upcoming ahead;
    if (operand.column_stride() != 1 || count <= 0) return ahead;
    ahead.next = reinterpret_cast<const char*>(operand.template row<Input>(batch, key_head, key));
    ahead.stride = operand.row_stride() * int64_t(sizeof(Input));
    ahead.row_bytes = columns * int64_t(sizeof(Input));
    ahead.rows = count;
    return ahead;
  }

  // Products with the keys of places [at, at + count) of a block.
  void dot_rows(const Worker& worker, int64_t rows, const Input* keys, int64_t stride, int64_t at, int64_t count,
                Upcoming& ahead) const {
    int64_t r = 0;
    for (; r + kMaxRowBlock <= rows; r += kMaxRowBlock)
      dot_keys<kMaxRowBlock>(worker, r, keys, stride, at, count, ahead);
    if (r + 2 <= rows) dot_keys<2>(worker, r, keys, stride, at, count, ahead), r += 2;
    if (r < rows) dot_keys<1>(worker, r, keys, stride, at, count, ahead);
  }

  template <int Rows>
  void dot_keys(const Worker& worker, int64_t r, const Input* keys, int64_t stride, int64_t at, int64_t count,
                Upcoming& ahead) const {
    constexpr int64_t kKeys = Dot::products / Rows;
    const typename Dot::Query* queries = worker.queries + r * query_columns_;
    float* scores = worker.scores + r * kBlockKeys + at;
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys) {
      ahead.fetch(kKeys);
      Dot::template dot<Rows>(queries, query_columns_, keys + j * stride, stride, shape_.width, scores + j, kBlockKeys);
    }
    if (j < count) {
      // The last few keys once more from an earlier start, or fewer at a time.
      if (count >= kKeys) {
        j = count - kKeys;
        Dot::template dot<Rows>(queries, query_columns_, keys + j * stride, stride, shape_.width, scores + j,
                                kBlockKeys);
      } else {
        dot_few<Rows, int(kKeys) / 2>(queries, keys, stride, 0, count, scores);
      }
    }
  }

  // Fewer keys than one product takes: half as many, then half of that, with copies of a query in the place of others.
  template <int Rows, int Keys>
  void dot_few(const typename Dot::Query* queries, const Input* keys, int64_t stride, int64_t j, int64_t count,
               float* scores) const {
    if constexpr (Keys >= 1) {
      for (; j + Keys <= count; j += Keys)
        for (int64_t i = 0; i < Rows; ++i) {
          float few[Dot::products];
          Dot::template dot<Dot::products / Keys>(queries + i * query_columns_, 0, keys + j * stride, stride,
                                                  shape_.width, few, Keys);
          std::memcpy(scores + i * kBlockKeys + j, few, Keys * sizeof(float));
        }
      dot_few<Rows, Keys / 2>(queries, keys, stride, j, count, scores);
    }
  }

  void mix_rows(const Worker& worker, int64_t rows, const Input* values, int64_t stride, int64_t at, int64_t count,
                float* sums, Upcoming& ahead) const {
    for (int64_t d = 0; d < shape_.value_width; d += kMixColumns) {
      const int64_t left = shape_.value_width - d;
      int64_t r = 0;
      for (; r + kMaxRowBlock <= rows; r += kMaxRowBlock)
        mix_columns<kMaxRowBlock>(worker, r, values + d, stride, at, count, left, sums + d, ahead);
      if (r + 2 <= rows) mix_columns<2>(worker, r, values + d, stride, at, count, left, sums + d, ahead), r += 2;
      if (r < rows) mix_columns<1>(worker, r, values + d, stride, at, count, left, sums + d, ahead);
    }
  }

  template <int Rows>
  void mix_columns(const Worker& worker, int64_t r, const Input* values, int64_t stride, int64_t at, int64_t count,
                   int64_t columns, float* sums, Upcoming& ahead) const {
    const Probability* probabilities = worker.probabilities + r * kBlockKeys + at;
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
  void merge(int64_t worker_index, const Sequence& sequence, int64_t key_head) {
    const Worker worker = this->worker(worker_index);
    const int64_t batch = sequence.batch, row_count = sequence.rows, spans = sequence.spans;
    for (int64_t r = 0; r < row_count; ++r) {
      const int64_t first = partial_index(sequence, key_head, 0) + r;
      Row total = rows_state_[first];
      float* sums = sums_ + first * sum_columns_;
      for (int64_t span = 1; span < spans; ++span) join(total, first, first + span * row_count);

      const int64_t head = head_of(sequence, key_head, r), query = query_of(sequence, r);
      const int64_t index = shape_.row(batch, head, query);
      rules_.report(total, index);
      for (int64_t d = 0; d < shape_.value_width; ++d) worker.row[d] = sums[Dot::place(d)];
      if (shape_.value_width > 0)
        write_output<Input>(problem_, rules_, total, worker.row,
                            rules_.marks.parts() ? marked_ + first * sum_columns_ : nullptr, batch, head, query);
      if (!rules_.marks.emits()) continue;
      int64_t count = 0;
      for (int64_t span = 0; span < spans; ++span) {
        const Row& part = rows_state_[first + span * row_count];
        for (int32_t c = 0; c < part.found.count; ++c, ++count) {
          worker.merged_scores[count] = part.found.scores[c];
          worker.merged[count] = part.found.positions[c];
        }
      }
      rules_.marks.emit(worker.merged_scores, worker.merged, count,
                        rules_.marks.final_threshold(total.max, std::log2(rules_.mass(total))), total.own, index);
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
  const int64_t group_, query_columns_, sum_columns_, candidate_capacity_;
  Sequence* sequences_ = nullptr;
  int64_t count_ = 0, partials_ = 0, most_rows_ = 0, most_spans_ = 0;
  Row* rows_state_ = nullptr;
  float *sums_ = nullptr, *marked_ = nullptr;
  float* candidate_scores_ = nullptr;
  int32_t* candidates_ = nullptr;
  std::atomic<int32_t>* left_ = nullptr;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
