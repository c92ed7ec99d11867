// How much attention each key receives: column means of the weight matrix, without the matrix.
//
// A first pass over the rows finds their softmax references and sums; a second walks down the columns, block by block,
// recomputing scores. Every block of columns is one task, so sums are added in one order whatever the number of
// threads.
#pragma once

#include "prefill.h"

namespace attnrb {
namespace ATTNRB_ISA {

template <class Engine>
class Received : Driver<Received<Engine>> {
  using Base = Driver<Received>;
  friend Base;
  using Input = typename Engine::Input;
  using Places = typename Engine::Places;

 public:
  // `rows` is the attention problem with the same queries and keys and no values, its softmax filled in.
  Received(const ReceivedProblem& problem, const AttentionProblem& rows, const ThreadPool& pool, Scratch& scratch)
      : Base(pool, scratch), problem_(problem), rows_(rows), shape_(rows.shape), engine_(rows.shape), rules_(rows) {}

  void run() {
    this->reserve_workers();
    // Under a causal mask the first keys are seen by the most queries: their blocks come first.
    const int64_t blocks = (shape_.keys + Engine::block_keys - 1) / Engine::block_keys,
                  heads = shape_.batch * shape_.heads;
    for_each_task(this->pool_, blocks * heads, [&](int64_t worker, int64_t task) {
      receive(worker, task % heads / shape_.heads, task % heads % shape_.heads, task / heads * Engine::block_keys);
    });
  }

 private:
  struct Worker {
    void* keys;
    void* queries;
    float* scores;
    Row* rows;
    BiasBlock* bias;
    float* bias_values;
    float* strip_sums;
    double* sums;
    int64_t* seen;  // differences of the number of queries that see a key
  };

  Worker carve(Carver& carver) const {
    Worker worker;
    worker.keys = carver.take<char>(engine_.key_block_bytes());
    worker.queries = carver.take<char>(engine_.query_block_bytes());
    worker.scores = carver.take<float>(Engine::strip * Engine::block_keys);
    worker.rows = carver.take<Row>(Engine::strip);
    worker.bias = carver.take<BiasBlock>(1);
    worker.bias_values = carver.take<float>(rules_.bias.any() ? Engine::block_keys : 0);
    worker.strip_sums = carver.take<float>(Engine::block_keys);
    worker.sums = carver.take<double>(Engine::block_keys);
    worker.seen = carver.take<int64_t>(Engine::block_keys + 1);
    return worker;
  }

  void receive(int64_t worker_index, int64_t batch, int64_t head, int64_t key) {
    const FlushSubnormals flush;
    const Worker worker = this->worker(worker_index);
    const int64_t count = shape_.keys - key < Engine::block_keys ? shape_.keys - key : Engine::block_keys;
    const auto keys = problem_.key.template rows<Input>(batch, head / (shape_.heads / shape_.key_heads), key);
    engine_.start_worker();
    engine_.pack_keys(worker.keys, keys, problem_.key.column_stride(), count);
    if (rules_.bias.any()) *worker.bias = rules_.bias.block(batch, head, key, Engine::block_keys, worker.bias_values);
    for (int64_t j = 0; j < Engine::block_keys; ++j) worker.sums[j] = 0.0;
    for (int64_t j = 0; j <= Engine::block_keys; ++j) worker.seen[j] = 0;

    for (int64_t query = 0; query < shape_.queries; query += Engine::strip) {
      const int64_t left = shape_.queries - query, queries = left < Engine::strip ? left : Engine::strip;
      const Interval seen = visible_interval(problem_.visibility, batch, query, query + queries, shape_.keys);
      if (key < seen.high && key + count > seen.low) receive_strip(worker, batch, head, key, count, query, queries);
    }
    engine_.stop_worker();

    float* out = problem_.received + (batch * shape_.heads + head) * shape_.keys + key;
    int64_t seen = 0;
    for (int64_t j = 0; j < count; ++j) {
      seen += worker.seen[j];
      out[j] = seen > 0 ? float(worker.sums[j] / double(seen)) : 0.0f;
    }
  }

  void receive_strip(const Worker& worker, int64_t batch, int64_t head, int64_t key, int64_t count, int64_t first_query,
                     int64_t queries) {
    const int64_t last = round_up(count, Engine::key_granule);
    bool partial = problem_.visibility.mask != nullptr;
    for (int64_t r = 0; r < Engine::strip; ++r) {
      Row& row = worker.rows[r] = Row();
      const Input* query = nullptr;
      if (r < queries) {
        rules_.start(row, batch, head, first_query + r, worker.bias);
        partial = partial || row.low > key || row.high < key + last;
        query = row_of<Input>(problem_.query, batch, head, first_query + r);
      }
      engine_.pack_query_row(worker.queries, r, query, problem_.query.strides[3], rules_.query_factor());
    }
    engine_.scores(worker.queries, 0, queries, worker.keys, 0, last, worker.scores);
    for (int64_t j = 0; j < last; ++j) worker.strip_sums[j] = 0.0f;
    for (int64_t r = 0; r < queries; ++r) {
      float* scores = worker.scores + Engine::score_row(r, 0);
      count_seen(worker, worker.rows[r], key, count);
      const float* softmax = rows_.softmax + 2 * ((batch * shape_.heads + head) * shape_.queries + first_query + r);
      if (softmax[1] == 0.0f) continue;
      rules_.template finish_scores<Places>(worker.rows[r], scores, key, last, last, partial);
      const Vec to_log2 = Vec::set(worker.rows[r].to_log2), reference = Vec::set(softmax[0]);
      const Vec share = Vec::set(1.0f / softmax[1]);
      for (int64_t j = 0; j < last; j += Vec::width) {
        const Vec score = Vec::load(scores + Places::place(j)), exponent = Vec::fms(score, to_log2, reference);
        const Vec weight = exp2<Engine::exp2_degree>(Vec::max(Vec::set(-200.0f), exponent)) * share;
        // A row whose softmax is NaN must not reach the keys that it does not see.
        const typename Vec::Mask hidden = Vec::greater_equal(Vec::set(-kInfinity), score);
        (Vec::load(worker.strip_sums + j) + Vec::select(hidden, Vec::zero(), weight)).store(worker.strip_sums + j);
      }
    }
    for (int64_t j = 0; j < count; ++j) worker.sums[j] += double(worker.strip_sums[j]);
  }

  void count_seen(const Worker& worker, const Row& row, int64_t key, int64_t count) const {
    if (row.mask == nullptr && !RowRules::removes(row)) {
      const int64_t low = row.low > key ? row.low - key : 0, high = row.high - key < count ? row.high - key : count;
      if (low >= high) return;
      ++worker.seen[low];
      --worker.seen[high];
    } else {
      for (int64_t j = 0; j < count; ++j)
        if (rules_.visible(row, key + j)) ++worker.seen[j], --worker.seen[j + 1];
    }
  }

  const ReceivedProblem& problem_;
  const AttentionProblem& rows_;
  const Shape& shape_;
  const Engine engine_;
  const RowRules rules_;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
