// Gradients of attention: weights are computed anew, tile by tile, from the log-sum-exp that the forward left.
//
// With w_ij = 1 + gain [j in S_i], P_ij = exp(t_ij - LSE_i), dW_ij = dy_i . v_j and delta_i = dy_i . y_i - dLSE_i,
// under rules none and row (Note: [Gradients of shared rows] has the other):
//   dV = (w P)^T dY,   dS = P (w dW - delta), or w P (dW - delta) when normalised,   dQ = scale dS K,  dK = scale dS^T
//   Q, dgain = sum over outliers of P dW, or P (dW - delta),   dsink = - sum_i exp(sink - LSE_i) delta_i
// (docs/method.md, Gradients). received_attention is attention with dW_ij = grad_received_j / (queries that see j) and
// delta_i = sum_j P_ij dW_ij, for which a pass of its own goes before, as for rule rest.
//
// Note: [Turns]
// A task is a block of keys of one key head: it owns their dK and dV, and walks over the rows of all heads that share
// them. A block of rows of dQ gets a contribution from each of its blocks of keys, in the order of the keys: a task
// waits until those before have added theirs. Results then do not depend on the number of threads, no product is
// computed twice, and threads rarely wait, since all walk over the rows in the same direction. The first turn writes
// what the others add to, and the last one rounds the sums while they are at hand.
//
// A key bias moves with dt, the gradient of a score behind softcap and bias: a task adds it up for each of its heads,
// in float64 over the tiles, and what broadcasting asks for is added at the end, in one order.
#pragma once

#include <new>

#include "gradient_operands.h"
#include "gradient_scores.h"
#include "gradient_strips.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Float sums of dQ, and rows that are packed once for all blocks of keys, take at most this much at a time, unless
// those of one key head alone need more.
constexpr int64_t kGradientBudget = int64_t(128) << 20;

template <class Engine>
class Gradient : Driver<Gradient<Engine>> {
  using Base = Driver<Gradient>;
  friend Base;
  using Base::note, Base::pool_;
  using Input = typename Engine::Input;
  static constexpr int64_t kRows = Engine::block_rows, kKeys = Engine::block_keys, kStrip = Engine::strip;
  static constexpr int64_t kStrips = kRows / kStrip, kStripsAtOnce = Engine::strips_at_once;
  using Products = GradientProducts<Engine>;
  using RowOperands = GradientRowOperands;

