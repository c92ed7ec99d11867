// Attention of many queries: keys and values are packed once per key head, then blocks of query rows walk over them.
#pragma once

#include "driver.h"
#include "rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Packed keys and values of a batch element take at most this much at a time, unless one element alone needs more.
constexpr int64_t kPackedBudget = int64_t(64) << 20;

template <class Engine>
class Prefill : Driver<Prefill<Engine>> {
  using Base = Driver<Prefill>;
  friend Base;
  using Base::note, Base::pool_;
  using Input = typename Engine::Input;
  using Probability = typename Engine::Probability;
  static_assert(Engine::block_keys <= kMostBlockKeys, "outliers of a block are lifted into arrays of this length");

 public:
  Prefill(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : Base(pool, scratch), problem_(problem), shape_(problem.shape), engine_(problem.shape), rules_(problem) {
    // A block of rows holds many queries of one head, or all queries of several heads where queries are few.
    if (shape_.queries * 2 > Engine::block_rows) {
      queries_per_block_ = shape_.queries < Engine::block_rows ? shape_.queries : Engine::block_rows;
      heads_per_block_ = 1;
    } else {
      const int64_t group = shape_.heads / shape_.key_heads, fitting = Engine::block_rows / shape_.queries;
      queries_per_block_ = shape_.queries;
      heads_per_block_ = fitting < group ? fitting : group;
    }
    query_blocks_ = (shape_.queries + queries_per_block_ - 1) / queries_per_block_;
    head_blocks_ = (shape_.heads / shape_.key_heads + heads_per_block_ - 1) / heads_per_block_;
    key_blocks_ = (shape_.keys + Engine::block_keys - 1) / Engine::block_keys;
  }

  Status run() {
    const int64_t block_bytes = engine_.key_block_bytes() + engine_.value_block_bytes();
    const int64_t element_bytes = shape_.key_heads * key_blocks_ * block_bytes;
    int64_t group = kPackedBudget / (element_bytes > 0 ? element_bytes : 1);
    group = group < 1 ? 1 : group > shape_.batch ? shape_.batch : group;

    this->reserve_shared([&](Carver& carver) {
      packed_ = carver.take<char>(group * element_bytes);
      finite_ = carver.take<uint8_t>(group * shape_.key_heads * key_blocks_);
    });
    this->reserve_workers();

    for (int64_t first = 0; first < shape_.batch; first += group) {
      const int64_t count = first + group < shape_.batch ? group : shape_.batch - first;
      for_each_task(pool_, count * shape_.key_heads * key_blocks_,
                    [&](int64_t worker, int64_t task) { pack(first, worker, task); });
      for_each_task(pool_, count * shape_.key_heads * query_blocks_ * head_blocks_,
                    [&](int64_t worker, int64_t task) { attend(first, worker, task); });
    }
    return this->status();
  }

 private:
  struct Worker {
    void* queries;
    float* scores;
    Probability* probabilities;
    float* sums;
    float* marked;  // sums of outliers, where they have their own
    Row* rows;
    BiasBlock* bias;  // of each head
    float* bias_values;
    float* candidate_scores;
    int32_t* candidates;
    Input* finite_values;
  };

  Worker carve(Carver& carver) const {
    Worker worker;
    worker.queries = carver.take<char>(engine_.query_block_bytes());
    worker.scores = carver.take<float>(Engine::strip * Engine::block_keys);
    worker.probabilities = reinterpret_cast<Probability*>(carver.take<char>(Engine::probability_bytes()));
    worker.sums = carver.take<float>(Engine::block_rows * engine_.value_columns);
    worker.marked = carver.take<float>(rules_.marks.parts() ? Engine::block_rows * engine_.value_columns : 0);
    worker.rows = carver.take<Row>(Engine::block_rows);
    worker.bias = carver.take<BiasBlock>(heads_per_block_);
    worker.bias_values = carver.take<float>(rules_.bias.any() ? heads_per_block_ * Engine::block_keys : 0);
    const int64_t candidates = Engine::block_rows * rules_.marks.candidate_capacity(Engine::block_keys);
    worker.candidate_scores = carver.take<float>(candidates);
    worker.candidates = carver.take<int32_t>(candidates);
    worker.finite_values = carver.take<Input>(Engine::block_keys * shape_.value_width);
    return worker;
  }

  char* packed_keys(int64_t element, int64_t key_head, int64_t block) const {
    const int64_t index = (element * shape_.key_heads + key_head) * key_blocks_ + block;
    return packed_ + index * (engine_.key_block_bytes() + engine_.value_block_bytes());
  }

  void pack(int64_t first_batch, int64_t worker_index, int64_t task) {
    const int64_t block = task % key_blocks_, key_head = task / key_blocks_ % shape_.key_heads;
    const int64_t element = task / key_blocks_ / shape_.key_heads, batch = first_batch + element;
    const int64_t key = block * Engine::block_keys;
    const int64_t count = shape_.keys - key < Engine::block_keys ? shape_.keys - key : Engine::block_keys;
    const Interval seen = visible_interval(problem_.visibility, batch, 0, shape_.queries, shape_.keys);
    if (key >= seen.high || key + count <= seen.low) return;

    char* packed = packed_keys(element, key_head, block);
    engine_.pack_keys(packed, problem_.key.template row<Input>(batch, key_head, key), problem_.key.row_stride(),
                      problem_.key.column_stride(), count);
    if (shape_.value_width == 0) return;
    const Input* values = problem_.value.template row<Input>(batch, key_head, key);
    const int64_t row_stride = problem_.value.row_stride(), column_stride = problem_.value.column_stride();
    char* packed_values = packed + engine_.key_block_bytes();
    finite_[task] = all_finite(values, row_stride, column_stride, count, shape_.value_width);
    if (finite_[task]) {
      engine_.pack_values(packed_values, values, row_stride, column_stride, count);
      return;
    }
    // A masked value of NaN or infinity must not meet a probability of zero, since their product is NaN: such values
    // are packed as zeros, and added where they are seen.
    Input* copy = this->worker(worker_index).finite_values;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < shape_.value_width; ++d) {
        const Input value = values[r * row_stride + d * column_stride];
        copy[r * shape_.value_width + d] = is_finite(to_float(value)) ? value : from_float<Input>(0.0f);
      }
    engine_.pack_values(packed_values, copy, shape_.value_width, 1, count);
  }

