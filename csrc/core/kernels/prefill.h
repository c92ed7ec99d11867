// Attention of many queries: keys and values are packed once per key head, then blocks of query rows walk over them.
#pragma once

#include "../scratch.h"
#include "../thread_pool.h"
#include "rows.h"
#include "subnormals.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Packed keys and values of a batch element take at most this much at a time, unless one element alone needs more.
constexpr int64_t kPackedBudget = int64_t(64) << 20;

// Cuts one allocation into aligned pieces.
class Carver {
 public:
  explicit Carver(void* base) : next_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
  int64_t taken(void* base) const { return next_ - static_cast<char*>(base); }

 private:
  char* next_;
};

template <class Engine>
class Prefill {
  using Input = typename Engine::Input;
  using Probability = typename Engine::Probability;

 public:
  Prefill(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : problem_(problem),
        shape_(problem.shape),
        pool_(pool),
        scratch_(scratch),
        engine_(problem.shape),
        rules_(problem) {
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

    Carver carver(scratch_.shared.reserve(size_t(group * (element_bytes + shape_.key_heads * key_blocks_) + 256)));
    packed_ = carver.take<char>(group * element_bytes);
    finite_ = carver.take<uint8_t>(group * shape_.key_heads * key_blocks_);
    reserve_workers();

    for (int64_t first = 0; first < shape_.batch; first += group) {
      const int64_t count = first + group < shape_.batch ? group : shape_.batch - first;
      for_each_task(pool_, count * shape_.key_heads * key_blocks_,
                    [&](int64_t worker, int64_t task) { pack(first, worker, task); });
      for_each_task(pool_, count * shape_.key_heads * query_blocks_ * head_blocks_,
                    [&](int64_t worker, int64_t task) { attend(first, worker, task); });
    }
    return Status(status_.load());
  }

 private:
  struct Worker {
    void* queries;
    float* scores;
    Probability* probabilities;
    float* sums;
    Row* rows;
    float* candidate_scores;
    int32_t* candidates;
    Input* finite_values;
  };

  Worker carve_worker(void* base, int64_t* bytes) const {
    Carver carver(base);
    Worker worker;
    worker.queries = carver.take<char>(engine_.query_block_bytes());
    worker.scores = carver.take<float>(Engine::strip * Engine::block_keys);
    worker.probabilities = reinterpret_cast<Probability*>(carver.take<char>(Engine::probability_bytes()));
    worker.sums = carver.take<float>(Engine::block_rows * engine_.value_columns);
    worker.rows = carver.take<Row>(Engine::block_rows);
    const int64_t candidates = Engine::block_rows * rules_.candidate_capacity(Engine::block_keys);
    worker.candidate_scores = carver.take<float>(candidates);
    worker.candidates = carver.take<int32_t>(candidates);
    worker.finite_values = carver.take<Input>(Engine::block_keys * shape_.value_width);
    if (bytes != nullptr) *bytes = carver.taken(base);
    return worker;
  }

  void reserve_workers() {
    int64_t bytes = 0;
    carve_worker(nullptr, &bytes);
    if (int64_t(scratch_.workers.size()) < pool_.workers) scratch_.workers.resize(size_t(pool_.workers));
    for (int64_t w = 0; w < pool_.workers; ++w) scratch_.workers[size_t(w)].reserve(size_t(bytes));
  }

  char* packed_keys(int64_t element, int64_t key_head, int64_t block) const {
    const int64_t index = (element * shape_.key_heads + key_head) * key_blocks_ + block;
    return packed_ + index * (engine_.key_block_bytes() + engine_.value_block_bytes());
  }

  const Input* value_row(int64_t batch, int64_t key_head, int64_t key) const {
    const int64_t* s = problem_.value.strides;
    return static_cast<const Input*>(problem_.value.data) + batch * s[0] + key_head * s[1] + key * s[2];
  }

  void pack(int64_t first_batch, int64_t worker_index, int64_t task) {
    const int64_t block = task % key_blocks_, key_head = task / key_blocks_ % shape_.key_heads;
    const int64_t element = task / key_blocks_ / shape_.key_heads, batch = first_batch + element;
    const int64_t key = block * Engine::block_keys;
    const int64_t count = shape_.keys - key < Engine::block_keys ? shape_.keys - key : Engine::block_keys;
    const Interval seen = visible_interval(problem_.visibility, batch, 0, shape_.queries, shape_.keys);
    if (key >= seen.high || key + count <= seen.low) return;

    const int64_t* s = problem_.key.strides;
    const Input* keys = static_cast<const Input*>(problem_.key.data) + batch * s[0] + key_head * s[1] + key * s[2];
    char* packed = packed_keys(element, key_head, block);
    engine_.pack_keys(packed, keys, s[2], s[3], count);
    if (shape_.value_width == 0) return;
    const Input* values = value_row(batch, key_head, key);
    const int64_t row_stride = problem_.value.strides[2], column_stride = problem_.value.strides[3];
    char* packed_values = packed + engine_.key_block_bytes();
    finite_[task] = all_finite(values, row_stride, column_stride, count);
    if (finite_[task]) {
      engine_.pack_values(packed_values, values, row_stride, column_stride, count);
      return;
    }
    // A masked value of NaN or infinity must not meet a probability of zero, since their product is NaN: such values
    // are packed as zeros, and added where they are seen.
    Input* copy = carve_worker(scratch_.workers[size_t(worker_index)].reserve(0), nullptr).finite_values;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < shape_.value_width; ++d) {
        const Input value = values[r * row_stride + d * column_stride];
        copy[r * shape_.value_width + d] = is_finite(to_float(value)) ? value : from_float<Input>(0.0f);
      }
    engine_.pack_values(packed_values, copy, shape_.value_width, 1, count);
  }