 public:
  Gradient(const GradientProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : Base(pool, scratch),
        problem_(problem),
        shape_(problem.shape),
        rows_(row_problem(problem)),
        rules_(rows_),
        data_(problem, rules_),
        scores_(problem, rules_, data_),
        in_strips_(problem, rules_, data_),
        group_(shape_.heads / shape_.key_heads),
        row_blocks_((shape_.queries + kRows - 1) / kRows),
        key_blocks_((shape_.keys + kKeys - 1) / kKeys),
        query_columns_(Engine::columns(shape_.width)),
        value_columns_(Engine::columns(shape_.value_width)),
        sum_rows_(Engine::whole_strips ? row_blocks_ * kRows : shape_.queries),
        packed_(shape_, received()) {}

  // In units: the heads that share a key head.
  Status run() {
    const int64_t heads = shape_.batch * shape_.heads, units = shape_.batch * shape_.key_heads;
    const int64_t unit_bytes = 4 * group_ * (sum_rows_ * query_columns_ + row_blocks_ * packed_.lanes());
    const int64_t at_once = larger(smaller(kGradientBudget / larger(unit_bytes, int64_t(1)), units), int64_t(1));
    this->reserve_shared([&](Carver& carver) { carve_shared(carver, at_once); });
    this->reserve_workers();

    if (received())
      for_each_task(pool_, heads, [&](int64_t index, int64_t task) {
        data_.share(task / shape_.heads, task % shape_.heads, this->worker(index).all_bias);
      });
    for (int64_t first = 0; first < units; first += at_once) {
      const int64_t count = smaller(units - first, at_once), row_tasks = count * group_ * row_blocks_;
      for_each_task(pool_, row_tasks, [&](int64_t index, int64_t task) {
        const RowBlock of = rows_of(first, task);
        const Status status = data_.prepare(of.batch, of.head, of.first, row_end(of.first));
        note(status);
        if (status == Status::ok) in_strips_.copy_lists(of.batch, of.head, of.first, row_end(of.first));
        new (&turns_[task]) std::atomic<int32_t>(0);
        if constexpr (Engine::packs_rows_once) pack_rows(this->worker(index), of, task);
        const Interval turns = turns_of(of.batch, of.first);
        if (turns.low >= turns.high) {  // these rows see nothing
          clear(task);
          write_query_gradient(of, task);
        }
      });
      if (this->status() != Status::ok) return this->status();
      if (received() || data_.parts()) {
        walk<Pass::deltas>(first, count);
        for (int64_t i = 0; i < row_tasks; ++i) turns_[i].store(0, std::memory_order_relaxed);
      }
      if (data_.parts())
        for_each_task(pool_, row_tasks, [&](int64_t, int64_t task) {
          const RowBlock of = rows_of(first, task);
          data_.settle(of.batch, of.head, of.first, row_end(of.first));
        });
      walk<Pass::gradients>(first, count);
    }
    if (problem_.grad_sinks != nullptr)
      for_each_task(pool_, shape_.heads, [&](int64_t, int64_t head) { write_sink_gradient(head); });
    if (problem_.grad_gain != nullptr)
      for (int64_t head = 0; head < shape_.heads; ++head) write_gain_gradient(head);
    if (problem_.grad_bias != nullptr) write_bias_gradients();
    return Status::ok;
  }

 private:
  enum class Pass { deltas, gradients };

  struct Worker {
    float *keys_across, *keys_along, *values_across;
    RowOperands operands;
    float *scores, *products;
    float* weights;
    float *key_sums, *value_sums;
    float* deltas;
    RestSums* rests;
    float* shares;
    Row* rows;
    const Input **queries, **outputs;  // rows of the tile; null where they have no part in it
    TileMarks marks;                   // of one row in the tile
    BiasBlock* bias;                   // of the head at hand
    float *bias_values, *bias_sums;
    double* bias_totals;
    float* all_bias;  // of all keys
  };

  struct Block {
    int64_t index, batch, key_head, key, count;
    bool finite;
  };

  // A block of rows of one head.
  struct RowBlock {
    int64_t batch, head, first;
  };
  // Of a task among those of the units from `first_unit` on.
  RowBlock rows_of(int64_t first_unit, int64_t task) const {
    const int64_t unit = first_unit + task / row_blocks_ / group_;
    return {unit / shape_.key_heads, unit % shape_.key_heads * group_ + task / row_blocks_ % group_,
            task % row_blocks_ * kRows};
  }

  static AttentionProblem row_problem(const GradientProblem& problem) {
    AttentionProblem rows;
    rows.shape = problem.shape;
    rows.dtype = problem.dtype;
    rows.query = problem.query;
    rows.key = problem.key;
    rows.visibility = problem.visibility;
    rows.scoring = problem.scoring;
    rows.edit = problem.edit;
    rows.edit.indices = nullptr;  // they are taken tile by tile
    return rows;
  }

  bool received() const { return problem_.grad_received != nullptr; }
  bool edits() const { return problem_.edit.indices != nullptr; }

  void carve_shared(Carver& carver, int64_t units) {
    const int64_t heads = shape_.batch * shape_.heads;
    sums_ = carver.take<float>(units * group_ * sum_rows_ * query_columns_);
    turns_ = carver.take<std::atomic<int32_t>>(units * group_ * row_blocks_);
    if constexpr (Engine::packs_rows_once) all_rows_ = packed_.take(carver, units * group_ * row_blocks_);
    data_.carve(carver);
    in_strips_.carve(carver);
    gains_ = carver.take<double>(edits() ? key_blocks_ * heads : 0);
    biases_ = carver.take<double>(problem_.grad_bias != nullptr ? heads * shape_.keys : 0);
  }

  Worker carve(Carver& carver) const {
    const int64_t width = shape_.width, value_width = shape_.value_width;
    Worker worker;
    worker.keys_across = carver.take<float>(Engine::across_lanes(kKeys, width));
    worker.keys_along = carver.take<float>(Engine::along_lanes(kKeys, width));
    worker.values_across = carver.take<float>(Engine::across_lanes(kKeys, value_width));
    worker.operands = Engine::packs_rows_once ? RowOperands() : packed_.take(carver, 1);
    worker.scores = carver.take<float>(kRows * kKeys);
    worker.products = carver.take<float>(kRows * kKeys);
    worker.weights = carver.take<float>(Engine::Weights::lanes());
    worker.key_sums = carver.take<float>(kKeys * query_columns_);
    worker.value_sums = carver.take<float>(kKeys * value_columns_);
    worker.deltas = carver.take<float>(kRows);
    worker.rests = carver.take<RestSums>(kRows);
    worker.shares = carver.take<float>(Engine::Places::place(kKeys));
    worker.rows = carver.take<Row>(kRows);
    worker.queries = carver.take<const Input*>(kKeys > kRows ? kKeys : kRows);
    worker.outputs = carver.take<const Input*>(kKeys > kRows ? kKeys : kRows);
    worker.marks = TileMarks::carve(carver, kKeys);
    worker.bias = carver.take<BiasBlock>(1);
    worker.bias_values = carver.take<float>(kKeys);
    worker.bias_sums = carver.take<float>(kKeys);
    worker.bias_totals = carver.take<double>(kKeys);
    worker.all_bias = carver.take<float>(received() && rules_.bias.any() ? round_up(shape_.keys, Vec::width) : 0);
    return worker;
  }

  int64_t row_end(int64_t first) const { return first + kRows < shape_.queries ? first + kRows : shape_.queries; }

  // Sums of a block of rows.
  float* row_sums(int64_t task) const {
    return sums_ + (task / row_blocks_ * sum_rows_ + task % row_blocks_ * kRows) * query_columns_;
  }

  void clear(int64_t task) const {
    float* const sums = row_sums(task);
    const int64_t rows = smaller(sum_rows_ - task % row_blocks_ * kRows, kRows);
    for (int64_t i = 0; i < rows * query_columns_; ++i) sums[i] = 0.0f;
  }

  // Blocks of keys that have a turn at the sums of the rows from `first` on: see Note: [Turns].
  Interval turns_of(int64_t batch, int64_t first) const {
    const Interval seen = visible_interval(problem_.visibility, batch, first, row_end(first), shape_.keys);
    return {seen.low / kKeys, (seen.high + kKeys - 1) / kKeys};
  }

  // Operands of a block of rows, for all blocks of keys: rows that have no part in any gradient are zeros.
  void pack_rows(const Worker& worker, const RowBlock& of, int64_t task) const {
    const RowOperands to = packed_.of_block(all_rows_, task);
    const int64_t rows = row_end(of.first) - of.first, padded = round_up(rows, kStrip);
    const int64_t first_row = (of.batch * shape_.heads + of.head) * shape_.queries + of.first;
    for (int64_t r = 0; r < padded; ++r) {
      const bool active = r < rows && data_.active(first_row + r);
      worker.queries[r] = active ? row_of<Input>(problem_.query, of.batch, of.head, of.first + r) : nullptr;
      worker.outputs[r] =
          active && !received() ? row_of<Input>(problem_.grad_output, of.batch, of.head, of.first + r) : nullptr;
    }
    const int64_t query_stride = problem_.query.strides[3], output_stride = problem_.grad_output.strides[3];
    Engine::pack_rows(to.query_rows, worker.queries, padded, query_stride, shape_.width, rules_.query_factor());
    Engine::template pack_down<kRows>(to.query_along, worker.queries, padded, query_stride, shape_.width);
    if (received()) return;
    Engine::pack_rows(to.output_rows, worker.outputs, padded, output_stride, shape_.value_width, 1.0f);
    Engine::template pack_down<kRows>(to.output_along, worker.outputs, padded, output_stride, shape_.value_width);
  }

  // ------------------------------------------------------------------------------------------------ blocks of keys

  template <Pass pass>
  void walk(int64_t first_unit, int64_t count) {
    // Under a causal mask the first keys are seen by the most queries: their blocks come first.
    for_each_task(pool_, key_blocks_ * count, [&](int64_t worker, int64_t task) {
      const int64_t own = task % count, unit = first_unit + own;
      Block block;
      block.index = task / count;
      block.batch = unit / shape_.key_heads;
      block.key_head = unit % shape_.key_heads;
      block.key = block.index * kKeys;
      block.count = shape_.keys - block.key < kKeys ? shape_.keys - block.key : kKeys;
      walk_block<pass>(own * group_ * row_blocks_, worker, block);
    });
  }

  // `first_task` is that of the unit's first block of rows.
  template <Pass pass>
  void walk_block(int64_t first_task, int64_t worker_index, Block& block) {
    const FlushSubnormals flush;
    const Worker worker = this->worker(worker_index);
    Engine::start_worker();
    pack_block<pass>(worker, block);
    for (int64_t i = 0; i < kKeys * query_columns_; ++i) worker.key_sums[i] = 0.0f;
    for (int64_t i = 0; i < kKeys * value_columns_; ++i) worker.value_sums[i] = 0.0f;
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = block.key_head * group_ + g;
      if (received())
        for (int64_t j = 0; j < kKeys; ++j)
          worker.shares[Engine::Places::place(j)] =
              j < block.count ? data_.shares[(block.batch * shape_.heads + head) * shape_.keys + block.key + j] : 0.0f;
      double gain = 0.0;
      if (rules_.bias.any()) *worker.bias = rules_.bias.block(block.batch, head, block.key, kKeys, worker.bias_values);
      for (int64_t j = 0; j < kKeys; ++j) worker.bias_totals[j] = 0.0;
      for (int64_t row_block = row_blocks_ - 1; row_block >= 0; --row_block) {
        const int64_t first = row_block * kRows, left = shape_.queries - first, rows = left < kRows ? left : kRows;
        const Interval turns = turns_of(block.batch, first);
        if (block.index < turns.low || block.index >= turns.high) continue;
        tile<pass>(worker, block, head, first, rows, first_task + g * row_blocks_ + row_block, turns, gain);
      }
      if (pass == Pass::gradients && edits())
        gains_[(block.index * shape_.batch + block.batch) * shape_.heads + head] = gain;
      if (pass == Pass::gradients && problem_.grad_bias != nullptr)
        for (int64_t j = 0; j < block.count; ++j)
          biases_[(block.batch * shape_.heads + head) * shape_.keys + block.key + j] = worker.bias_totals[j];
    }
    Engine::stop_worker();
    if (pass == Pass::deltas) return;
    write_block(problem_.grad_key, block, worker.key_sums, query_columns_, shape_.width, problem_.scoring.scale);
    if (!received())
      write_block(problem_.grad_value, block, worker.value_sums, value_columns_, shape_.value_width, 1.0f);
  }