  void attend(int64_t first_batch, int64_t worker_index, int64_t task) {
    // Heads of one key head follow each other and share its packed keys; within it, long (late) queries come first.
    const int64_t head_block = task % head_blocks_,
                  query_block = query_blocks_ - 1 - task / head_blocks_ % query_blocks_;
    const int64_t key_head = task / head_blocks_ / query_blocks_ % shape_.key_heads;
    const int64_t element = task / head_blocks_ / query_blocks_ / shape_.key_heads, batch = first_batch + element;
    const int64_t group = shape_.heads / shape_.key_heads, first_head = head_block * heads_per_block_;
    const int64_t heads = group - first_head < heads_per_block_ ? group - first_head : heads_per_block_;
    const int64_t first_query = query_block * queries_per_block_, left = shape_.queries - first_query;
    const int64_t queries = left < queries_per_block_ ? left : queries_per_block_;
    const int64_t row_count = heads * queries;

    const Worker worker = this->worker(worker_index);
    const auto head_of = [&](int64_t r) { return key_head * group + first_head + r / queries; };
    const auto query_of = [&](int64_t r) { return first_query + r % queries; };

    const FlushSubnormals flush;
    engine_.start_worker();
    const int64_t padded_rows = round_up(row_count, Engine::strip);
    const int64_t candidate_capacity = rules_.marks.candidate_capacity(Engine::block_keys);
    for (int64_t r = 0; r < row_count; ++r) rules_.marks.prefetch(batch, head_of(r), query_of(r));
    for (int64_t r = 0; r < padded_rows; ++r) {
      const Input* query = r >= row_count ? nullptr : row_of<Input>(problem_.query, batch, head_of(r), query_of(r));
      engine_.pack_query_row(worker.queries, r, query, problem_.query.strides[3], rules_.query_factor());
    }
    for (int64_t r = 0; r < padded_rows; ++r) {
      Row& row = worker.rows[r] = Row();
      if (r >= row_count) continue;
      note(rules_.start(row, batch, head_of(r), query_of(r), worker.bias + r / queries));
      if (rules_.marks.emits()) {
        row.found.scores = worker.candidate_scores + r * candidate_capacity;
        row.found.positions = worker.candidates + r * candidate_capacity;
      }
    }
    for (int64_t i = 0; i < padded_rows * engine_.value_columns; ++i) worker.sums[i] = 0.0f;
    if (rules_.marks.parts())
      for (int64_t i = 0; i < padded_rows * engine_.value_columns; ++i) worker.marked[i] = 0.0f;

    const Interval seen = visible_interval(problem_.visibility, batch, first_query, first_query + queries, shape_.keys);
    for (int64_t block = seen.low / Engine::block_keys; block * Engine::block_keys < seen.high; ++block) {
      if (rules_.bias.any())
        for (int64_t h = 0; h < heads; ++h)
          worker.bias[h] = rules_.bias.block(batch, head_of(h * queries), block * Engine::block_keys,
                                             Engine::block_keys, worker.bias_values + h * Engine::block_keys);
      for (int64_t r = 0; r < row_count; r += Engine::strip)
        attend_strip(worker, batch, element, key_head, block, r,
                     row_count - r < Engine::strip ? row_count - r : Engine::strip);
    }

    for (int64_t r = 0; r < row_count; ++r) finish(worker, r, batch, head_of(r), query_of(r));
    engine_.stop_worker();
  }