  static bool is_finite(float x) { return x * 0.0f == 0.0f; }

  // x * 0 is 0 for finite x and NaN otherwise.
  bool all_finite(const Input* values, int64_t row_stride, int64_t column_stride, int64_t count) const {
    Vec test = Vec::zero();
    float rest = 0.0f;
    for (int64_t r = 0; r < count; ++r, values += row_stride) {
      int64_t d = 0;
      if (column_stride == 1)
        for (; d + Vec::width <= shape_.value_width; d += Vec::width)
          test = Vec::fma(Vec::load(values + d), Vec::zero(), test);
      for (; d < shape_.value_width; ++d) rest += to_float(values[d * column_stride]) * 0.0f;
    }
    return test.sum() + rest == 0.0f;
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

    Worker worker = carve_worker(scratch_.workers[size_t(worker_index)].reserve(0), nullptr);
    const auto head_of = [&](int64_t r) { return key_head * group + first_head + r / queries; };
    const auto query_of = [&](int64_t r) { return first_query + r % queries; };

    const FlushSubnormals flush;
    engine_.start_worker();
    const int64_t padded_rows = round_up(row_count, Engine::strip);
    const int64_t candidate_capacity = rules_.candidate_capacity(Engine::block_keys);
    const int64_t* qs = problem_.query.strides;
    for (int64_t r = 0; r < row_count; ++r) rules_.prefetch(batch, head_of(r), query_of(r));
    for (int64_t r = 0; r < padded_rows; ++r) {
      const Input* query = r >= row_count ? nullptr
                                          : static_cast<const Input*>(problem_.query.data) + batch * qs[0] +
                                                head_of(r) * qs[1] + query_of(r) * qs[2];
      engine_.pack_query_row(worker.queries, r, query, qs[3], rules_.query_factor());
    }
    for (int64_t r = 0; r < padded_rows; ++r) {
      Row& row = worker.rows[r] = Row();
      if (r >= row_count) continue;
      note(rules_.start(row, batch, head_of(r), query_of(r)));
      if (rules_.emits()) {
        row.candidate_scores = worker.candidate_scores + r * candidate_capacity;
        row.candidates = worker.candidates + r * candidate_capacity;
      }
    }
    for (int64_t i = 0; i < padded_rows * engine_.value_columns; ++i) worker.sums[i] = 0.0f;

    const Interval seen = visible_interval(problem_.visibility, batch, first_query, first_query + queries, shape_.keys);
    for (int64_t block = seen.low / Engine::block_keys; block * Engine::block_keys < seen.high; ++block)
      for (int64_t r = 0; r < row_count; r += Engine::strip)
        attend_strip(worker, batch, element, key_head, block, r,
                     row_count - r < Engine::strip ? row_count - r : Engine::strip);

    for (int64_t r = 0; r < row_count; ++r) finish(worker, r, batch, head_of(r), query_of(r));
    engine_.stop_worker();
  }

  void attend_strip(Worker& worker, int64_t batch, int64_t element, int64_t key_head, int64_t block, int64_t first_row,
                    int64_t rows) {
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
      float* sums = worker.sums + (first_row + r) * engine_.value_columns;
      const auto rescale = [&](float factor) {
        const Vec by = Vec::set(factor);
        for (int64_t d = 0; d < engine_.value_columns; d += Vec::width) (Vec::load(sums + d) * by).store(sums + d);
      };
      rules_.finish_scores(row[r], scores, key + first, last - first, partial);
      if (partial)
        rules_.template absorb<Engine, true>(row[r], scores, key + first, last - first, probabilities, rescale);
      else
        rules_.template absorb<Engine, false>(row[r], scores, key + first, last - first, probabilities, rescale);
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
    const Input* row = value_row(batch, key_head, key + j);
    for (int64_t d = 0; d < shape_.value_width; ++d) {
      const float value = to_float(row[d * problem_.value.strides[3]]);
      if (!is_finite(value)) sums[r * engine_.value_columns + d] += weight * value;
    }
  }

  void finish(const Worker& worker, int64_t r, int64_t batch, int64_t head, int64_t query) {
    const Row& row = worker.rows[r];
    note(rules_.finish_boost(row));
    const int64_t index = (batch * shape_.heads + head) * shape_.queries + query;
    rules_.report(row, index);
    if (rules_.emits()) rules_.emit(row, row.candidate_scores, row.candidates, row.candidate_count, index);
    if (shape_.value_width > 0)
      write_output<Input>(problem_, rules_, row, worker.sums + r * engine_.value_columns, batch, head, query);
  }

  void note(Status status) {
    if (status != Status::ok) status_.store(int32_t(status), std::memory_order_relaxed);
  }

  const AttentionProblem& problem_;
  const Shape& shape_;
  const ThreadPool& pool_;
  Scratch& scratch_;
  const Engine engine_;
  const RowRules rules_;
  int64_t queries_per_block_, heads_per_block_, query_blocks_, head_blocks_, key_blocks_;
  char* packed_ = nullptr;
  uint8_t* finite_ = nullptr;
  std::atomic<int32_t> status_{0};
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