  // Keys that no query sees are zeros here, whatever they hold.
  template <Pass pass>
  void pack_block(const Worker& worker, Block& block) const {
    const Interval seen = visible_interval(problem_.visibility, block.batch, 0, shape_.queries, shape_.keys);
    const int64_t key_stride = problem_.key.column_stride(), value_stride = problem_.value.column_stride();
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t key = block.key + j;
      const bool held = j < block.count && key >= seen.low && key < seen.high;
      const bool valued = held && !received();
      worker.queries[j] = held ? problem_.key.template row<Input>(block.batch, block.key_head, key) : nullptr;
      worker.outputs[j] = valued ? problem_.value.template row<Input>(block.batch, block.key_head, key) : nullptr;
    }
    block.finite = holds_finite(worker);
    if (!block.finite) {
      drop_unseen(worker, block);
      block.finite = holds_finite(worker);
    }
    Engine::pack_across(worker.keys_across, worker.queries, kKeys, key_stride, shape_.width);
    if (!received()) Engine::pack_across(worker.values_across, worker.outputs, kKeys, value_stride, shape_.value_width);
    if (pass == Pass::deltas) return;
    Engine::template pack_along<kKeys>(worker.keys_along, worker.queries, kKeys, key_stride, shape_.width);
  }

  bool holds_finite(const Worker& worker) const {
    const int64_t key_stride = problem_.key.column_stride(), value_stride = problem_.value.column_stride();
    for (int64_t j = 0; j < kKeys; ++j)
      if ((worker.queries[j] != nullptr && !all_finite(worker.queries[j], 0, key_stride, 1, shape_.width)) ||
          (worker.outputs[j] != nullptr && !all_finite(worker.outputs[j], 0, value_stride, 1, shape_.value_width)))
        return false;
    return true;
  }

  // Keys within the interval of some query that a mask or a bias hides from every one. Looked for only where a block
  // holds NaN or infinity: if all of it is hidden, the sums have the order, and the bits, that they have without.
  void drop_unseen(const Worker& worker, const Block& block) const {
    bool seen[kKeys] = {};
    for (int64_t head = block.key_head * group_; head < (block.key_head + 1) * group_; ++head) {
      if (rules_.bias.any()) *worker.bias = rules_.bias.block(block.batch, head, block.key, kKeys, worker.bias_values);
      for (int64_t query = 0; query < shape_.queries; ++query) {
        Row row;
        rules_.start(row, block.batch, head, query, worker.bias);
        for (int64_t j = 0; j < block.count; ++j) seen[j] = seen[j] || rules_.visible(row, block.key + j);
      }
    }
    for (int64_t j = 0; j < kKeys; ++j)
      if (!seen[j]) worker.queries[j] = worker.outputs[j] = nullptr;
  }

  void write_block(const GradientProblem::Target& target, const Block& block, const float* sums, int64_t columns,
                   int64_t width, float factor) const {
    const int64_t* s = target.strides;
    Input* out = static_cast<Input*>(target.data) + block.batch * s[0] + block.key_head * s[1] + block.key * s[2];
    Products::write_keys(out, s[2], block.count, sums, columns, width, factor);
  }

  // ------------------------------------------------------------------------------------------------ tiles

  template <Pass pass>
  void tile(const Worker& worker, const Block& block, int64_t head, int64_t first_query, int64_t rows, int64_t task,
            const Interval& turns, double& gain) {
    std::atomic<int32_t>& turn = turns_[task];
    const int32_t my_turn = int32_t(block.index - turns.low);
    float* const query_sums = row_sums(task);
    const RowOperands operands = Engine::packs_rows_once ? packed_.of_block(all_rows_, task) : worker.operands;
    const int64_t strips = (rows + kStrip - 1) / kStrip;
    const int64_t first_row = (block.batch * shape_.heads + head) * shape_.queries + first_query;
    KeyRange ranges[kStrips];
    bool any = false, partial = false;
    for (int64_t s = 0; s < strips; ++s) {
      ranges[s] = strip_range(worker, first_row + s * kStrip, smaller(rows - s * kStrip, kStrip), block);
      any = any || !ranges[s].empty();
      partial = partial || ranges[s].partial;
    }
    const bool careful = partial && !(block.finite && data_.finite(first_row, first_row + rows));
    const bool in_strips = pass == Pass::gradients && !careful && in_strips_.fit(head);
    if (!in_strips) start_rows(worker, block, head, first_query, rows);
    const typename Engine::Weights weights(worker.weights);
    if (any) {
      if (rules_.bias.any())
        for (int64_t j = 0; j < kKeys; ++j) worker.bias_sums[j] = 0.0f;
      for (int64_t first = 0; first < strips; first += kStripsAtOnce) {
        const int64_t end = smaller(first + kStripsAtOnce, strips), at = careful ? first : first % kStripsAtOnce;
        if (in_strips && end < strips)
          in_strips_.prefetch(first_row + end * kStrip, smaller(rows - end * kStrip, kStrip));
        multiply_rows(worker, operands, ranges + first, first, end - first, at * kStrip * kKeys);
        for (int64_t s = first; s < end; ++s) {
          if (ranges[s].empty()) continue;
          float *scores = worker.scores + (at + s - first) * kStrip * kKeys,
                *products = worker.products + (at + s - first) * kStrip * kKeys;
          if (in_strips) {
            gain += in_strips_.differentiate(
                {block.batch, head, first_query + s * kStrip, first_row + s * kStrip,
                 smaller(rows - s * kStrip, kStrip), s, block.key, ranges[s], scores, products},
                weights);
            continue;
          }
          for (int64_t r = 0; r < kStrip; ++r)
            differentiate<pass>(worker, block, s * kStrip + r, head, first_query, first_row, ranges[s],
                                scores + Engine::score_row(r), products + Engine::score_row(r), gain);
          if (pass == Pass::gradients && !careful)
            weights.convert(scores, products, s * kStrip, ranges[s].first, ranges[s].last);
        }
      }
    }
    if (pass == Pass::gradients && any && !careful) {
      if (!received()) {
        if constexpr (!Engine::packs_rows_once)
          Engine::template pack_along<kRows>(operands.output_along, worker.outputs, strips * kStrip,
                                             problem_.grad_output.strides[3], shape_.value_width);
        Products::add_values(worker.scores, weights, operands.output_along, value_columns_, ranges, strips,
                             worker.value_sums);
      }
      if constexpr (!Engine::packs_rows_once)
        Engine::template pack_along<kRows>(operands.query_along, worker.queries, strips * kStrip,
                                           problem_.query.strides[3], shape_.width);
      Products::add_keys(worker.products, weights, operands.query_along, query_columns_, ranges, strips,
                         worker.key_sums);
    }
    if (any && rules_.bias.any())
      for (int64_t j = 0; j < kKeys; ++j) worker.bias_totals[j] += double(worker.bias_sums[j]);
    wait_for(turn, my_turn);  // see Note: [Turns]
    if (any && pass == Pass::deltas) add_deltas(worker, first_row, rows);
    if (pass == Pass::gradients) {
      const bool fresh = my_turn == 0;
      if (any && !careful)
        Products::add_rows(worker.products, weights, worker.keys_along, query_columns_, ranges, rows, query_sums,
                           fresh);
      else if (fresh)
        clear(task);
      if (any && careful) multiply_visible(worker, block, rows, ranges, query_sums);
      if (block.index + 1 == turns.high) write_query_gradient({block.batch, head, first_query}, task);
    }
    turn.store(my_turn + 1, std::memory_order_release);
  }

  // Scores of `count` strips from the one that `first` is, and gradients of their weights, to where `to` says.
  void multiply_rows(const Worker& worker, const RowOperands& operands, const KeyRange* ranges, int64_t first,
                     int64_t count, int64_t to) const {
    const Input** rows = worker.queries + first * kStrip;
    float* packed = operands.query_rows + first * kStrip * Engine::row_lanes(shape_.width);
    if constexpr (!Engine::packs_rows_once)
      Engine::pack_rows(packed, rows, count * kStrip, problem_.query.strides[3], shape_.width, rules_.query_factor());
    Products::multiply_rows(packed, worker.keys_across, shape_.width, ranges, count, worker.scores + to);
    if (received()) return;
    rows = worker.outputs + first * kStrip;
    packed = operands.output_rows + first * kStrip * Engine::row_lanes(shape_.value_width);
    if constexpr (!Engine::packs_rows_once)
      Engine::pack_rows(packed, rows, count * kStrip, problem_.grad_output.strides[3], shape_.value_width, 1.0f);
    Products::multiply_rows(packed, worker.values_across, shape_.value_width, ranges, count, worker.products + to);
  }

  void add_deltas(const Worker& worker, int64_t first_row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      if (received()) {
        data_.deltas[first_row + r] += worker.deltas[r];
        continue;
      }
      RestSums& sums = data_.rests[first_row + r];
      sums.mass += worker.rests[r].mass;
      sums.product += worker.rests[r].product;
      sums.marked += worker.rests[r].marked;
    }
  }

  // What each row of a tile starts with.
  void start_rows(const Worker& worker, const Block& block, int64_t head, int64_t first_query, int64_t rows) const {
    const int64_t first_row = (block.batch * shape_.heads + head) * shape_.queries + first_query;
    for (int64_t r = 0; r < round_up(rows, kStrip); ++r) {
      Row& row = worker.rows[r] = Row();
      worker.queries[r] = worker.outputs[r] = nullptr;
      worker.deltas[r] = 0.0f;
      worker.rests[r] = RestSums();
      if (r >= rows || !data_.active(first_row + r)) continue;
      rules_.start(row, block.batch, head, first_query + r, worker.bias);
      scores_.prefetch(block.batch, head, first_query + r);
      worker.queries[r] = row_of<Input>(problem_.query, block.batch, head, first_query + r);
      if (!received()) worker.outputs[r] = row_of<Input>(problem_.grad_output, block.batch, head, first_query + r);
    }
  }

  // Of `rows` rows; those that a strip lacks see nothing.
  KeyRange strip_range(const Worker& worker, int64_t first_row, int64_t rows, const Block& block) const {
    KeyRange range;
    int64_t low = shape_.keys, high = 0, all_low = 0, all_high = rows < kStrip ? 0 : shape_.keys;
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      const int64_t row_low = data_.lows[row], row_high = data_.highs[row];
      all_low = larger(row_low, all_low);
      all_high = smaller(row_high, all_high);
      if (row_low >= row_high) continue;
      low = smaller(row_low, low);
      high = larger(row_high, high);
    }
    if (low >= high || high <= block.key || low >= block.key + block.count) return range;
    range.first = low > block.key ? (low - block.key) / Engine::key_granule * Engine::key_granule : 0;
    range.last = high - block.key < kKeys ? round_up(high - block.key, Engine::key_granule) : kKeys;
    range.partial = all_low > block.key + range.first || all_high < block.key + range.last ||
                    problem_.visibility.mask != nullptr || (rules_.bias.any() && worker.bias->removes);
    return range;
  }

  // The last three products pair by pair: a NaN or infinity that a row does not see must not meet its zeros, since
  // their product is NaN.
  void multiply_visible(const Worker& worker, const Block& block, int64_t rows, const KeyRange* ranges,
                        float* query_sums) const {
    const auto add = [](float* sums, auto&& place, float factor, const Input* row, int64_t stride, int64_t width) {
      for (int64_t d = 0; d < width; ++d) sums[place(d)] += factor * to_float(row[d * stride]);
    };
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange& range = ranges[r / kStrip];
      for (int64_t j = range.first; j < range.last && j < block.count; ++j) {
        if (worker.queries[r] == nullptr || !rules_.visible(worker.rows[r], block.key + j)) continue;
        const int64_t at = r / kStrip * kStrip * kKeys + Engine::score_row(r % kStrip) + Engine::Places::place(j);
        const float weight = worker.scores[at], gradient = worker.products[at];
        const auto of_key = [&](int64_t d) { return Engine::key_place(j, d, query_columns_); };
        const auto of_value = [&](int64_t d) { return Engine::key_place(j, d, value_columns_); };
        const auto of_row = [&](int64_t d) { return Engine::row_place(r, d, query_columns_); };
        if (!received())
          add(worker.value_sums, of_value, weight, worker.outputs[r], problem_.grad_output.strides[3],
              shape_.value_width);
        add(worker.key_sums, of_key, gradient, worker.queries[r], problem_.query.strides[3], shape_.width);
        add(query_sums, of_row, gradient, problem_.key.template row<Input>(block.batch, block.key_head, block.key + j),
            problem_.key.column_stride(), shape_.width);
      }
    }
  }

  // One row of a tile: in place, scores become weights and gradients of weights become gradients of scores.
  template <Pass pass>
  void differentiate(const Worker& worker, const Block& block, int64_t r, int64_t head, int64_t first_query,
                     int64_t first_row, const KeyRange& range, float* scores, float* products, double& gain) const {
    if (worker.queries[r] == nullptr) {
      for (int64_t j = range.first; j < range.last; ++j)
        scores[Engine::Places::place(j)] = products[Engine::Places::place(j)] = 0.0f;
      return;
    }
    const TileRow tile{worker.rows[r],  block.batch, head,   first_query + r, first_row + r,
                       block.key,       range,       scores, products,        received() ? worker.shares : products,
                       worker.bias_sums};
    TileMarks marks = worker.marks;
    if (pass == Pass::gradients)
      gain += scores_.differentiate(tile, marks);
    else if (received())
      worker.deltas[r] = scores_.row_delta(tile);
    else
      worker.rests[r] = scores_.rest_sums(tile, marks);
  }

  // ------------------------------------------------------------------------------------------------ results

  void write_query_gradient(const RowBlock& of, int64_t task) const {
    const FlushSubnormals flush;
    const int64_t* s = problem_.grad_query.strides;
    Input* out = static_cast<Input*>(problem_.grad_query.data) + of.batch * s[0] + of.head * s[1] + of.first * s[2];
    Products::write_rows(out, s[2], row_end(of.first) - of.first, row_sums(task), query_columns_, shape_.width,
                         problem_.scoring.scale);
  }

  void write_sink_gradient(int64_t head) const {
    const double sink = problem_.scoring.sinks != nullptr ? double(problem_.scoring.sinks[head]) : -double(kInfinity);
    double sum = 0.0;
    if (sink != -double(kInfinity))
      for (int64_t batch = 0; batch < shape_.batch; ++batch)
        for (int64_t query = 0; query < shape_.queries; ++query) {
          const int64_t row = (batch * shape_.heads + head) * shape_.queries + query;
          if (data_.active(row)) sum -= std::exp(sink - double(problem_.lse[row])) * double(data_.deltas[row]);
        }
    problem_.grad_sinks[head] = float(sum);
  }

  // Of every slot of the bias, in parallel; sums over what it is broadcast along have one order.
  void write_bias_gradients() const {
    const int64_t *strides = problem_.grad_bias_strides, slots = problem_.edit.bias_slots;
    const int64_t batches = strides[0] == 0 ? 1 : shape_.batch, heads = strides[1] == 0 ? 1 : shape_.heads;
    for_each_task(pool_, batches * heads, [&](int64_t, int64_t task) {
      const int64_t batch = task / heads, head = task % heads;
      float* out = problem_.grad_bias + batch * strides[0] + head * strides[1];
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t key = slot - problem_.visibility.key_offset;
        double sum = 0.0;
        if (key >= 0 && key < shape_.keys)
          for (int64_t b = batch; b < (batches == 1 ? shape_.batch : batch + 1); ++b)
            for (int64_t h = head; h < (heads == 1 ? shape_.heads : head + 1); ++h)
              sum += biases_[(b * shape_.heads + h) * shape_.keys + key];
        out[slot * strides[2]] = float(sum);
      }
    });
  }

  void write_gain_gradient(int64_t head) const {
    double sum = 0.0;
    if (edits())
      for (int64_t block = 0; block < key_blocks_ * shape_.batch; ++block) sum += gains_[block * shape_.heads + head];
    problem_.grad_gain[head] = float(sum);
  }

  const GradientProblem& problem_;
  const Shape& shape_;
  const AttentionProblem rows_;
  const RowRules rules_;
  GradientRows<Input> data_;
  const GradientScores<Engine> scores_;
  GradientStrips<Engine> in_strips_;
  const int64_t group_, row_blocks_, key_blocks_, query_columns_, value_columns_, sum_rows_;
  const PackedGradientRows<Engine> packed_;
  RowOperands all_rows_{};  // where they are packed once
  float* sums_ = nullptr;
  std::atomic<int32_t>* turns_ = nullptr;
  double* gains_ = nullptr;   // [key block, B, H]
  double* biases_ = nullptr;  // [B, H, N]
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