  void attend_strip(const Worker& worker, int64_t batch, int64_t element, int64_t key_head, int64_t block,
                    int64_t first_row, int64_t rows) {
    const int64_t key = block * Engine::block_keys;
    Row* row = worker.rows + first_row;
    int64_t low = row[0].low, high = row[0].high, all_low = low, all_high = high;
    for (int64_t r = 1; r < rows; ++r) {
      low = row[r].low < low ? row[r].low : low;
      all_low = row[r].low > all_low ? row[r].low : all_low;
      high = row[r].high > high ? row[r].high : high;
      all_high = row[r].high < all_high ? row[r].high : all_high;
    }
    const int64_t first = low > key ? (low - key) / Engine::key_granule * Engine::key_granule : 0;
    const int64_t last =
        high - key < Engine::block_keys ? round_up(high - key, Engine::key_granule) : Engine::block_keys;
    // Where no row sees anything, the block may never have been packed.
    if (low >= high || first >= last || high <= key) return;

    char* keys = packed_keys(element, key_head, block);
    engine_.scores(worker.queries, first_row, rows, keys, first, last, worker.scores);
    const bool partial = all_low > key + first || all_high < key + last || problem_.visibility.mask != nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = worker.scores + r * Engine::block_keys + first;
      Probability* probabilities = worker.probabilities + r * Engine::block_keys + first;
      const int64_t sums = (first_row + r) * engine_.value_columns;
      const auto rescale = [&](float factor) {
        scale_sums(worker.sums + sums, engine_.value_columns, factor);
        if (rules_.marks.parts()) scale_sums(worker.marked + sums, engine_.value_columns, factor);
      };
      const auto take = [&](int64_t j, float weight) {
        add_scaled(worker.marked + sums, weight, problem_.value.template row<Input>(batch, key_head, key + first + j),
                   problem_.value.column_stride(), shape_.value_width);
      };
      rules_.template absorb<Engine>(row[r], scores, key + first, last - first, last - first, partial, probabilities,
                                     rescale, take);
    }
    if (shape_.value_width == 0) return;
    float* sums = worker.sums + first_row * engine_.value_columns;
    engine_.accumulate(worker.probabilities, rows, keys + engine_.key_block_bytes(), first, last, sums);
    if (finite_[(element * shape_.key_heads + key_head) * key_blocks_ + block]) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = first; j < last; ++j)
        if (rules_.visible(row[r], key + j)) add_not_finite(worker, r, j, batch, key_head, key, sums);
  }

  void add_not_finite(const Worker& worker, int64_t r, int64_t j, int64_t batch, int64_t key_head, int64_t key,
                      float* sums) const {
    const float weight = Engine::load_probability(worker.probabilities + r * Engine::block_keys, j);
    const Input* row = problem_.value.template row<Input>(batch, key_head, key + j);
    for (int64_t d = 0; d < shape_.value_width; ++d) {
      const float value = to_float(row[d * problem_.value.column_stride()]);
      if (!is_finite(value)) sums[r * engine_.value_columns + d] += weight * value;
    }
  }

  void finish(const Worker& worker, int64_t r, int64_t batch, int64_t head, int64_t query) {
    const Row& row = worker.rows[r];
    note(MarkRules::finish(row.marks));
    const int64_t index = (batch * shape_.heads + head) * shape_.queries + query;
    rules_.report(row, index);
    if (rules_.marks.emits())
      rules_.marks.emit(row.found.scores, row.found.positions, row.found.count, row.max, rules_.mass(row), row.own,
                        index);
    if (shape_.value_width == 0) return;
    const int64_t sums = r * engine_.value_columns;
    write_output<Input>(problem_, rules_, row, worker.sums + sums,
                        rules_.marks.parts() ? worker.marked + sums : nullptr, batch, head, query);
  }

  const AttentionProblem& problem_;
  const Shape& shape_;
  const Engine engine_;
  const RowRules rules_;
  int64_t queries_per_block_, heads_per_block_, query_blocks_, head_blocks_, key_blocks_;
  char* packed_ = nullptr;
  uint8_t* finite_ = nullptr;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
